"""Blocks of transformers as plain data that builds a module: what strategies draw, and shrink.

Each is a frozen dataclass whose ``repr`` is the code that makes it, so a failing example can be
printed as a script. ``make(width)`` gives an ``nn.Module`` from ``[B, T, width]`` to the same, with
weights from torch's generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "tanh": torch.tanh,
    "squared_relu": lambda x: F.relu(x).square(),
}
LAYOUTS = ("split", "fused", "interleaved")
DECOYS = ("norm", "softmax", "mixed", "whole")
KINDS = ("mlp", "attention", "experts")


class Linear(nn.Module):
    """A linear by ``F.linear``, or, ``transposed``, by ``addmm`` as GPT-2's Conv1D is."""

    def __init__(self, inputs: int, outputs: int, bias: bool, transposed: bool = False) -> None:
        super().__init__()
        size = (inputs, outputs) if transposed else (outputs, inputs)
        self.transposed = transposed
        self.weight = nn.Parameter(torch.randn(size) / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.randn(outputs) / 4) if bias or transposed else None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        if not self.transposed or self.bias is None:
            return F.linear(x, self.weight, self.bias)
        rows = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return rows.unflatten(0, x.shape[:-1])


@dataclass(frozen=True)
class Low:
    """Two linears with nothing between them, ``b(a(x))``, of which ``a`` has ``rank`` outputs.

    In the place of a linear, as factors of its SVD; or, ``beside``, added to it times ``scale``, as
    LoRA does.
    """

    rank: int = 2
    beside: bool = False
    scale: float = 0.5


Lows = tuple[tuple[str, Low], ...]  # by the name of the linear


class _Chain(nn.Module):
    def __init__(self, inputs: int, outputs: int, bias: bool, transposed: bool, low: Low) -> None:
        super().__init__()
        self.low = low
        beside = low.beside
        self.whole = Linear(inputs, outputs, bias, transposed) if beside else None
        self.a = Linear(inputs, low.rank, False)
        self.b = Linear(low.rank, outputs, bias and not beside)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x))
        return y if self.whole is None else self.whole(x) + y * self.low.scale


def linear(
    name: str, low: Lows, inputs: int, outputs: int, bias: bool = False, transposed: bool = False
) -> nn.Module:
    """The linear of a block that has this name, with what ``low`` says of it."""
    chain = dict(low).get(name)
    if chain is None:
        return Linear(inputs, outputs, bias, transposed)
    return _Chain(inputs, outputs, bias, transposed, chain)


def ranks(low: Lows, names: Sequence[str]) -> list[int]:
    """The units of chains: every channel of ``a``'s outputs is one, as ``b`` alone reads it."""
    return [chain.rank for name, chain in low if name in names and chain.rank > 1]


@dataclass(frozen=True)
class MLP:
    """``down(act(gate x) * up x)``, or without a gate ``down(act(up x))``.

    ``layout``: gate and up are two linears, halves of one, or its even and odd channels. ``low``:
    what is of low rank, of ``"gate"``, ``"up"`` and ``"down"``.
    """

    channels: int = 8
    act: str = "silu"
    gated: bool = True
    layout: str = "split"
    bias: bool = False
    transposed: bool = False
    low: Lows = ()

    def make(self, width: int) -> nn.Module:
        """The module, ``[B, T, width]`` to the same."""
        return _MLP(self, width)

    def units(self) -> dict[str, list[int]]:
        """How many units an expert would count, for each of its regions by kind."""
        split = self.gated and self.layout == "split"
        return {"mlp": [self.channels, *ranks(self.low, ["up", "down", *["gate"] * split])]}


class _MLP(nn.Module):
    def __init__(self, spec: MLP, width: int) -> None:
        super().__init__()
        self.spec, f = spec, spec.channels
        fused = spec.gated and spec.layout != "split"
        options = spec.bias, spec.transposed
        self.up = linear("up", spec.low, width, 2 * f if fused else f, *options)
        if spec.gated and not fused:
            self.gate = linear("gate", spec.low, width, f, *options)
        self.down = linear("down", spec.low, f, width, *options)

    def forward(self, x: Tensor) -> Tensor:
        act, up = ACTIVATIONS[self.spec.act], self.up(x)
        if not self.spec.gated:
            return self.down(act(up))
        if self.spec.layout == "split":
            gate = self.gate(x)
        elif self.spec.layout == "fused":
            gate, up = up.chunk(2, -1)
        else:
            gate, up = up[..., ::2], up[..., 1::2]
        return self.down(act(gate) * up)


@dataclass(frozen=True)
class Attention:
    """Causal attention of ``kv_heads`` times ``group`` query heads of ``size`` channels each.

    ``layout``: q, k and v are three linears, parts of one, or, interleaved, parts of each KV
    group's part of one. ``written``: softmax written out, not SDPA. ``low``: what is of low rank,
    of ``"q"``, ``"k"``, ``"v"`` or ``"qkv"``, and ``"o"``.
    """

    kv_heads: int = 2
    group: int = 1
    size: int = 4
    layout: str = "split"
    bias: bool = False
    rotary: bool = False
    written: bool = False
    low: Lows = ()

    def make(self, width: int) -> nn.Module:
        """The module, ``[B, T, width]`` to the same."""
        return _Attention(self, width)

    def units(self) -> dict[str, list[int]]:
        """How many units each region has that popc is to find, by kind."""
        names = ["q", "k", "v", "o"] if self.layout == "split" else ["qkv", "o"]
        # A single KV group can't be pruned: no head would be left.
        heads = [self.kv_heads] if self.kv_heads > 1 else []
        return {"attention": heads, "mlp": ranks(self.low, names)}


class _Attention(nn.Module):
    q: nn.Module
    k: nn.Module
    v: nn.Module
    qkv: nn.Module

    def __init__(self, spec: Attention, width: int) -> None:
        super().__init__()
        self.spec = spec
        kv = spec.kv_heads * spec.size
        self.sizes = (kv * spec.group, kv, kv)
        split = spec.layout == "split"
        sizes = zip("qkv", self.sizes, strict=True) if split else [("qkv", sum(self.sizes))]
        for name, size in sizes:
            self.add_module(name, linear(name, spec.low, width, size, spec.bias))
        self.o = linear("o", spec.low, kv * spec.group, width, spec.bias)

    def forward(self, x: Tensor, cache: Any = None, layer: int = 0, mask: Any = None) -> Tensor:
        """``mask`` bool ``[B, 1, T, K]``; causal over ``x`` alone if None."""
        spec = self.spec
        q, k, v = self._heads(x)
        past = 0 if cache is None else cache.get_seq_length(layer)
        if spec.rotary:
            q, k = _rotated(q, past), _rotated(k, past)
        if cache is not None:
            k, v = cache.update(k, v, layer)
        if mask is None:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device).tril(past)
        if spec.written:
            k, v = (t.repeat_interleave(spec.group, 1) for t in (k, v))
            scores = q @ k.transpose(-1, -2) / math.sqrt(spec.size)
            # Finite: a token that sees nothing, as padding may, must not give NaN.
            h = scores.masked_fill(~mask, torch.finfo(x.dtype).min).softmax(-1) @ v
        else:
            h = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=spec.group > 1)
        return self.o(h.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[B, heads, T, size]`` each."""
        spec, (batch, length, _) = self.spec, x.shape
        if spec.layout == "interleaved":
            parts = self.qkv(x).view(batch, length, spec.kv_heads, spec.group + 2, spec.size)
            q = parts[..., :-2, :].flatten(2, 3)
            k, v = parts[..., -2, :], parts[..., -1, :]
        else:
            if spec.layout == "split":
                parts = self.q(x), self.k(x), self.v(x)
            else:
                parts = self.qkv(x).split(self.sizes, -1)
            q, k, v = (part.view(batch, length, -1, spec.size) for part in parts)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _rotated(x: Tensor, past: Any) -> Tensor:
    """Rotary positions, by halves; ``x [B, H, T, d]``, d even."""
    half = x.shape[-1] // 2
    at = torch.arange(x.shape[2], device=x.device) + past
    angle = at[:, None] / 10.0 ** (torch.arange(half, device=x.device) / half)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


@dataclass(frozen=True)
class MoE:
    """Gated experts in stacked weights; a router sends each token to its best ``top``.

    ``picked``: a token's weights are picked from the stack; else all experts run, and the router's
    zeros leave out what was not chosen.
    """

    experts: int = 3
    top: int = 1
    channels: int = 6
    picked: bool = True

    def make(self, width: int) -> nn.Module:
        """The module, ``[B, T, width]`` to the same."""
        return _MoE(self, width)

    def units(self) -> dict[str, list[int]]:
        """How many units each region has that popc is to find, by kind."""
        return {"experts": [self.channels]}


class _MoE(nn.Module):
    def __init__(self, spec: MoE, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.router = Linear(width, spec.experts, False)
        up, down = (2 * spec.channels, width), (width, spec.channels)
        self.up = nn.Parameter(torch.randn(spec.experts, *up) / math.sqrt(width))
        self.down = nn.Parameter(torch.randn(spec.experts, *down) / math.sqrt(spec.channels))

    def forward(self, x: Tensor) -> Tensor:
        top, width = self.spec.top, x.shape[-1]
        flat = x.reshape(-1, width)
        score, chosen = self.router(flat).softmax(-1).topk(top)
        if self.spec.picked:
            rows, ids = flat.repeat_interleave(top, 0), chosen.reshape(-1)
            gate, up = torch.bmm(self.up[ids], rows[..., None]).squeeze(-1).chunk(2, -1)
            y = torch.bmm(self.down[ids], (F.silu(gate) * up)[..., None]).squeeze(-1)
            return (y.view(-1, top, width) * score[..., None]).sum(1).view(x.shape)
        weight = torch.zeros_like(score, dtype=x.dtype).new_zeros(len(flat), self.spec.experts)
        weight = weight.scatter(1, chosen, score)
        h = torch.bmm(flat.expand(self.spec.experts, -1, -1), self.up.transpose(1, 2))
        gate, up = h.chunk(2, -1)
        y = torch.bmm(F.silu(gate) * up, self.down.transpose(1, 2))
        return (y * weight.t()[..., None]).sum(0).view(x.shape)


@dataclass(frozen=True)
class Decoy:
    """It looks like an MLP, but no channel can be left out without the others' noticing.

    ``how``: a norm or a softmax over the channels, a product that mixes them, or their sum's
    being read as well.
    """

    channels: int = 8
    how: str = "norm"

    def make(self, width: int) -> nn.Module:
        """The module, ``[B, T, width]`` to the same."""
        return _Decoy(self, width)

    def units(self) -> dict[str, list[int]]:
        """None: nothing of it may be pruned."""
        return {}


class _Decoy(nn.Module):
    def __init__(self, spec: Decoy, width: int) -> None:
        super().__init__()
        self.how = spec.how
        f = spec.channels
        self.up, self.down = Linear(width, f, True), Linear(f, width, True)
        self.mix = nn.Buffer(torch.randn(f, f) / math.sqrt(f))

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.up(x))
        if self.how == "norm":
            h = F.layer_norm(h, h.shape[-1:])
        elif self.how == "softmax":
            h = h.softmax(-1)
        elif self.how == "mixed":
            h = h @ self.mix
        else:
            h = h * h.sum(-1, keepdim=True)
        return self.down(h)


Block = MLP | MoE | Decoy

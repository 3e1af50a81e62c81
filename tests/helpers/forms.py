"""Attention and experts in the forms that people write them, by hand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

D, HEADS, SIZE = 16, 4, 4


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax attention written out, ``[B, H, T, d]``."""
    scores = q @ k.transpose(-1, -2) / SIZE**0.5
    return (scores if bias is None else scores + bias).softmax(-1) @ v


def heads(x: Tensor, count: int = HEADS) -> Tensor:
    return x.view(*x.shape[:2], count, -1).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """One linear of ``width`` channels, any way from there to heads, and an output linear."""

    def __init__(self, width: int, mix: Callable[..., Tensor], **extra: nn.Module) -> None:
        super().__init__()
        self.a, self.o, self.mix = nn.Linear(D, width), nn.Linear(D, D), mix
        self.extra = nn.ModuleDict(extra)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.mix(self.a(x), x, **self.extra))


def thirds(y: Tensor, _: Tensor) -> Tensor:
    """All queries, all keys, all values."""
    return merged(F.scaled_dot_product_attention(*map(heads, y.chunk(3, -1))))


def by_head(y: Tensor, _: Tensor) -> Tensor:
    """Each head's query, key and value beside each other."""
    q, k, v = y.view(*y.shape[:2], HEADS, 3, SIZE).permute(3, 0, 2, 1, 4)
    return merged(attend(q, k, v))


def channelwise(y: Tensor, _: Tensor) -> Tensor:
    """Channel by channel: query, key, value, query, ..."""
    q, k, v = (heads(y[..., i::3]) for i in range(3))
    return merged(attend(q, k, v))


def grouped(y: Tensor, _: Tensor) -> Tensor:
    """Two KV heads, each repeated for two queries."""
    q, k, v = y.split((D, D // 2, D // 2), -1)
    k, v = (
        heads(t, 2)[:, :, None].expand(-1, -1, 2, -1, -1).reshape(len(t), HEADS, -1, SIZE)
        for t in (k, v)
    )
    return merged(attend(heads(q), k, v))


def grouped_sdpa(y: Tensor, _: Tensor) -> Tensor:
    q, k, v = y.split((D, D // 2, D // 2), -1)
    k, v = heads(k, 2), heads(v, 2)
    return merged(F.scaled_dot_product_attention(heads(q), k, v, enable_gqa=True))


def single_kv(y: Tensor, _: Tensor) -> Tensor:
    """One key and value for all heads."""
    q, k, v = y.split((D, SIZE, SIZE), -1)
    return merged(attend(heads(q), heads(k, 1), heads(v, 1)))


def alibi(y: Tensor, _: Tensor) -> Tensor:
    slopes = torch.arange(1.0, HEADS + 1)[:, None, None]
    distance = torch.arange(y.shape[1])[None, :] - torch.arange(y.shape[1])[:, None]
    return merged(attend(*map(heads, y.chunk(3, -1)), bias=-slopes * distance.abs()))


def rotary(y: Tensor, _: Tensor) -> Tensor:
    q, k, v = map(heads, y.chunk(3, -1))
    angle = torch.arange(y.shape[1])[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])

    def turned(t: Tensor) -> Tensor:
        first, second = t.chunk(2, -1)
        return t * angle.cos() + torch.cat([-second, first], -1) * angle.sin()

    return merged(F.scaled_dot_product_attention(turned(q), turned(k), v))


def complex_rotary(y: Tensor, _: Tensor) -> Tensor:
    q, k, v = map(heads, y.chunk(3, -1))
    angle = torch.arange(y.shape[1])[:, None] * torch.tensor([1.0, 0.1])
    turn = torch.polar(torch.ones_like(angle), angle)

    def turned(t: Tensor) -> Tensor:
        pairs = torch.view_as_complex(t.reshape(*t.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn).flatten(3)

    return merged(F.scaled_dot_product_attention(turned(q), turned(k), v))


def normed_heads(y: Tensor, _: Tensor, norm: nn.Module) -> Tensor:
    """A norm over each head's own channels."""
    q, k, v = map(heads, y.chunk(3, -1))
    return merged(F.scaled_dot_product_attention(norm(q), norm(k), v))


def normed_all(y: Tensor, _: Tensor, norm: nn.Module) -> Tensor:
    """A norm over the channels of all heads."""
    q, k, v = y.chunk(3, -1)
    return merged(F.scaled_dot_product_attention(heads(norm(q)), heads(norm(k)), heads(v)))


def talking(y: Tensor, _: Tensor, talk: nn.Module) -> Tensor:
    """Scores are mixed across heads."""
    q, k, v = map(heads, y.chunk(3, -1))
    scores = talk((q @ k.transpose(-1, -2)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return merged(scores.softmax(-1) @ v)


def with_einsum(y: Tensor, _: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (HEADS, SIZE)) for t in y.chunk(3, -1))
    scores = torch.einsum("bthd,bshd->bhts", q, k).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", scores, v).flatten(2)


def batched_heads(y: Tensor, _: Tensor) -> Tensor:
    """Batch and heads in one axis, as bmm takes them."""
    batch, length = y.shape[:2]
    q, k, v = (heads(t).reshape(batch * HEADS, length, SIZE) for t in y.chunk(3, -1))
    zero = torch.zeros(batch * HEADS, length, length)
    scores = torch.baddbmm(zero, q, k.transpose(1, 2)).softmax(-1)
    return merged(torch.bmm(scores, v).view(batch, HEADS, length, SIZE))


def crossed(y: Tensor, x: Tensor, other: nn.Module) -> Tensor:
    """Keys and values of another sequence."""
    k, v = other(x.flip(1)[:, :3]).chunk(2, -1)
    return merged(F.scaled_dot_product_attention(heads(y), heads(k), heads(v)))


# Name: the module, how many units its attention has; 0: refused, for the reason that follows.
ATTENTIONS: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "thirds": (lambda: Attention(3 * D, thirds), 4, ""),
    "by head": (lambda: Attention(3 * D, by_head), 4, ""),
    "channelwise": (lambda: Attention(3 * D, channelwise), 4, ""),
    "grouped": (lambda: Attention(2 * D, grouped), 2, ""),
    "grouped sdpa": (lambda: Attention(2 * D, grouped_sdpa), 2, ""),
    "single kv": (lambda: Attention(D + 2 * SIZE, single_kv), 0, "one unit"),
    "alibi": (lambda: Attention(3 * D, alibi), 4, ""),
    "rotary": (lambda: Attention(3 * D, rotary), 4, ""),
    "complex rotary": (lambda: Attention(3 * D, complex_rotary), 4, ""),
    "normed heads": (lambda: Attention(3 * D, normed_heads, norm=nn.RMSNorm(SIZE)), 4, ""),
    "normed all": (
        lambda: Attention(3 * D, normed_all, norm=nn.LayerNorm(D)),
        0,
        "aten.layer_norm.default mixes",
    ),
    "talking": (lambda: Attention(3 * D, talking, talk=nn.Linear(HEADS, HEADS)), 0, "mixed before"),
    "einsum": (lambda: Attention(3 * D, with_einsum), 4, ""),
    "batched heads": (lambda: Attention(3 * D, batched_heads), 4, ""),
    "crossed": (lambda: Attention(D, crossed, other=nn.Linear(D, 2 * D)), 4, ""),
    "torch's": (lambda: Torchs(), 4, ""),
}


class Torchs(nn.Module):
    """``nn.MultiheadAttention``, with its packed projection."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Experts(nn.Module):
    """Four experts of 12 channels in stacked weights; each token meets two, or all."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.router = nn.Linear(D, 4)
        self.up = nn.Parameter(torch.randn(4, 24, D) / 4)
        self.down = nn.Parameter(torch.randn(4, D, 12) / 4)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        score, chosen = self.router(flat).softmax(-1).topk(2)
        if self.how == "picked":
            rows, ids = flat.repeat_interleave(2, 0), chosen.reshape(-1)
            h = torch.bmm(self.up[ids], rows[..., None]).squeeze(-1)
            gate, up = h.chunk(2, -1)
            y = torch.bmm(self.down[ids], (F.silu(gate) * up)[..., None]).squeeze(-1)
            y = y.view(-1, 2, D)
            return (y * score[..., None]).sum(1).view(x.shape)
        weight = torch.zeros(len(flat), 4).scatter(1, chosen, score)
        h = torch.bmm(flat.expand(4, -1, -1), self.up.transpose(1, 2))
        gate, up = h.chunk(2, -1)
        y = torch.bmm(F.silu(gate) * up, self.down.transpose(1, 2))
        return (y * weight.t()[..., None]).sum(0).view(x.shape)


class Decoder(nn.Module):
    """Causal attention with a hand-made cache before a module: it has a decode phase."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.qkv, self.o, self.inner = nn.Linear(D, 3 * D), nn.Linear(D, D), inner

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None = None):
        q, k, v = map(heads, self.qkv(x).chunk(3, -1))
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        x = x + self.o(merged(h))
        return x + self.inner(F.layer_norm(x, (D,))), (k, v)

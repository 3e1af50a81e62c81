"""A causal transformer as plain data: :class:`Transformer`, and prompts for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache

from popc import compat
from popc.testing.blocks import KINDS, Attention, Block, Linear, Lows, linear, ranks
from popc.testing.caches import Buffers, InBuffers, InTuples, Pairs

RESIDUALS = ("pre", "post", "parallel")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Layer:
    """Attention and a block, with norms before or after them, or both in parallel."""

    attention: Attention = field(default_factory=Attention)
    block: Block | None = None
    residual: str = "pre"
    norm: str = "rms"


@dataclass(frozen=True)
class Transformer:
    """``make()`` gives the module, with the same weights each time, in eval mode.

    Its ``forward(input_ids, attention_mask, cache, use_cache)`` is as transformers has it. The
    default dtype leaves no doubt which of two scores is larger.

    Attributes:
        cache: where keys and values are kept: in an ``"object"`` of the caller's; in ``"buffers"``
            of ``longest`` tokens, which ``setup(batch)`` empties, with ``forward(input_ids,
            positions)``; or in ``"tuples"``, with ``forward(input_ids, past)``. See
            :class:`Decoding`, which calls any of them.
        low: what is of low rank, of ``"head"``.
        breaks: whether the trace ends before each layer.
    """

    layers: tuple[Layer, ...] = (Layer(),)
    width: int = 8
    vocabulary: int = 17
    tied: bool = False
    dtype: str = "float64"
    seed: int = 0
    low: Lows = ()
    cache: str = "object"
    longest: int = 16
    breaks: bool = False

    def make(self) -> nn.Module:
        """The model in eval mode, its weights drawn from ``seed``."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return _MODELS[self.cache](self).to(DTYPES[self.dtype]).eval()

    def units(self) -> dict[str, list[int]]:
        """How many units an expert would count, for each region by kind."""
        counted: dict[str, list[int]] = {kind: [] for kind in KINDS}
        for layer in self.layers:
            parts = [layer.attention.units(), {} if layer.block is None else layer.block.units()]
            for kind in counted:
                counted[kind] += [units for by_kind in parts for units in by_kind.get(kind, [])]
        counted["mlp"] += ranks(self.low, ["head"])
        return counted


class Output(NamedTuple):
    """``logits [B, T, vocabulary]``, and the KV cache, if one is used."""

    logits: Tensor
    cache: Any


class _Transformer(nn.Module):
    def __init__(self, spec: Transformer) -> None:
        super().__init__()
        self.popc_spec = spec
        self.embedding = nn.Embedding(spec.vocabulary, spec.width)
        self.layers = nn.ModuleList(_Layer(layer, spec.width) for layer in spec.layers)
        self.head = linear("head", spec.low, spec.width, spec.vocabulary)
        if spec.tied and isinstance(self.head, Linear):
            self.embedding.weight = self.head.weight

    def run(self, input_ids: Tensor, cache: Any, mask: Tensor) -> Tensor:
        """Logits."""
        x = self.embedding(input_ids)
        for number, layer in enumerate(self.layers):
            if self.popc_spec.breaks:
                compat.graph_break()
            x = layer(x, cache, number, mask)
        return self.head(_normed(x, "rms"))


class _WithObject(_Transformer):
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        use_cache: bool = False,
    ) -> Output:
        if use_cache and cache is None:
            cache = DynamicCache()
        past = 0 if cache is None else cache.get_seq_length()
        # A static cache gives keys for all the tokens that it has room for.
        static: Any = cache if isinstance(cache, StaticCache) else None
        total = None if static is None else static.layers[0].max_cache_len
        mask = _mask(input_ids, past, attention_mask, total)
        return Output(self.run(input_ids, cache, mask), cache)


class _WithBuffers(_Transformer):
    def __init__(self, spec: Transformer) -> None:
        super().__init__(spec)
        self.setup(1)

    def setup(self, batch: int) -> None:
        """Empty the cache; new buffers only for another batch size, as static ones stay."""
        spec, buffers = self.popc_spec, getattr(self, "kept", None)
        if buffers is not None and buffers.k0.shape[0] == batch:
            buffers.reset()
            return
        sizes = [(layer.attention.kv_heads, layer.attention.size) for layer in spec.layers]
        self.kept = Buffers(sizes, batch, spec.longest).to(self.embedding.weight.dtype)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Output:
        keys = torch.arange(self.popc_spec.longest, device=positions.device)
        mask = (keys <= positions[:, None])[None, None]
        return Output(self.run(input_ids, InBuffers(self.kept, positions), mask), None)


class _WithTuples(_Transformer):
    def forward(self, input_ids: Tensor, past: Pairs | None = None) -> Output:
        cache = InTuples(past)
        mask = _mask(input_ids, cache.get_seq_length(), None)
        return Output(self.run(input_ids, cache, mask), tuple(cache.now))


_MODELS: dict[str, type[_Transformer]] = {
    "object": _WithObject,
    "buffers": _WithBuffers,
    "tuples": _WithTuples,
}


class _Layer(nn.Module):
    def __init__(self, spec: Layer, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.attention = spec.attention.make(width)
        self.block = None if spec.block is None else spec.block.make(width)
        self.scales = nn.ParameterList(1 + torch.randn(width) / 4 for _ in range(2))

    def forward(self, x: Tensor, cache: Any, number: int, mask: Tensor | None) -> Tensor:
        residual, norm = self.spec.residual, self.spec.norm
        before = residual != "post"
        y = _normed(x, norm) * self.scales[0] if before else x
        attended = self.attention(y, cache, number, mask)
        if residual == "parallel":
            return x + attended + (self.block(y) if self.block is not None else 0)
        x = x + attended if before else _normed(x + attended, norm) * self.scales[0]
        if self.block is None:
            return x
        y = _normed(x, norm) * self.scales[1] if before else x
        x = x + self.block(y)
        return x if before else _normed(x, norm) * self.scales[1]


def _normed(x: Tensor, norm: str) -> Tensor:
    if norm == "layer":
        return F.layer_norm(x, x.shape[-1:])
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def _mask(ids: Tensor, past: Any, attention_mask: Tensor | None, total: Any = None) -> Tensor:
    """Bool ``[B, 1, T, K]``: causal, and padding is seen by none."""
    length = ids.shape[1]
    at = torch.arange(length, device=ids.device) + past
    total = length + past if total is None else total
    keys = torch.arange(total, device=ids.device)
    mask = keys <= at[:, None]
    if attention_mask is not None:
        valid = F.pad(attention_mask, (0, total - attention_mask.shape[1]))
        mask = mask & valid[:, None, None].bool()
    else:
        mask = mask[None, None]
    return mask


@dataclass(frozen=True)
class Prompt:
    """A batch of token ids, padded on one side to the longest.

    Attributes:
        lengths: tokens of each sequence.
    """

    lengths: tuple[int, ...] = (4,)
    side: str = "left"
    seed: int = 0

    def ids(self, vocabulary: int, more: int = 0) -> Tensor:
        """int64 ``[B, T + more]``: padding is 0, and tokens are not; ``more`` follow."""
        generator = torch.Generator().manual_seed(self.seed)
        size = (len(self.lengths), max(self.lengths) + more)
        ids = torch.randint(1, vocabulary, size, generator=generator)
        return ids * self.mask(more)

    def mask(self, more: int = 0) -> Tensor:
        """int64 ``[B, T + more]``: 1 where a token is."""
        longest = max(self.lengths)
        at, sizes = torch.arange(longest), torch.tensor(self.lengths)[:, None]
        valid = at >= longest - sizes if self.side == "left" else at < sizes
        ones = torch.ones(len(self.lengths), more, dtype=torch.int64)
        return torch.cat((valid.long(), ones), 1)

    @property
    def padded(self) -> bool:
        """Whether its rows differ in length."""
        return len(set(self.lengths)) > 1

    def inputs(self, vocabulary: int) -> dict[str, Tensor]:
        """What ``forward`` takes: a mask only where there is padding."""
        masked = {"attention_mask": self.mask()} if self.padded else {}
        return {"input_ids": self.ids(vocabulary), **masked}

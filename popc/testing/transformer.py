"""A causal transformer as plain data: :class:`Transformer`, and prompts for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from popc.testing.blocks import KINDS, Attention, Block, Linear

RESIDUALS = ("pre", "post", "parallel")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Layer:
    """Attention and a block, with norms before them, behind them, or both beside each other."""

    attention: Attention = field(default_factory=Attention)
    block: Block | None = None
    residual: str = "pre"
    norm: str = "rms"


@dataclass(frozen=True)
class Transformer:
    """``make()`` gives the module, the same one each time, in eval mode.

    Its ``forward(input_ids, attention_mask, cache, use_cache)`` is as transformers has it. The
    default dtype leaves no doubt which of two scores is larger.
    """

    layers: tuple[Layer, ...] = (Layer(),)
    width: int = 8
    vocabulary: int = 17
    tied: bool = False
    dtype: str = "float64"
    seed: int = 0

    def make(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return _Transformer(self).to(DTYPES[self.dtype]).eval()

    def units(self) -> dict[str, list[int]]:
        """How many units an expert would count, for each region by kind."""
        counted: dict[str, list[int]] = {kind: [] for kind in KINDS}
        for layer in self.layers:
            found = [layer.attention.units(), {} if layer.block is None else layer.block.units()]
            for kind in counted:
                counted[kind] += [units for held in found for units in held.get(kind, [])]
        return counted


class Output(NamedTuple):
    """``logits [B, T, vocabulary]``, and the KV cache, if one is used."""

    logits: Tensor
    cache: Any


class _Transformer(nn.Module):
    def __init__(self, given: Transformer) -> None:
        super().__init__()
        self.popc_spec = given
        self.embedding = nn.Embedding(given.vocabulary, given.width)
        self.layers = nn.ModuleList(_Layer(layer, given.width) for layer in given.layers)
        self.head = Linear(given.width, given.vocabulary, False)
        if given.tied:
            self.embedding.weight = self.head.weight

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        use_cache: bool = False,
    ) -> Output:
        if use_cache and cache is None:
            cache = DynamicCache()
        x = self.embedding(input_ids)
        mask = _mask(x, 0 if cache is None else cache.get_seq_length(), attention_mask)
        for number, layer in enumerate(self.layers):
            x = layer(x, cache, number, mask)
        return Output(self.head(_normed(x, "rms")), cache)


class _Layer(nn.Module):
    def __init__(self, given: Layer, width: int) -> None:
        super().__init__()
        self.given = given
        self.attention = given.attention.make(width)
        self.block = None if given.block is None else given.block.make(width)
        self.scales = nn.ParameterList(1 + torch.randn(width) / 4 for _ in range(2))

    def forward(self, x: Tensor, cache: Any, number: int, mask: Tensor | None) -> Tensor:
        residual, norm = self.given.residual, self.given.norm
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


def _mask(x: Tensor, past: Any, attention_mask: Tensor | None) -> Tensor:
    """Bool ``[B, 1, T, K]``: causal, and padding is seen by none."""
    length = x.shape[1]
    at = torch.arange(length, device=x.device) + past
    total = length + past
    keys = torch.arange(total, device=x.device)
    mask = keys <= at[:, None]
    if attention_mask is not None:
        mask = mask & attention_mask[:, None, None].bool()
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
        held = at >= longest - sizes if self.side == "left" else at < sizes
        ones = torch.ones(len(self.lengths), more, dtype=torch.int64)
        return torch.cat((held.long(), ones), 1)

    @property
    def padded(self) -> bool:
        return len(set(self.lengths)) > 1

    def inputs(self, vocabulary: int) -> dict[str, Tensor]:
        """What ``forward`` takes: a mask only where there is padding."""
        masked = {"attention_mask": self.mask()} if self.padded else {}
        return {"input_ids": self.ids(vocabulary), **masked}

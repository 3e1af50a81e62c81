"""Where else than in a cache object a model may keep keys and values, and how it is called then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

CACHES = ("object", "buffers", "tuples")
Pairs = tuple[tuple[Tensor, Tensor], ...]


class Buffers(nn.Module):
    """Keys and values of every layer in buffers of fixed size, as gpt-fast has them."""

    def __init__(self, sizes: Sequence[tuple[int, int]], batch: int, longest: int) -> None:
        super().__init__()
        self.longest = longest
        for layer, (heads, size) in enumerate(sizes):
            for name in ("k", "v"):
                self.register_buffer(f"{name}{layer}", torch.zeros(batch, heads, longest, size))

    def reset(self) -> None:
        """Forget what was kept."""
        for buffer in self.buffers():
            buffer.zero_()


class InBuffers:
    """:class:`Buffers` during one call, whose tokens have ``positions``, as attention asks."""

    def __init__(self, buffers: Buffers, positions: Tensor) -> None:
        self.buffers, self.positions = buffers, positions

    def get_seq_length(self, layer: int = 0) -> Tensor:
        """Tokens in the cache, as a tensor."""
        return self.positions[0]

    def update(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Write ``k``, ``v`` ``[B, H, T, d]``; the whole buffers ``[B, H, S, d]``."""
        keys, values = getattr(self.buffers, f"k{layer}"), getattr(self.buffers, f"v{layer}")
        return keys.index_copy_(2, self.positions, k), values.index_copy_(2, self.positions, v)


class InTuples:
    """A tuple of keys and values for each layer, which a call takes and returns longer."""

    def __init__(self, past: Pairs | None) -> None:
        self.past = past
        self.now: list[tuple[Tensor, Tensor]] = []

    def get_seq_length(self, layer: int = 0) -> int:
        """Tokens in the cache."""
        return 0 if self.past is None else self.past[layer][0].shape[2]

    def update(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Append ``k``, ``v`` ``[B, H, T, d]``; what there is then, ``[B, H, S, d]``."""
        if self.past is not None:
            k, v = torch.cat((self.past[layer][0], k), 2), torch.cat((self.past[layer][1], v), 2)
        self.now.append((k, v))
        return k, v


class Decoding:
    """One generation of a model that :class:`popc.testing.Transformer` made, whatever its cache.

    .. code-block:: python

        decoding = Decoding(model, popc.compile(model))
        first, second = decoding(prompt), decoding(token)

    Args:
        call: what is called in its place; by default the model itself.
        cache: instead of a new dynamic one, where the model takes a cache object.
    """

    def __init__(
        self, model: Any, call: Callable[..., Any] | None = None, cache: Any = None
    ) -> None:
        self.model, self.call = model, model if call is None else call
        self.kind = model.popc_spec.cache
        self.cache = DynamicCache() if cache is None else cache
        self.past: Pairs | None = None
        self.length = 0

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """Logits ``[B, T, vocabulary]`` of the tokens that follow those of the calls before."""
        length = self.length
        self.length += ids.shape[1]
        if self.kind == "buffers":
            if not length:
                self.model.setup(len(ids))
            return self.call(ids, torch.arange(length, self.length, device=ids.device)).logits
        if self.kind == "tuples":
            out = self.call(ids, self.past)
            self.past = out.cache
            return out.logits
        return self.call(ids, cache=self.cache, use_cache=True).logits

"""Attention of one token to all before it, over keys and values as a cache holds them.

- ``popc::attend(q, k, v, mask, scale)``: ``softmax(scale · q kᵀ + mask) v``.

``q [B, H, T, E]``; ``k [B, G, S, E]`` and ``v [B, G, S, F]`` with ``G`` that divides ``H``: head
``h`` of the queries goes with head ``h // (H / G)`` of keys and values. ``mask``: bool or floating,
broadcast to ``[B, H, T, S]``, as ``scaled_dot_product_attention`` takes it; ``scale`` is
``1 / √E`` where it is None. The output is ``[B, H, T, F]``.

The reference is ``scaled_dot_product_attention`` itself. The CPU kernel, for one token, reads each
key and value once for all heads that share it, and none that the mask hides: in a static cache the
room that is not filled yet costs nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

torch.library.define(
    "popc::attend",
    "(Tensor q, Tensor k, Tensor v, Tensor? mask=None, float? scale=None) -> Tensor",
)

attend = torch.ops.popc.attend.default


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    if k.shape[-2] != v.shape[-2]:  # ATen does not ask
        sizes = f"{list(k.shape)} and values {list(v.shape)}"
        raise ValueError(f"popc::attend: keys {sizes} are not of as many tokens")
    y = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
    return y.contiguous()


torch.library.impl("popc::attend", "CompositeExplicitAutograd", _attend)


@torch.library.register_fake("popc::attend")
def _attend_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))

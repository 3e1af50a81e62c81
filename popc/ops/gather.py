"""Gather-matmul: a linear that reads only the channels of its weight that an index list names.

Two ops, for the two sides of a region. ``index`` is int64, ``[n]`` (one list for the batch) or
``[B, n]`` (one for each sequence); ``channel_dim`` is the dimension of ``weight`` it points into.

- ``popc::gather_linear(x, weight, bias, index, channel_dim)``: ``x [..., D] -> [..., n]``, the
  listed output channels of ``x Wᵀ + b``.
- ``popc::gather_matmul(h, weight, bias, index, channel_dim)``: ``h [..., n] -> [..., D]``, the
  contraction of the listed channels alone.

The implementations here are plain ATen and serve every device; they are the reference for kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIBRARY = "popc"

torch.library.define(
    f"{_LIBRARY}::gather_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor index, int channel_dim) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
torch.library.define(
    f"{_LIBRARY}::gather_matmul",
    "(Tensor h, Tensor weight, Tensor? bias, Tensor index, int channel_dim) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)

gather_linear = torch.ops.popc.gather_linear.default
gather_matmul = torch.ops.popc.gather_matmul.default


def _rows(weight: Tensor, index: Tensor, channel_dim: int) -> Tensor:
    """The listed channels of ``weight``, channel-major: ``[n, D]``, or ``[B, n, D]``."""
    if index.dim() == 1:
        rows = weight.index_select(channel_dim, index)
        return rows if channel_dim == 0 else rows.t()
    rows = weight.index_select(channel_dim, index.reshape(-1))
    rows = rows if channel_dim == 0 else rows.t()
    return rows.unflatten(0, index.shape)


@torch.library.impl(f"{_LIBRARY}::gather_linear", "CompositeExplicitAutograd")
def _gather_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, channel_dim: int
) -> Tensor:
    rows = _rows(weight, index, channel_dim)
    if index.dim() == 1:
        return torch.nn.functional.linear(x, rows, None if bias is None else bias[index])
    y = x @ rows.mT
    return y if bias is None else y + bias[index].unsqueeze(-2)


@torch.library.impl(f"{_LIBRARY}::gather_matmul", "CompositeExplicitAutograd")
def _gather_matmul(
    h: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, channel_dim: int
) -> Tensor:
    rows = _rows(weight, index, channel_dim)
    if index.dim() == 1:
        return torch.nn.functional.linear(h, rows.t(), bias)
    y = h @ rows
    return y if bias is None else y + bias


@torch.library.register_fake(f"{_LIBRARY}::gather_linear")
def _gather_linear_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, channel_dim: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], index.shape[-1]))


@torch.library.register_fake(f"{_LIBRARY}::gather_matmul")
def _gather_matmul_fake(
    h: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, channel_dim: int
) -> Tensor:
    return h.new_empty((*h.shape[:-1], weight.shape[1 - channel_dim]))

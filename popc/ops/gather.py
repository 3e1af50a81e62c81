"""Gather-matmul: a linear that reads only the channels of its weight that lists name.

- ``popc::gather_linear(x, weight, bias, rows, columns, out_dim)``: ``x [..., K] -> [..., N]``.
- ``popc::gather_experts(x, weight, expert, full, rows, columns, out_dim)``: the same with a stack
  of weights ``[E, ...]``; row ``s`` of ``x [S, K]`` meets the weight of expert ``expert[s]``, the
  whole of it where ``full [E]`` says so.

``rows`` lists output channels: the others are 0. ``columns`` lists input channels: the others count
for nothing. Outputs keep their full width, so all that stands between two linears stays as it is.
A list is None (all), int64 ``[n]`` (one for the batch) or ``[B, n]`` (one for each sequence; for
experts: ``rows [E, n]``, ``columns [S, n]``). ``out_dim`` is the dim of N in a weight (without E).
An output channel that is listed twice is as if it were listed once; an input channel that is listed
twice counts twice.

The implementations here are plain ATen and serve every device; they are the reference for kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

torch.library.define(
    "popc::gather_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? rows, Tensor? columns, int out_dim) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
torch.library.define(
    "popc::gather_experts",
    "(Tensor x, Tensor weight, Tensor expert, Tensor full, Tensor? rows, Tensor? columns,"
    " int out_dim) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)

# The reference by a name of its own, for kernels that leave a case to it.
torch.library.define(
    "popc::gather_linear_reference",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? rows, Tensor? columns, int out_dim) -> Tensor",
)

gather_linear = torch.ops.popc.gather_linear.default
gather_experts = torch.ops.popc.gather_experts.default


def gather_from(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    out_dim: int,
) -> Tensor:
    """The reference of ``popc::gather_linear``."""
    for index in (rows, columns):
        if index is not None and index.dim() == 2:
            if not x.shape[0]:
                return x.new_zeros(*x.shape[:-1], weight.shape[out_dim])
            return torch.stack(
                [
                    gather_from(x[b], weight, bias, at_item(rows, b), at_item(columns, b), out_dim)
                    for b in range(x.shape[0])
                ]
            )
    picked = weight
    if rows is not None:
        picked = picked.index_select(out_dim, rows)
        bias = None if bias is None else bias.index_select(0, rows)
    if columns is not None:
        picked = picked.index_select(1 - out_dim, columns)
        x = x.index_select(-1, columns)
    y = linear(x, picked if out_dim == 0 else picked.t(), bias)
    if rows is None:
        return y
    return y.new_zeros((*y.shape[:-1], weight.shape[out_dim])).index_copy_(-1, rows, y)


def at_item(index: Tensor | None, b: int) -> Tensor | None:
    """The list of one item, where each has its own."""
    return index if index is None or index.dim() == 1 else index[b]


def _gather_experts(
    x: Tensor,
    weight: Tensor,
    expert: Tensor,
    full: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    out_dim: int,
) -> Tensor:
    whole = full.tolist()
    y = [
        gather_from(
            x[s],
            weight[e],
            None,
            None if rows is None or whole[e] else rows[e],
            None if columns is None or whole[e] else columns[s],
            out_dim,
        )
        for s, e in enumerate(expert.tolist())
    ]
    return torch.stack(y) if y else x.new_zeros((0, weight.shape[1 + out_dim]))


torch.library.impl("popc::gather_linear", "CompositeExplicitAutograd", gather_from)
torch.library.impl("popc::gather_linear_reference", "CompositeExplicitAutograd", gather_from)
torch.library.impl("popc::gather_experts", "CompositeExplicitAutograd", _gather_experts)


@torch.library.register_fake("popc::gather_linear")
def _gather_linear_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    out_dim: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[out_dim]))


@torch.library.register_fake("popc::gather_experts")
def _gather_experts_fake(
    x: Tensor,
    weight: Tensor,
    expert: Tensor,
    full: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    out_dim: int,
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1 + out_dim]))

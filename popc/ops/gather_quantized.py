"""Gathers on quantised weights, stored in planes of nibbles: no more is dequantised than is read.

- ``popc::gather_quantized(x, packed, scale, zero, bias, rows, columns, outputs, row_dim, planes)``:
  ``popc::gather_linear`` on a weight ``[N, K]`` in planes; N is ``outputs``.
- ``popc::quantized_experts(x, packed, scale, zero, expert, full, rows, columns, outputs, row_dim,
  planes)``: ``popc::gather_experts`` on a stack of weights ``[E, N, K]``, ``packed [E, R, bytes]``.
  Of the planes no more is read than those of experts that a row of x is routed to. ``full`` may be
  None where there are no lists.
- ``popc::graded_experts(x, packed, scale, zero, expert, norm, low_norm, threshold, outputs,
  planes)``: as ``popc::graded_linears``, a linear for each row of ``x [S, K]``: that of its expert,
  ``expert[s]``. ``norm`` and ``low_norm`` are float32 ``[E · K]``, expert after expert. There are
  no centers, and one threshold for all. ``packed [E, K, bytes]``.
- ``popc::count_expert_grades(x, expert, norm, low_norm, threshold) -> int64 [2]``: how many
  channels' high and low planes a row of x reads, on average.

``packed``, ``scale`` and ``zero`` are as in :mod:`popc.ops.planes`, lists as in
:mod:`popc.ops.gather`, thresholds and their scales as in :mod:`popc.ops.quantized`.

The implementations here are plain ATen and serve every device; they are the reference for kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from popc.ops import planes as fmt
from popc.ops.gather import at_item, gather_from
from popc.ops.quantized import count_grades, graded_linears

_STRIDES = (torch.Tag.needs_fixed_stride_order,)
_WEIGHT = "Tensor packed, Tensor? scale, Tensor? zero"
_LISTS = "Tensor? rows, Tensor? columns"
_SCHEMAS = {
    "gather_quantized": (
        f"(Tensor x, {_WEIGHT}, Tensor? bias, {_LISTS}, int outputs, int row_dim, int planes)"
        " -> Tensor"
    ),
    "quantized_experts": (
        f"(Tensor x, {_WEIGHT}, Tensor expert, Tensor? full, {_LISTS}, int outputs, int row_dim,"
        " int planes) -> Tensor"
    ),
    "graded_experts": (
        f"(Tensor x, {_WEIGHT}, Tensor expert, Tensor norm, Tensor low_norm, Tensor threshold,"
        " int outputs, int planes) -> Tensor"
    ),
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"popc::{_name}", _schema, tags=_STRIDES)
    # The reference by a name of its own, for kernels that leave a case to it.
    torch.library.define(f"popc::{_name}_reference", _schema)
torch.library.define(
    "popc::count_expert_grades",
    "(Tensor x, Tensor expert, Tensor norm, Tensor low_norm, Tensor threshold) -> Tensor",
)

gather_quantized = torch.ops.popc.gather_quantized.default
quantized_experts = torch.ops.popc.quantized_experts.default
graded_experts = torch.ops.popc.graded_experts.default
count_expert_grades = torch.ops.popc.count_expert_grades.default


def _gather_quantized(
    x: Tensor,
    packed: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    bias: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    outputs: int,
    row_dim: int,
    planes: int,
) -> Tensor:
    stored = outputs, row_dim, planes
    if any(index is not None and index.dim() == 2 for index in (rows, columns)):
        if not x.shape[0]:
            return x.new_zeros(*x.shape[:-1], outputs)
        each = [(at_item(rows, b), at_item(columns, b)) for b in range(x.shape[0])]
        whole = packed, scale, zero, bias
        return torch.stack(
            [_gather_quantized(x[b], *whole, *lists, *stored) for b, lists in enumerate(each)]
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    bias = None if bias is None else bias.to(wide)
    read, listed = x.to(wide), columns if row_dim == 1 else rows
    inputs = x.shape[-1]
    if listed is not None:
        scale, zero = (_listed(value, listed, inputs, row_dim) for value in (scale, zero))
        packed = packed.index_select(0, listed)
    if row_dim == 1:
        if columns is not None:
            read, inputs = read.index_select(-1, columns), len(columns)
        weight = fmt.unpack(packed, scale, zero, (outputs, inputs), 1, planes, wide)
        return gather_from(read, weight, bias, rows, None, 0).to(x.dtype)
    length = outputs if rows is None else len(rows)
    if rows is not None and bias is not None:
        bias = bias.index_select(0, rows)
    weight = fmt.unpack(packed, scale, zero, (length, inputs), 0, planes, wide)
    y = gather_from(read, weight, bias, None, columns, 0).to(x.dtype)
    if rows is None:
        return y
    return y.new_zeros((*y.shape[:-1], outputs)).index_copy_(-1, rows, y)


def _listed(value: Tensor | None, listed: Tensor, inputs: int, row_dim: int) -> Tensor | None:
    """Scales or zeros ``[G, N]`` of the rows that a list names."""
    if value is None:
        return None
    if row_dim == 0:
        return value.index_select(1, listed)
    return fmt.for_inputs(value, inputs).index_select(0, listed)


def _by_expert(expert: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each expert that has rows, and which those are, int64 ``[n]``."""
    order = expert.argsort(stable=True)
    experts, counts = expert.unique(return_counts=True)
    yield from zip(experts.tolist(), order.split(counts.tolist()), strict=True)


def _quantized_experts(
    x: Tensor,
    packed: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    expert: Tensor,
    full: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    outputs: int,
    row_dim: int,
    planes: int,
) -> Tensor:
    y = x.new_zeros((x.shape[0], outputs))
    whole = [True] * len(packed) if full is None else full.tolist()
    for e, chosen in _by_expert(expert):
        listed_rows = None if rows is None or whole[e] else rows[e]
        listed_columns = None if columns is None or whole[e] else columns[chosen]
        scales, zeros = (None if part is None else part[e] for part in (scale, zero))
        lists = listed_rows, listed_columns
        of_expert = _gather_quantized(
            x[chosen], packed[e], scales, zeros, None, *lists, outputs, row_dim, planes
        )
        y.index_copy_(0, chosen, of_expert)
    return y


def _graded_experts(
    x: Tensor,
    packed: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    expert: Tensor,
    norm: Tensor,
    low_norm: Tensor,
    threshold: Tensor,
    outputs: int,
    planes: int,
) -> Tensor:
    y = x.new_zeros((x.shape[0], outputs))
    _check_limit(threshold)
    norms, low_norms = (_of_experts(part, x.shape[1], len(packed)) for part in (norm, low_norm))
    for e, chosen in _by_expert(expert):
        weight = [[None if part is None else part[e]] for part in (packed, scale, zero)]
        shared = norms[e], low_norms[e], threshold
        of_expert = graded_linears(x[chosen], *weight, [outputs], [planes], [None], *shared)
        y.index_copy_(0, chosen, of_expert.view(-1, outputs))
    return y


def _check_limit(threshold: Tensor) -> None:
    if threshold.numel() != 1:
        raise ValueError(f"experts take one threshold for all rows, not {threshold.numel()}")


def _of_experts(scales: Tensor, inputs: int, experts: int) -> Tensor:
    """Scales ``[E · K]`` as ``[E, K]``."""
    if tuple(scales.shape) != (experts * inputs,):
        raise ValueError(f"scales {tuple(scales.shape)} of {experts} experts with {inputs} inputs")
    return scales.view(experts, inputs)


def _count_expert_grades(
    x: Tensor, expert: Tensor, norm: Tensor, low_norm: Tensor, threshold: Tensor
) -> Tensor:
    total = torch.zeros(2, dtype=torch.int64, device=x.device)
    _check_limit(threshold)
    width = x.shape[1]
    experts = norm.numel() // max(1, width)
    norms, low_norms = (_of_experts(part, width, experts) for part in (norm, low_norm))
    for row, e in zip(x.split(1), expert.tolist(), strict=True):
        total += count_grades(row, norms[e], low_norms[e], threshold)
    return torch.round(total / max(1, len(x))).long()


def _impl(name: str, function: Any) -> None:
    torch.library.impl(f"popc::{name}", "CompositeExplicitAutograd", function)


for _name, _function in {
    "gather_quantized": _gather_quantized,
    "quantized_experts": _quantized_experts,
    "graded_experts": _graded_experts,
}.items():
    _impl(_name, _function)
    _impl(f"{_name}_reference", _function)
_impl("count_expert_grades", _count_expert_grades)


@torch.library.register_fake("popc::gather_quantized")
def _gather_quantized_fake(
    x: Tensor,
    packed: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    bias: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    outputs: int,
    *others: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


@torch.library.register_fake("popc::quantized_experts")
def _quantized_experts_fake(
    x: Tensor,
    packed: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    expert: Tensor,
    full: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    outputs: int,
    *others: int,
) -> Tensor:
    return x.new_empty((x.shape[0], outputs))


@torch.library.register_fake("popc::graded_experts")
def _graded_experts_fake(
    x: Tensor,
    packed: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    expert: Tensor,
    norm: Tensor,
    low_norm: Tensor,
    threshold: Tensor,
    outputs: int,
    *others: int,
    **named: int,
) -> Tensor:
    return x.new_empty((x.shape[0], outputs))


@torch.library.register_fake("popc::count_expert_grades")
def _count_expert_grades_fake(x: Tensor, *others: Any, **named: Any) -> Tensor:
    return x.new_empty(2, dtype=torch.int64)

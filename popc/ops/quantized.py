"""Linears on quantised weights, stored in planes of nibbles; the format is that of popc.ops.planes.

- ``popc::quantize(w, row_dim, planes) -> packed``
- ``popc::dequantize(packed, scale, zero, sizes, row_dim, planes, dtype, bits) -> w``: ``bits=4``
  reads the high plane alone. Rows are contiguous in what it returns.
- ``popc::quantized_linear(x, packed, scale, zero, bias, outputs, row_dim, planes)``:
  ``x [..., K] -> [..., N]``, all planes of all rows.
- ``popc::graded_linears(x, packed, scales, zeros, outputs, planes, biases, norm, low_norm,
  threshold, center, base) -> [T · ΣN]``: linears that share x and are stored channel-major. Of
  channel c a token reads nothing, the high plane or both: the high plane where ``|x_c - center_c| ·
  norm_c > threshold``, and where that holds and ``|x_c - center_c| · low_norm_c > threshold``, the
  low plane too. A NaN counts as read. What is not read counts as its center. Else as
  ``popc::threshold_linears``; ``norm`` and ``low_norm`` are float32 ``[K]``. A weight of one plane
  has no low one. Each token has grades of its own.
- ``popc::count_grades(x, norm, low_norm, threshold, center) -> int64 [2]``: how many channels' high
  and low planes are read for at least one token.

The implementations here are plain ATen and serve every device; they are the reference for kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from popc.ops import planes as fmt
from popc.ops.threshold import centered_by, check_parts, is_counted, join_outputs, to_rows

_WEIGHT = "Tensor packed, Tensor? scale, Tensor? zero"
_STRIDES = (torch.Tag.needs_fixed_stride_order,)
torch.library.define("popc::quantize", "(Tensor w, int row_dim, int planes) -> Tensor")
_DEQUANTIZE = (
    f"({_WEIGHT}, SymInt[] sizes, int row_dim, int planes, ScalarType dtype, int bits=8) -> Tensor"
)
torch.library.define("popc::dequantize", _DEQUANTIZE, tags=_STRIDES)
_LINEAR = f"(Tensor x, {_WEIGHT}, Tensor? bias, int outputs, int row_dim, int planes) -> Tensor"
torch.library.define("popc::quantized_linear", _LINEAR, tags=_STRIDES)
_GRADED = (
    "(Tensor x, Tensor[] packed, Tensor?[] scales, Tensor?[] zeros, int[] outputs, int[] planes, "
    "Tensor?[] biases, Tensor norm, Tensor low_norm, Tensor threshold, Tensor? center=None, "
    "Tensor? base=None) -> Tensor"
)
torch.library.define("popc::graded_linears", _GRADED, tags=_STRIDES)
# The same in plain ATen, for kernels that fall back on it.
torch.library.define("popc::dequantize_reference", _DEQUANTIZE)
torch.library.define("popc::quantized_linear_reference", _LINEAR)
torch.library.define("popc::graded_linears_reference", _GRADED)
torch.library.define(
    "popc::count_grades",
    "(Tensor x, Tensor norm, Tensor low_norm, Tensor threshold, Tensor? center=None) -> Tensor",
)

quantize = torch.ops.popc.quantize.default
dequantize = torch.ops.popc.dequantize.default
quantized_linear = torch.ops.popc.quantized_linear.default
graded_linears = torch.ops.popc.graded_linears.default
count_grades = torch.ops.popc.count_grades.default


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _quantized_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    bias: Tensor | None,
    outputs: int,
    row_dim: int,
    planes: int,
) -> Tensor:
    sizes = (outputs, x.shape[-1])
    weight = fmt.unpack(packed, scale, zero, sizes, row_dim, planes, _wide(x.dtype))
    y = linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
    return y.to(x.dtype)


def _graded_linears(
    x: Tensor,
    packed: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    zeros: Sequence[Tensor | None],
    outputs: Sequence[int],
    planes: Sequence[int],
    biases: Sequence[Tensor | None],
    norm: Tensor,
    low_norm: Tensor,
    threshold: Tensor,
    center: Tensor | None = None,
    base: Tensor | None = None,
) -> Tensor:
    lengths = list(map(len, (packed, scales, zeros, outputs, planes, biases)))
    if not all(lengths) or len(set(lengths)) > 1:
        raise ValueError(f"popc::graded_linears: lists of {lengths} do not go together")
    check_parts(x, [norm, low_norm], threshold, center, sum(outputs), base)
    rows, high, low = _grades(x, norm, low_norm, threshold, center)
    bases = [None] * len(outputs) if base is None else base.split(list(outputs), 1)
    results = []
    weights = zip(packed, scales, zeros, outputs, planes, biases, bases, strict=True)
    for plane_rows, scale, zero, size, count, bias, part in weights:
        shape = (size, x.shape[-1])
        both = fmt.unpack(plane_rows, scale, zero, shape, 1, count, rows.dtype)
        if count == 1:
            y = linear(torch.where(high, rows, 0.0), both)
        else:
            coarse = fmt.unpack(plane_rows, scale, zero, shape, 1, count, rows.dtype, bits=4)
            y = linear(torch.where(high & low, rows, 0.0), both)
            y = y + linear(torch.where(high & ~low, rows, 0.0), coarse)
        if bias is not None:
            y = y + bias
        if part is not None:
            y = y + to_rows(part, y)
        results.append(y.to(x.dtype))
    return join_outputs(results)


def _grades(
    x: Tensor, norm: Tensor, low_norm: Tensor, threshold: Tensor, center: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """x less its center, and which of its channels' high and low planes are read, by token."""
    rows = centered_by(x.to(_wide(x.dtype)), center)
    return rows, is_counted(rows, norm, threshold), is_counted(rows, low_norm, threshold)


def _count_grades(
    x: Tensor, norm: Tensor, low_norm: Tensor, threshold: Tensor, center: Tensor | None = None
) -> Tensor:
    check_parts(x, [norm, low_norm], threshold, center)
    _, high, low = _grades(x, norm, low_norm, threshold, center)
    return torch.stack([read.flatten(0, -2).any(0).sum() for read in (high, high & low)])


def _impl(name: str, function: Any) -> None:
    torch.library.impl(f"popc::{name}", "CompositeExplicitAutograd", function)


_impl("quantize", fmt.pack)
for _suffix in ("", "_reference"):
    _impl(f"dequantize{_suffix}", fmt.unpack)
    _impl(f"quantized_linear{_suffix}", _quantized_linear)
    _impl(f"graded_linears{_suffix}", _graded_linears)
_impl("count_grades", _count_grades)


@torch.library.register_fake("popc::quantize")
def _quantize_fake(w: Tensor, row_dim: int, planes: int) -> Tensor:
    *lead, outputs, inputs = w.shape
    rows, length = (inputs, outputs) if row_dim == 1 else (outputs, inputs)
    return w.new_empty((*lead, rows, fmt.row_bytes(length, planes)), dtype=torch.uint8)


@torch.library.register_fake("popc::dequantize")
def _dequantize_fake(
    packed: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    sizes: Sequence[int],
    row_dim: int,
    planes: int,
    dtype: torch.dtype,
    bits: int = 8,
) -> Tensor:
    *lead, outputs, inputs = sizes
    if row_dim == 1:
        return packed.new_empty((*lead, inputs, outputs), dtype=dtype).mT
    return packed.new_empty((*lead, outputs, inputs), dtype=dtype)


@torch.library.register_fake("popc::quantized_linear")
def _quantized_linear_fake(
    x: Tensor,
    packed: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    bias: Tensor | None,
    outputs: int,
    row_dim: int,
    planes: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


@torch.library.register_fake("popc::graded_linears")
def _graded_linears_fake(
    x: Tensor,
    packed: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    zeros: Sequence[Tensor | None],
    outputs: Sequence[int],
    *others: Any,
    **named: Any,
) -> Tensor:
    return x.new_empty(prod(x.shape[:-1]) * sum(outputs))


@torch.library.register_fake("popc::count_grades")
def _count_grades_fake(x: Tensor, *others: Any, **named: Any) -> Tensor:
    return x.new_empty(2, dtype=torch.int64)

"""Linears on quantised weights on CUDA, in Triton; popc.ops.quantized says what they compute.

``popc::triton_graded_linear`` is ``popc::graded_linears`` of one linear, with single tensors for
lists, and gives ``[..., N]``. ``popc::triton_quantized_linear`` has the arguments and answers of
``popc::quantized_linear``; for more than :data:`MOST_TOKENS` it dequantises the weight and leaves
the product to ATen. As with the ops of :mod:`popc.ops.triton_gather`, Inductor sees through them,
nothing waits for the device, no shape depends on data, and sums are in a fixed order.

With a single token factors are float32. With more, the values of weights (each plane's apart, where
they are read by grade) and x less its center are rounded to the dtype of x, for tensor cores.

None of this has been run on a GPU.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from popc.ops import planes as fmt
from popc.ops.threshold import check_parts
from popc.ops.triton_gather import BLOCK_M, DTYPES, available

# More are worth writing the weight's values for, once.
MOST_TOKENS = 16
ALL = 1 << 30  # inputs that share scales where all do: a multiple of every block
_PROGRAMS = 512
_MIN_BLOCK_N = 128
VALUES_BLOCK = {"BLOCK_R": 8, "BLOCK_V": 256}  # of a weight, which a program dequantises


def serves(x: Tensor, packed: Tensor) -> bool:
    """Whether the Triton ops can take the place of popc's for these tensors, real or fake."""
    return (
        available()
        and x.device.type == packed.device.type == "cuda"
        and packed.dtype == torch.uint8
        and packed.dim() == 2
        and x.dtype in DTYPES
    )


def launch_graded(
    kernel: Any,
    x: Tensor,
    packed: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    outputs: int,
    planes: int,
    bias: Tensor | None,
    norm: Tensor,
    low_norm: Tensor,
    threshold: Tensor,
    center: Tensor | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """``triton_graded_linear`` by a kernel that the caller has made ready to launch."""
    check_parts(x, [norm, low_norm], threshold, center, outputs, base)
    grades = norm, low_norm, threshold.reshape(-1), center, base
    return _launch_by_input(kernel, x, packed, scale, zero, outputs, planes, bias, *grades)


def launch_quantized(
    input_kernel: Any,
    output_kernel: Any,
    values_kernel: Any,
    x: Tensor,
    packed: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    bias: Tensor | None,
    outputs: int,
    row_dim: int,
    planes: int,
) -> Tensor:
    """``triton_quantized_linear`` by kernels that the caller has made ready to launch."""
    if not _is_decode(x):
        sizes = outputs, x.shape[-1]
        weight = launch_values(values_kernel, packed, scale, zero, sizes, row_dim, planes, x.dtype)
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    if row_dim == 1:
        return _launch_by_input(input_kernel, x, packed, scale, zero, outputs, planes, bias)
    rows = _token_rows(x)
    tokens, inputs = rows.shape
    packed, unit = _aligned(packed, scale, zero, (outputs, inputs), row_dim, planes, bias)
    y = x.new_empty((tokens, outputs))
    if tokens > 0:
        block = 1 if tokens == 1 else BLOCK_M
        output_kernel[lambda meta: (_cdiv(outputs, meta["BLOCK_N"]), _cdiv(tokens, block))](
            *(rows, packed, _dense(scale), _dense(zero), _dense(bias), y),
            *(tokens, inputs, outputs, rows.stride(0), packed.stride(0) // unit),
            **_format(scale, zero, inputs, planes, unit),
            BLOCK_M=block,
        )
    return y.view(*x.shape[:-1], outputs)


def launch_values(
    kernel: Any,
    packed: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    sizes: tuple[int, int],
    row_dim: int,
    planes: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight of these ``sizes``, ``[N, K]``, by a kernel that is ready to launch."""
    outputs, inputs = sizes
    rows, length = (inputs, outputs) if row_dim == 1 else (outputs, inputs)
    packed, unit = _aligned(packed, scale, zero, sizes, row_dim, planes)
    y = packed.new_empty((rows, length), dtype=dtype)
    grid = _cdiv(rows, VALUES_BLOCK["BLOCK_R"]), _cdiv(length, VALUES_BLOCK["BLOCK_V"])
    kernel[grid](
        *(packed, _dense(scale), _dense(zero), y, rows, inputs, outputs, packed.stride(0) // unit),
        **_format(scale, zero, inputs, planes, unit),
        BY_INPUT=row_dim == 1,
        **VALUES_BLOCK,
    )
    return y.t() if row_dim == 1 else y


def _launch_by_input(
    kernel: Any,
    x: Tensor,
    packed: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    outputs: int,
    planes: int,
    bias: Tensor | None,
    norm: Tensor | None = None,
    low_norm: Tensor | None = None,
    threshold: Tensor | None = None,
    center: Tensor | None = None,
    base: Tensor | None = None,
) -> Tensor:
    rows = _token_rows(x)
    tokens, inputs = rows.shape
    packed, unit = _aligned(packed, scale, zero, (outputs, inputs), 1, planes, bias)
    splits = _splits(outputs, inputs, tokens)
    y = x.new_empty((splits, tokens, outputs), dtype=x.dtype if splits == 1 else torch.float32)
    if tokens > 0:
        block = 1 if tokens == 1 else BLOCK_M
        parts = [None if part is None else _dense_rows(part) for part in (threshold, center, base)]
        kernel[lambda meta: (_cdiv(outputs, meta["BLOCK_N"]), splits * _cdiv(tokens, block))](
            *(rows, packed, _dense(scale), _dense(zero), _dense(bias)),
            *(_dense(norm), _dense(low_norm), *parts, y),
            *(tokens, inputs, outputs, prod(x.shape[1:-1]), rows.stride(0)),
            packed.stride(0) // unit,
            *(_sequence_stride(part) for part in parts),
            **_format(scale, zero, inputs, planes, unit),
            SPLITS=splits,
            BLOCK_M=block,
        )
    y = y.squeeze(0) if splits == 1 else y.sum(0).to(x.dtype)
    return y.view(*x.shape[:-1], outputs)


def _is_decode(x: Tensor) -> bool:
    """Whether ``x [..., K]`` has few tokens; of a batch without a known size, each sequence."""
    tokens: Any = prod(x.shape[:-1])
    if not isinstance(tokens, int):
        tokens = x.shape[-2] if x.dim() > 2 else None
    return isinstance(tokens, int) and tokens <= MOST_TOKENS


def _splits(outputs: int, inputs: int, tokens: int) -> int:
    """In how many parts to sum over ``inputs``; see :mod:`popc.ops.triton_gather`.

    What is read is a quarter to a half of what 16 bits would be, so parts are twice as long.
    """
    shortest = 128 if tokens == 1 else 1024
    wanted = _cdiv(_PROGRAMS, _cdiv(outputs, _MIN_BLOCK_N))
    return int(max(1, min(wanted, inputs // shortest)))


def _format(
    scale: Tensor | None, zero: Tensor | None, inputs: int, planes: int, unit: int
) -> dict[str, Any]:
    """The constants of a weight's format."""
    groups = 1 if scale is None else scale.shape[0]
    offset = (fmt.ZERO if scale is None else fmt.GROUP_ZERO)[planes]
    group = ALL if groups == 1 else _cdiv(inputs, groups)
    return {"GROUP": group, "PLANES": planes, "ZERO": offset, "UNIT": unit}


def _aligned(
    packed: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    sizes: tuple[int, int],
    row_dim: int,
    planes: int,
    bias: Tensor | None = None,
) -> tuple[Tensor, int]:
    """The rows of a weight ``[N, K]``, and the bytes to which the parts of each are aligned.

    Raises:
        ValueError: they, or what goes with them, are not those of such a weight.
    """
    outputs, inputs = sizes
    length = sizes[1 - row_dim]
    expected = sizes[row_dim], fmt.row_bytes(length, planes, scale is None)
    if tuple(packed.shape) != expected:
        raise ValueError(f"rows {tuple(packed.shape)}: for a weight {sizes} they are {expected}")
    if scale is not None and (scale.shape[1] != outputs or not 1 <= scale.shape[0] <= inputs):
        raise ValueError(f"scale {tuple(scale.shape)} for a weight {sizes}")
    if zero is not None and (scale is None or zero.shape != scale.shape):
        raise ValueError(f"zero {tuple(zero.shape)} is not like scale")
    if bias is not None and tuple(bias.shape) != (outputs,):
        raise ValueError(f"bias {tuple(bias.shape)} for a weight {sizes}")
    head = fmt.SCALE_BYTES * fmt.blocks_of(length) if scale is None else 0
    starts = packed.stride(0), packed.storage_offset(), head
    if packed.stride(1) != 1 or any(start % 2 for start in starts):
        packed = packed.clone(memory_format=torch.contiguous_format)
        starts = packed.stride(0), 0, head
    return packed, next(unit for unit in (16, 8, 4, 2) if not any(n % unit for n in starts))


def _token_rows(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _dense(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def _dense_rows(values: Tensor) -> Tensor:
    """Values by sequence: a row of each is contiguous, or they are ``[S]``."""
    return values if values.dim() == 1 or values.stride(1) == 1 else values.contiguous()


def _sequence_stride(values: Tensor | None) -> Any:
    return 0 if values is None or values.shape[0] == 1 else values.stride(0)


def _cdiv(a: Any, b: Any) -> Any:
    return (a + b - 1) // b


if available():
    from popc.ops.triton_plane_kernels import by_input, by_output, values_kernel

    @triton_op("popc::triton_graded_linear", mutates_args=())
    def triton_graded_linear(
        x: Tensor,
        packed: Tensor,
        scale: Tensor | None,
        zero: Tensor | None,
        outputs: int,
        planes: int,
        bias: Tensor | None,
        norm: Tensor,
        low_norm: Tensor,
        threshold: Tensor,
        center: Tensor | None = None,
        base: Tensor | None = None,
    ) -> Tensor:
        """``popc::graded_linears`` of one linear in Triton."""
        return launch_graded(
            wrap_triton(by_input),
            x,
            packed,
            scale,
            zero,
            outputs,
            planes,
            bias,
            norm,
            low_norm,
            threshold,
            center,
            base,
        )

    @triton_op("popc::triton_quantized_linear", mutates_args=())
    def triton_quantized_linear(
        x: Tensor,
        packed: Tensor,
        scale: Tensor | None,
        zero: Tensor | None,
        bias: Tensor | None,
        outputs: int,
        row_dim: int,
        planes: int,
    ) -> Tensor:
        """``popc::quantized_linear`` in Triton."""
        return launch_quantized(
            wrap_triton(by_input),
            wrap_triton(by_output),
            wrap_triton(values_kernel),
            x,
            packed,
            scale,
            zero,
            bias,
            outputs,
            row_dim,
            planes,
        )

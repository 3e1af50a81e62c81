"""The gather ops on CUDA, in Triton; ``popc.ops.gather`` and ``.threshold`` say what they compute.

``popc::triton_gather_linear``, ``popc::triton_gather_experts``, ``popc::triton_threshold_linear``
have the arguments and answers of the ops without ``triton_`` in their names. Inductor sees through
them, down to the kernel and the ATen ops around it. Nothing waits for the device and no shape
depends on data, so CUDA graphs take them. Sums are in float32 and in a fixed order: where the
contraction is split, partial sums ``[SPLITS, ...]`` are added by ATen, not by atomics.

``popc::select_units`` needs no kernel: its ATen ops have fixed shapes and never wait either.

None of this has been measured on a GPU. In particular it has not been compared there with what
Inductor makes of ``(x * W[rows]).sum(-1)``, which it can fuse into one kernel too.
"""

from __future__ import annotations

import functools
import importlib.util
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from popc.ops.threshold import check_parts

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Tokens that meet a tile of the weight at once; tensor cores take no fewer.
BLOCK_M = 16
# Programs that keep the largest GPUs busy: a few for each of their 132 multiprocessors.
_PROGRAMS = 512
_MIN_BLOCK_N = 64


@functools.cache
def available() -> bool:
    """Whether Triton is installed, and with it the ops of this module."""
    return importlib.util.find_spec("triton") is not None


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether the Triton ops can take the place of popc's for these tensors, real or fake."""
    return (
        available()
        and x.device.type == weight.device.type == "cuda"
        and x.dtype == weight.dtype
        and x.dtype in DTYPES
    )


def _splits(outputs: int, inputs: int, tokens: int) -> int:
    """In how many parts to cut a contraction of ``inputs``, from sizes that are known beforehand.

    Each part must be long enough that what it writes, 4 bytes for each output and token, is little
    beside what it reads. Groups are not counted: their number may be symbolic.
    """
    wanted = _cdiv(_PROGRAMS, _cdiv(outputs, _MIN_BLOCK_N))
    shortest = 64 if tokens == 1 else 512
    return max(1, min(wanted, inputs // shortest))


def _cdiv(a: Any, b: Any) -> Any:
    return (a + b - 1) // b


def _contiguous(index: Tensor | None) -> Tensor | None:
    """A list as the kernel takes it: contiguous along its last dim."""
    return index if index is None or index.stride(-1) == 1 else index.contiguous()


def _group_stride(values: Tensor | None) -> Any:
    """The stride from one group's row to the next: 0 where all share one."""
    shared = values is None or values.dim() == 1 or values.shape[0] == 1
    return 0 if shared else values.stride(0)  # type: ignore[union-attr]


def launch_linear(
    rows_kernel: Any,
    columns_kernel: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    out_dim: int,
) -> Tensor:
    """``gather_linear`` by two kernels that the caller has made ready to launch."""
    batched = any(index is not None and index.dim() == 2 for index in (rows, columns))
    lead = (x.shape[0], prod(x.shape[1:-1])) if batched else (1, prod(x.shape[:-1]))
    y = _launch(
        rows_kernel,
        columns_kernel,
        x.reshape(*lead, x.shape[-1]),
        weight.unsqueeze(0),
        bias,
        None,
        None,
        rows,
        columns,
        out_dim,
    )
    return y.view(*x.shape[:-1], weight.shape[out_dim])


def launch_threshold(
    rows_kernel: Any,
    columns_kernel: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor,
    threshold: Tensor,
    out_dim: int,
    center: Tensor | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """``threshold_linear`` by two kernels that the caller has made ready to launch."""
    check_parts(x, [norm], threshold, center, weight.shape[out_dim], base)
    batched = threshold.numel() > 1 or any(v is not None and v.shape[0] > 1 for v in (center, base))
    lead = (x.shape[0], prod(x.shape[1:-1])) if batched else (1, prod(x.shape[:-1]))
    y = _launch(
        rows_kernel,
        columns_kernel,
        x.reshape(*lead, x.shape[-1]),
        weight.unsqueeze(0),
        bias,
        None,
        None,
        None,
        None,
        out_dim,
        norm,
        threshold.reshape(-1),
        center,
        base,
    )
    return y.view(*x.shape[:-1], weight.shape[out_dim])


def launch_experts(
    rows_kernel: Any,
    columns_kernel: Any,
    x: Tensor,
    weight: Tensor,
    expert: Tensor,
    full: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    out_dim: int,
) -> Tensor:
    """``gather_experts`` by two kernels that the caller has made ready to launch."""
    return _launch(
        rows_kernel,
        columns_kernel,
        x.unsqueeze(1),
        weight,
        None,
        expert,
        full,
        rows,
        columns,
        out_dim,
    ).squeeze(1)


def _launch(
    rows_kernel: Any,
    columns_kernel: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    expert: Tensor | None,
    full: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    out_dim: int,
    norm: Tensor | None = None,
    threshold: Tensor | None = None,
    center: Tensor | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """``x [groups, tokens, K]`` and ``weight [experts, ...]`` give ``[groups, tokens, N]``."""
    bias, expert, full, rows, columns = map(_contiguous, (bias, expert, full, rows, columns))
    norm, threshold, center, base = map(_contiguous, (norm, threshold, center, base))
    groups, tokens, inputs = x.shape
    outputs = weight.shape[1 + out_dim]
    by_output, by_input = weight.stride(1 + out_dim), weight.stride(2 - out_dim)
    listed_rows = outputs if rows is None else rows.shape[-1]
    listed_columns = inputs if columns is None else columns.shape[-1]
    # An expert that is used in full has as many outputs as its weight.
    rows_max = outputs if expert is not None else listed_rows
    if groups == 0 or tokens == 0 or rows_max == 0:
        return x.new_zeros((groups, tokens, outputs))
    along_k = by_input <= by_output
    columns_max = inputs if expert is not None else listed_columns
    splits = 1 if along_k else _splits(rows_max, columns_max, tokens)
    # Outputs in no list are written by no program.
    allocate = x.new_empty if rows is None else x.new_zeros
    shape = (splits, groups, tokens, outputs)
    y = allocate(shape) if splits == 1 else allocate(shape, dtype=torch.float32)
    block = 1 if tokens == 1 else BLOCK_M
    kernel = rows_kernel if along_k else columns_kernel
    kernel[lambda meta: (_cdiv(rows_max, meta["BLOCK_N"]), splits * _cdiv(tokens, block), groups)](
        *(x, weight, bias, rows, columns, expert, full, norm, threshold, center, base, y),
        *(tokens, outputs, inputs, listed_rows, listed_columns),
        *x.stride(),
        *(weight.stride(0), by_output, by_input),
        _group_stride(rows),
        _group_stride(columns),
        0 if threshold is None or threshold.numel() == 1 else 1,
        _group_stride(center),
        _group_stride(base),
        *y.stride()[:3],
        SPLITS=splits,
        BLOCK_M=block,
    )
    return y.squeeze(0) if splits == 1 else y.sum(0).to(x.dtype)


if available():
    from popc.ops.triton_kernels import gather_columns, gather_rows

    @triton_op("popc::triton_gather_linear", mutates_args=())
    def triton_gather_linear(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        columns: Tensor | None,
        out_dim: int,
    ) -> Tensor:
        """``popc::gather_linear`` in Triton."""
        return launch_linear(
            wrap_triton(gather_rows),
            wrap_triton(gather_columns),
            x,
            weight,
            bias,
            rows,
            columns,
            out_dim,
        )

    @triton_op("popc::triton_threshold_linear", mutates_args=())
    def triton_threshold_linear(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm: Tensor,
        threshold: Tensor,
        out_dim: int,
        center: Tensor | None = None,
        base: Tensor | None = None,
    ) -> Tensor:
        """``popc::threshold_linear`` in Triton."""
        return launch_threshold(
            wrap_triton(gather_rows),
            wrap_triton(gather_columns),
            x,
            weight,
            bias,
            norm,
            threshold,
            out_dim,
            center,
            base,
        )

    @triton_op("popc::triton_gather_experts", mutates_args=())
    def triton_gather_experts(
        x: Tensor,
        weight: Tensor,
        expert: Tensor,
        full: Tensor,
        rows: Tensor | None,
        columns: Tensor | None,
        out_dim: int,
    ) -> Tensor:
        """``popc::gather_experts`` in Triton."""
        return launch_experts(
            wrap_triton(gather_rows),
            wrap_triton(gather_columns),
            x,
            weight,
            expert,
            full,
            rows,
            columns,
            out_dim,
        )

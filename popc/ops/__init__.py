"""The ops that popc's passes put into a graph; importing this module registers them.

Each has a plain ATen reference, which serves every device; ``popc.ops.native`` brings kernels for
CPUs, ``popc.ops.triton_gather`` and ``popc.ops.triton_planes`` for CUDA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from popc.ops import triton_gather, triton_planes
from popc.ops.attend import attend
from popc.ops.gather import gather_experts, gather_linear
from popc.ops.gather_quantized import (
    count_expert_grades,
    gather_quantized,
    graded_experts,
    quantized_experts,
)
from popc.ops.mask import additive_mask
from popc.ops.measure import centers, measure_inputs, sum_squares
from popc.ops.quantized import (
    count_grades,
    dequantize,
    graded_linears,
    quantize,
    quantized_linear,
)
from popc.ops.select import select_units
from popc.ops.threshold import count_active_channels, threshold_linear, threshold_linears

__all__ = [
    "FLAT_LINEARS",
    "LINEARS",
    "additive_mask",
    "attend",
    "centers",
    "count_active_channels",
    "count_expert_grades",
    "count_grades",
    "dequantize",
    "gather_experts",
    "gather_linear",
    "gather_quantized",
    "graded_experts",
    "graded_linears",
    "measure_inputs",
    "quantize",
    "quantized_experts",
    "quantized_linear",
    "select_kernel",
    "select_units",
    "sum_squares",
    "threshold_linear",
    "threshold_linears",
]


def select_kernel(op: Any, x: Tensor, weight: Tensor) -> Any:
    """One of the products above, as it is best put into a graph for these tensors.

    On CUDA a Triton op, which Inductor sees through; C++ kernels answer to the op's own name. For
    ``graded_linears`` it is an op of one linear, which takes a tensor wherever that takes a list.

    Args:
        weight: as the op takes it: of a quantised one the packed rows.
    """
    module = triton_planes if op in (graded_linears, quantized_linear) else triton_gather
    if not module.serves(x, weight):
        return op
    ops = torch.ops.popc
    return {
        gather_linear: ops.triton_gather_linear,
        gather_experts: ops.triton_gather_experts,
        threshold_linear: ops.triton_threshold_linear,
        graded_linears: ops.triton_graded_linear,
        quantized_linear: ops.triton_quantized_linear,
    }[op].default


_NAMES = (
    *("gather_linear", "gather_experts", "threshold_linear"),
    *("quantized_linear", "triton_graded_linear", "triton_quantized_linear"),
    *("gather_quantized", "quantized_experts", "graded_experts"),
    *("triton_gather_linear", "triton_gather_experts", "triton_threshold_linear"),
)
# What passes put in the place of linears that gives all outputs in one dim, linear after linear.
FLAT_LINEARS: tuple[Any, ...] = (threshold_linears, graded_linears)
# What else they put there; the first argument of each is x.
LINEARS: tuple[Any, ...] = tuple(
    getattr(torch.ops.popc, name).default for name in _NAMES if hasattr(torch.ops.popc, name)
)

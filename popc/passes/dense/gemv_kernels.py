"""GEMV pass: linears that read all of their weight do so by popc's kernel, where ATen is slower.

The same rows are read, so a result differs by the order of sums alone.
"""

from __future__ import annotations

import torch

from popc.analysis.capture import Captured
from popc.analysis.linears import Linear, as_linear
from popc.analysis.propagation import shape
from popc.analysis.tokens import is_one_token
from popc.ops import gather_linear, native
from popc.passes.base import PassResult
from popc.passes.builder import GraphBuilder, finish
from popc.passes.weight_layout import is_contiguous_along
from popc.planning.rewrite_plan import RewritePlan

_FEW = 8  # rows of x that the kernel takes in one reading of the weight
_TYPES = {torch.float32, torch.bfloat16, torch.float16}


def use_gemv_kernels(captured: Captured, work: RewritePlan) -> PassResult:
    """Let plain linears on CPUs run through popc's kernel, those that gain by it.

    In a graph of decode steps alone, where tokens and batch can't be told apart, rows are taken to
    be of one token each.
    """
    count = 0
    for node in list(captured.gm.graph.nodes):
        linear = as_linear(node, captured) if node.op == "call_function" else None
        if linear is None or linear.experts is not None or linear.y_dim != len(shape(node)) - 1:
            continue
        if linear.weight.node.meta["val"].device.type != "cpu":
            continue
        if not _is_input_major(linear) and not _has_few_rows(linear, work.decodes):
            continue
        args = (linear.x, linear.weight.node, linear.bias, None, None, linear.weight.out_dim)
        GraphBuilder(captured, node).change(node, gather_linear, *args)
        count += 1
    if count:
        finish(captured)
    return PassResult(count)


def _is_input_major(linear: Linear) -> bool:
    """Whether the weight is stored by input channel, in 16 bits.

    ATen's products with such a weight are slow on CPUs without instructions for these types: 20
    times slower and more were seen.
    """
    value = linear.weight.node.meta["val"]
    by_output = is_contiguous_along(value, linear.weight.out_dim)
    return (
        value.element_size() == 2
        and not by_output
        and is_contiguous_along(value, linear.weight.in_dim)
    )


def _has_few_rows(linear: Linear, decodes: bool) -> bool:
    """Whether x is of one token for each sequence, and all share one reading of the weight.

    On two cores with AVX-512, ATen's products with one row took 1.3 to 2.3 times as long as the
    kernel, with 4 or 8 rows 1.05 to 4 times. A batch size that is a symbol is taken for a small
    one; the kernel leaves more rows to ATen.
    """
    one = is_one_token(linear.x)
    if not (decodes if one is None else one):
        return False
    types = {n.meta["val"].dtype for n in (linear.x, linear.weight.node, linear.node)}
    if len(types) > 1 or not types <= _TYPES or not native.load():
        return False
    sizes = [size for size in shape(linear.x)[:-1] if isinstance(size, int)]
    return all(size <= _FEW for size in sizes)

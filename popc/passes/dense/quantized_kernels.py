"""Quantised kernels pass: what reads the whole of a quantised weight reads its planes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from popc import ops
from popc.analysis.capture import Captured
from popc.analysis.linears import as_linear
from popc.analysis.propagation import shape
from popc.analysis.rules.traits import Trait, has
from popc.passes.base import PassResult
from popc.passes.builder import GraphBuilder, finish
from popc.planning.rewrite_plan import RewritePlan

aten = torch.ops.aten


def use_quantized_kernels(captured: Captured, work: RewritePlan) -> PassResult:
    """Let linears multiply by planes, and lookups dequantise no more than the rows they pick."""
    count = 0
    if captured.quantized:
        for node in list(captured.gm.graph.nodes):
            if node.op == "call_function" and (
                _change_linear(captured, node) or _change_lookup(captured, node)
            ):
                count += 1
    if count:
        finish(captured)
    return PassResult(count)


def _change_linear(captured: Captured, node: fx.Node) -> bool:
    linear = as_linear(node, captured)
    if linear is None or not linear.weight.is_quantized or linear.experts is not None:
        return False
    if linear.y_dim != len(shape(node)) - 1 or linear.x_dim != len(shape(linear.x)) - 1:
        return False
    packed, scale, zero, sizes, row_dim, planes = linear.weight.node.args[:6]
    operands = (linear.x, packed, scale, zero, linear.bias)
    builder = GraphBuilder(captured, node)
    with captured.gm.graph.inserting_before(node):
        builder.change(node, ops.quantized_linear, *operands, sizes[0], row_dim, planes)  # type: ignore[index]
    return True


def _change_lookup(captured: Captured, node: fx.Node) -> bool:
    """``embedding(dequantize(packed), indices)`` picks rows of planes."""
    if not has(node, Trait.LOOKUP) or node.target is not aten.embedding.default:
        return False
    table, indices = node.args[:2]
    if not isinstance(table, fx.Node) or table.target is not ops.dequantize:
        return False
    packed, scale, zero, sizes, row_dim, planes, dtype = table.args[:7]
    if row_dim != 0:
        return False
    width: Any = sizes[1]  # type: ignore[index]
    builder = GraphBuilder(captured, node)
    with captured.gm.graph.inserting_before(node):
        flat = builder.call(aten.reshape.default, indices, [-1])
        rows = builder.call(aten.index_select.default, packed, 0, flat)
        picked = (
            None if part is None else builder.call(aten.index_select.default, part, 1, flat)
            for part in (scale, zero)
        )
        shaped = [builder.size(flat, 0), width], row_dim, planes, dtype
        values = builder.call(ops.dequantize, rows, *picked, *shaped)
        lead = [builder.size(indices, dim) for dim in range(len(shape(indices)))]  # type: ignore[arg-type]
        builder.change(node, aten.reshape.default, values, [*lead, width])
    return True

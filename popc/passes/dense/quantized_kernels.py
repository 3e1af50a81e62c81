"""Quantised kernels pass: what reads the whole of a quantised weight reads its planes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import fx

from popc import ops
from popc.analysis.capture import Captured
from popc.analysis.linears import as_linear
from popc.analysis.propagation import shape
from popc.analysis.rules.traits import Trait, has
from popc.passes.base import PassResult
from popc.passes.builder import GraphBuilder, finish, replace
from popc.passes.experts import expert_of_rows, flat_input, shaped_output
from popc.planning.rewrite_plan import RewritePlan

aten = torch.ops.aten
_GATHERS = "gather_linear", "triton_gather_linear"
_GATHERS_OF_EXPERTS = "gather_experts", "triton_gather_experts"


def use_quantized_kernels(captured: Captured, work: RewritePlan) -> PassResult:
    """Let linears multiply by planes, and lookups dequantise no more than the rows they pick."""
    changes = _change_linear, _change_experts, _change_gather, _change_lookup
    count = 0
    if captured.quantized:
        for node in list(captured.gm.graph.nodes):
            if node.op == "call_function":
                count += any(change(captured, node) for change in changes)
    if count:
        finish(captured)
    return PassResult(count)


def _change_linear(captured: Captured, node: fx.Node) -> bool:
    linear = as_linear(node, captured)
    if linear is None or not linear.weight.is_quantized or linear.experts is not None:
        return False
    if linear.y_dim != len(shape(node)) - 1 or linear.x_dim != len(shape(linear.x)) - 1:
        return False
    held, shape_of_rows = _stored(linear.weight.node)
    op = ops.select_kernel(ops.quantized_linear, linear.x.meta["val"], held[0].meta["val"])
    builder = GraphBuilder(captured, node)
    with captured.gm.graph.inserting_before(node):
        builder.change(node, op, linear.x, *held, linear.bias, *shape_of_rows)
    return True


def _change_experts(captured: Captured, node: fx.Node) -> bool:
    linear = as_linear(node, captured)
    if linear is None or linear.experts is None or not linear.weight.is_quantized:
        return False
    if not linear.has_flat_rows:
        return False
    held, shape_of_rows = _stored(linear.weight.node)
    builder = GraphBuilder(captured, node)
    with captured.gm.graph.inserting_before(node):
        x, expert = flat_input(builder, linear), expert_of_rows(builder, linear)
        lists = None, None, None
        y = builder.call(ops.quantized_experts, x, *held, expert, *lists, *shape_of_rows)
        replace(node, shaped_output(builder, linear, y))
    return True


def _change_gather(captured: Captured, node: fx.Node) -> bool:
    """What reads lists of channels, as passes before this one have put it into the graph."""
    name = _name_of(node)
    if name not in (*_GATHERS, *_GATHERS_OF_EXPERTS):
        return False
    x, weight, *others, out_dim = node.args
    assert isinstance(weight, fx.Node)
    if weight.target is not ops.dequantize or out_dim != 0:
        return False
    op = ops.gather_quantized if name in _GATHERS else ops.quantized_experts
    held, shape_of_rows = _stored(weight)
    builder = GraphBuilder(captured, node)
    with captured.gm.graph.inserting_before(node):
        builder.change(node, op, x, *held, *others, *shape_of_rows)
    return True


def _name_of(node: fx.Node) -> str:
    """The name of one of popc's ops."""
    return (
        getattr(node.target, "_opname", "")
        if getattr(node.target, "namespace", "") == "popc"
        else ""
    )


def _stored(weight: fx.Node) -> tuple[Sequence[Any], tuple[Any, Any, Any]]:
    """Planes, scales and zeros of what is dequantised; and its outputs, row dim and planes."""
    packed, scale, zero, sizes, row_dim, planes = weight.args[:6]
    *_, outputs, _ = cast(Sequence[Any], sizes)
    return (packed, scale, zero), (outputs, row_dim, planes)


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

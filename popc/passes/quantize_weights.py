"""Quantise pass: the weights of linears, and tables that rows are looked up in, become planes.

It runs before all others, on what was just captured: the model is given quantised weights in the
place of those that it has, and the graph the planes as inputs, each followed by a node that
dequantises it. That node is the weight to the analysis; passes after it read the planes themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from popc import compat, ops
from popc.analysis.capture import Captured
from popc.analysis.input_groups import last_linears, routes
from popc.analysis.linears import Linear, all_linears
from popc.analysis.plan import Skipped
from popc.analysis.provenance import source_of, where
from popc.analysis.regions import find_regions
from popc.analysis.rules.traits import Trait, has
from popc.config import Config
from popc.log import logger
from popc.passes.builder import GraphBuilder, finish
from popc.passes.weight_layout import propagate_strides, use_huge_pages, user_outside
from popc.quant import QuantizedTensor

SMALLEST = 32  # of inputs and outputs: below, scales and the last block cost more than is saved
PLANES = {"int8": 2, "int4": 1}
_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Puts a tensor in the place of a parameter, wherever the model holds it; False if it holds it
# nowhere.
ReplaceParameter = Callable[[Tensor, Tensor], bool]


@dataclass
class _Uses:
    """What reads one parameter: linears, and lookups of rows in it."""

    linears: list[Linear] = field(default_factory=list)
    lookups: list[fx.Node] = field(default_factory=list)


def quantize_weights(
    captured: Captured, config: Config, replace: ReplaceParameter
) -> list[Skipped]:
    """Quantise the plain weights of a graph that ``config.weights`` asks for.

    Returns:
        The linears whose weights stay as they are, with the reason.
    """
    linears = all_linears(captured)
    by_output = _read_by_output(captured, linears, config)
    dequantized, refused, pairs = [], [], []
    for parameter, uses in _uses_of_parameters(captured, linears).items():
        reason = _refusal(captured, parameter, uses)
        if reason is None:
            row_dim = 0 if uses.lookups or not by_output.isdisjoint(_nodes(uses)) else 1
            planes = 2 if row_dim == 0 else PLANES[str(config.weights)]
            real = captured.parameters[parameter]
            weight = _quantized(real, uses, row_dim, planes)
            if replace(real, weight):
                pairs.append((real, weight))
                dequantized.append(_dequantize(captured, parameter, weight))
                continue
            reason = "the model does not hold its weight as a parameter of a module"
        if uses.linears:
            node = uses.linears[0].node
            refused.append(Skipped(where(node), reason, str(node.target), source_of(node), "float"))
    if dequantized:
        compat.take_new_parameters(pairs)
        propagate_strides(captured, dequantized)
        finish(captured)
        use_huge_pages(captured.parameters[node] for node in captured.quantized)
    logger.info("%d weights quantised, %d left as they are", len(dequantized), len(refused))
    return refused


def _nodes(uses: _Uses) -> Iterator[fx.Node]:
    return (linear.node for linear in uses.linears)


def _uses_of_parameters(captured: Captured, linears: Sequence[Linear]) -> dict[fx.Node, _Uses]:
    """Of weights of linears, and of tables, which are plain floats."""
    uses: dict[fx.Node, _Uses] = {}
    for linear in linears:
        uses.setdefault(linear.weight.parameter, _Uses()).linears.append(linear)
    for node in captured.gm.graph.nodes:
        if node.op == "call_function" and has(node, Trait.LOOKUP):
            uses.setdefault(node.args[0], _Uses()).lookups.append(node)
    plain = captured.parameters.keys() - captured.quantized.keys() - captured.wrapped.keys()
    return {
        parameter: of
        for parameter, of in uses.items()
        if parameter in plain and captured.parameters[parameter].is_floating_point()
    }


def _read_by_output(captured: Captured, linears: Sequence[Linear], config: Config) -> set[fx.Node]:
    """Linears whose output channels are chosen, or for which nothing is: the last ones."""
    nodes = last_linears(captured, linears)
    for region in find_regions(captured).regions:
        by_grade = region.experts and config.prunes_inputs(region.kind) and not region.one_pass
        if config.prunes_units(region) and not by_grade:
            nodes.update(producer.linear.node for producer in region.producers)
    return nodes


def _refusal(captured: Captured, parameter: fx.Node, uses: _Uses) -> str | None:
    """Why a weight stays as it is."""
    real = captured.parameters[parameter]
    if real.dtype not in _TYPES:
        return f"its weight is of {real.dtype}"
    if real.device.type == "meta":
        return "its weight is on the meta device, or offloaded"
    if type(real) is not torch.nn.Parameter:
        return f"its weight is a {type(real).__name__}"
    stacked = any(linear.experts is not None for linear in uses.linears)
    if real.dim() != 2 + stacked:
        return "its weight is no matrix, nor a stack of experts"
    if not all(linear.has_flat_rows for linear in uses.linears):
        return "its experts' rows do not stand one after the other"
    if min(real.shape[-2:]) < SMALLEST:
        return f"its weight has a side of less than {SMALLEST}"
    if any(map(routes, uses.linears)):
        return "what it computes decides a choice"
    if any(linear.weight.path for linear in uses.linears):
        return "it reads a part of its weight, or a view of it"
    if len({linear.weight.out_dim for linear in uses.linears}) > 1:
        return "its weight is read both as it is and transposed"
    other = user_outside(parameter, {*_nodes(uses), *uses.lookups})
    return None if other is None else f"its weight is shared with {other.target}"


def _quantized(real: Tensor, uses: _Uses, row_dim: int, planes: int) -> QuantizedTensor:
    transposed = any(linear.weight.out_dim == real.dim() - 1 for linear in uses.linears)
    weight = QuantizedTensor.of(real.detach(), row_dim, planes, transposed=transposed)
    return torch.nn.Parameter(weight, requires_grad=False)  # type: ignore[return-value]


def _dequantize(captured: Captured, parameter: fx.Node, weight: QuantizedTensor) -> fx.Node:
    """Let the graph take what ``weight`` holds in the place of ``parameter``; what is read now."""
    placeholders = captured.gm.graph.find_nodes(op="placeholder")
    position = placeholders.index(parameter)
    stored, packed = weight.stored, weight.packed
    captured.unwrapping = captured.unwrapping.with_weights([position])
    captured.parameters[parameter] = packed
    captured.quantized[parameter] = stored
    users = list(parameter.users)
    parameter.meta["val"] = compat.fakify(captured.fake_mode, packed)
    with captured.gm.graph.inserting_before(placeholders[-1].next):
        builder = GraphBuilder(captured, users[0])
        shape = list(stored.sizes), stored.row_dim, stored.planes, stored.dtype
        node = builder.call(ops.dequantize, parameter, None, None, *shape)
        if stored.transposed:
            node = builder.call(torch.ops.aten.transpose.int, node, -2, -1)
    for user in users:
        user.replace_input_with(parameter, node)
    return node

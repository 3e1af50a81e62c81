"""Find regions: follow every channel axis from its birth in a linear to its contraction."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from popc.analysis.capture import Captured, identity
from popc.analysis.plan import Linear, Plan, Region, Skipped, Weight
from popc.analysis.rules import (
    LINEARS,
    WEIGHT_TRANSPOSES,
    WEIGHT_VIEWS,
    Mixes,
    reads_size,
    shape,
    transfer,
)
from popc.analysis.tokens import token_grid


@dataclass
class _Axis:
    """One channel axis; axes that meet in an elementwise op become one (union-find)."""

    size: int
    producers: list[Linear] = field(default_factory=list)
    consumers: list[Linear] = field(default_factory=list)
    dims: dict[fx.Node, int] = field(default_factory=dict)
    refusals: list[tuple[str, fx.Node]] = field(default_factory=list)
    parent: _Axis | None = None

    def root(self) -> _Axis:
        return self if self.parent is None else self.parent.root()

    def join(self, other: _Axis) -> _Axis:
        a, b = self.root(), other.root()
        if a is b:
            return a
        a.producers += b.producers
        a.consumers += b.consumers
        a.dims.update(b.dims)
        a.refusals += b.refusals
        b.parent = a
        return a


def find_regions(captured: Captured) -> Plan:
    """Every prunable region of the graph, and a refusal for each linear that is in none."""
    axes: list[_Axis] = []
    carried: dict[fx.Node, dict[int, _Axis]] = {}
    for node in captured.gm.graph.nodes:
        linear = as_linear(node, captured)
        incoming = [
            (source, dim) for source in node.all_input_nodes for dim in carried.get(source, {})
        ]
        outgoing: dict[int, _Axis] = {}
        for source, dim in incoming:
            axis = carried[source][dim].root()
            if linear is not None and source is linear.x:
                _through_linear(node, linear, source, dim, axis, outgoing)
                continue
            if reads_size(node, dim):
                continue
            if node.op == "output":
                axis.refusals.append(("the channels are an output of the graph", node))
                continue
            try:
                out = transfer(node, source, dim)
            except Mixes as mixes:
                axis.refusals.append((str(mixes), node))
                continue
            outgoing[out] = axis.join(outgoing[out]) if out in outgoing else axis
        if linear is not None:
            out = len(shape(node)) - 1
            axis = _Axis(int(shape(node)[out]), producers=[linear])
            axes.append(axis)
            outgoing[out] = axis
        if outgoing:
            carried[node] = outgoing
            for dim, axis in outgoing.items():
                axis.root().dims[node] = dim
    plan = Plan()
    order = {node: i for i, node in enumerate(captured.gm.graph.nodes)}
    for axis in axes:
        if axis.parent is None:
            axis.producers.sort(key=lambda linear: order[linear.node])
            axis.consumers.sort(key=lambda linear: order[linear.node])
            _conclude(axis, order, plan)
    return plan


def _through_linear(
    node: fx.Node,
    linear: Linear,
    source: fx.Node,
    dim: int,
    axis: _Axis,
    outgoing: dict[int, _Axis],
) -> None:
    if dim == len(shape(source)) - 1:
        # Contracted over the channel: the axis ends here.
        weight = replace(linear.weight, channel_dim=1 - linear.weight.channel_dim)
        axis.consumers.append(replace(linear, weight=weight))
    else:
        outgoing[dim] = axis


def as_linear(node: fx.Node, captured: Captured) -> Linear | None:
    """``node`` as ``y = x Wᵀ + b`` with a parameter W, or None."""
    form = LINEARS.get(node.target)
    if form is None:
        return None
    x, weight = node.args[form.x], node.args[form.weight]
    bias = node.args[form.bias] if form.bias is not None and len(node.args) > form.bias else None
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or node.kwargs:
        return None
    channel_dim = form.out_dim
    while weight not in captured.parameters:
        if weight.target in WEIGHT_TRANSPOSES and len(shape(weight)) == 2:
            channel_dim = 1 - channel_dim
        elif weight.target not in WEIGHT_VIEWS:
            return None
        (weight,) = weight.all_input_nodes
    if len(shape(weight)) != 2:
        return None
    if bias is not None and (not isinstance(bias, fx.Node) or len(shape(bias)) != 1):
        return None
    held = Weight(weight, channel_dim, identity(captured.parameters[weight]))
    return Linear(node, x, held, bias if isinstance(bias, fx.Node) else None)


def _conclude(axis: _Axis, order: dict[fx.Node, int], plan: Plan) -> None:
    """Turn a followed axis into a region, or into one refusal for each of its producers."""
    reason = _refusal(axis)
    if reason is not None:
        for linear in axis.producers:
            plan.skipped.append(Skipped(_where(linear.node), reason, _source(linear.node)))
        return
    linears = (*axis.producers, *axis.consumers)
    producers = {linear.node for linear in axis.producers}
    body = sorted((node for node in axis.dims if node not in producers), key=order.__getitem__)
    weights = tuple(linear.weight.identity for linear in linears)
    occurrence = sum(region.key[0] == weights for region in plan.regions)
    plan.regions.append(
        Region(
            kind="mlp",
            name=_common([_where(linear.node) for linear in linears]),
            channels=axis.size,
            producers=tuple(axis.producers),
            body=tuple(body),
            axis=dict(axis.dims),
            hidden=axis.consumers[0].x,
            grid=token_grid(axis.consumers[0].x),
            consumers=tuple(axis.consumers),
            key=(weights, occurrence),
            source=_source(axis.consumers[0].node),
        )
    )


def _refusal(axis: _Axis) -> str | None:
    if axis.refusals:
        reason, node = axis.refusals[0]
        source = _source(node)
        return f"{reason} ({source})" if source else reason
    if not axis.consumers:
        return "no linear contracts the channels"
    if len({consumer.x for consumer in axis.consumers}) > 1:
        return "different values of the axis are contracted, so no single score ranks its channels"
    hidden = axis.consumers[0].x
    if any(axis.dims[linear.node] != len(shape(linear.node)) - 1 for linear in axis.producers):
        return "the channel is not the last axis of every producer"
    if axis.dims[hidden] != len(shape(hidden)) - 1:
        return "the channel is not the last axis where it is contracted"
    if axis.size < 2:
        return "a single channel"
    return None


def _where(node: fx.Node) -> str:
    """The module path of ``node``, for people; falls back to the node's own name."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return node.name
    path = list(stack.values())[-1][0]
    # Dynamo's own prefix for the root: a local variable, and the bound method's module.
    return re.sub(r"^(L\['\w+'\]\.?|L__self___?)?(__self__\.)?", "", path) or node.name


def _common(names: list[str]) -> str:
    """The longest dotted path that all ``names`` share, or the first name."""
    parts = [name.split(".") for name in names]
    shared = []
    for group in zip(*parts, strict=False):
        if len(set(group)) > 1:
            break
        shared.append(group[0])
    return ".".join(shared) or names[0]


def _source(node: fx.Node) -> str:
    """The innermost ``file:line`` of the model's own code behind ``node``."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    outside = [f for f in frames if not f[0].startswith(torch.__path__[0])]
    if not outside:
        return ""
    path, line = outside[-1]
    return f"{path.rsplit('/', 1)[-1]}:{line}"

"""Decode pass: each region computes R ∪ C alone, keeps the best of C, and contracts those.

Dense:   ``h = f(x gateᵀ, x upᵀ)``, ``y = h downᵀ``.
Pruned:  ``h = f(gather_linear(x, gate, live), ...)``, ``h', active = select_candidates(h, ...)``,
``y = gather_matmul(h', down, active)``, with the same nodes ``f`` on fewer channels.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

from popc.analysis.capture import Captured
from popc.analysis.plan import Region
from popc.analysis.rules import SIZE_ARGUMENT, shape
from popc.config import Config, Counts
from popc.ops import gather_linear, gather_matmul, select_candidates
from popc.passes.emit import Emitter, add_input, finish, map_arguments

aten = torch.ops.aten


def prune_regions(captured: Captured, regions: Sequence[Region], config: Config) -> None:
    """Rewrite ``regions``; the graph gains two inputs, packed region after region.

    - ``index`` int64 ``[Σn]``: the live channels of each region, R then C; ``[B, Σn]`` for
      ``scope="sequence"``.
    - ``norm`` float32, of the same shape: ``‖down[:, c]‖`` of each of them.
    """
    counts = [config.counts(region.channels) for region in regions]
    total = sum(count.live for count in counts)
    lead = () if config.scope == "batch" else (shape(regions[0].hidden)[0],)
    with captured.fake_mode:
        device = regions[0].hidden.meta["val"].device
        index_value = torch.empty((*lead, total), dtype=torch.int64, device=device)
        norm_value = torch.empty((*lead, total), dtype=torch.float32, device=device)
    index = add_input(captured, "popc_index", index_value)
    norm = add_input(captured, "popc_norm", norm_value)
    start = 0
    for region, count in zip(regions, counts, strict=True):
        _prune(captured, region, count, index, norm, start)
        start += count.live
    finish(captured)


def _prune(
    captured: Captured, region: Region, count: Counts, index: fx.Node, norm: fx.Node, start: int
) -> None:
    graph = captured.gm.graph
    pruned: dict[fx.Node, fx.Node] = {}
    first = region.producers[0].node
    with graph.inserting_before(first):
        emit = Emitter(captured, first)
        live = emit.call(aten.slice.Tensor, index, -1, start, start + count.live)
        scale = emit.call(aten.slice.Tensor, norm, -1, start, start + count.live)
    for linear in region.producers:
        with graph.inserting_before(linear.node):
            weight = linear.weight
            pruned[linear.node] = Emitter(captured, linear.node).call(
                gather_linear, linear.x, weight.node, linear.bias, live, weight.channel_dim
            )
    for node in region.body:
        with graph.inserting_before(node):
            pruned[node] = _narrowed(captured, region, node, pruned, live, count.live)
    with graph.inserting_before(region.consumers[0].node):
        emit = Emitter(captured, region.hidden)
        chosen = emit.call(
            select_candidates, pruned[region.hidden], scale, live, count.retained, count.active
        )
        hidden = emit.call(operator.getitem, chosen, 0)
        active = emit.call(operator.getitem, chosen, 1)
    for linear in region.consumers:
        with graph.inserting_before(linear.node):
            weight = linear.weight
            y = Emitter(captured, linear.node).call(
                gather_matmul, hidden, weight.node, linear.bias, active, weight.channel_dim
            )
        linear.node.replace_all_uses_with(y)
        graph.erase_node(linear.node)
    for node in (*reversed(region.body), *(linear.node for linear in region.producers)):
        # What is left only asks for another dimension's size: see rules.reads_size.
        for user in list(node.users):
            user.replace_input_with(node, pruned[node])
        graph.erase_node(node)


def _narrowed(
    captured: Captured,
    region: Region,
    node: fx.Node,
    pruned: dict[fx.Node, fx.Node],
    live: fx.Node,
    size: int,
) -> fx.Node:
    """``node`` again, on the live channels alone."""
    emit = Emitter(captured, node)
    dim = region.axis[node]
    rank = len(shape(node))

    def narrow(operand: fx.Node) -> fx.Node:
        if operand in pruned:
            return pruned[operand]
        value = operand.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return operand
        # Not of the region, but read along its axis: a channelwise scale, say.
        at = dim - (rank - value.dim())
        if at < 0 or value.shape[at] == 1:
            return operand
        return _take(emit, operand, live, at)

    args, kwargs = map_arguments(node.args, node.kwargs, narrow)
    place = SIZE_ARGUMENT.get(node.target)
    if place is not None:
        sizes = list(args[place])
        if sizes[dim] != -1:
            sizes[dim] = size
        args = (*args[:place], sizes, *args[place + 1 :])
    return emit.call(node.target, *args, **kwargs)


def _take(emit: Emitter, operand: fx.Node, live: fx.Node, dim: int) -> fx.Node:
    """The live channels of an operand from outside the region."""
    if len(shape(live)) == 1:
        return emit.call(aten.index_select.default, operand, dim, live)
    # One list per sequence. T is 1 at decode, so an operand is [F] or [B, 1, F] (or broadcasts).
    size = shape(operand)[dim]
    if len(shape(operand)) > 1 and operand.meta["val"].numel() == size:
        operand, dim = emit.call(aten.view.default, operand, [-1]), 0
    if len(shape(operand)) == 1:
        return emit.call(aten.unsqueeze.default, emit.call(aten.index.Tensor, operand, [live]), 1)
    return emit.call(aten.gather.default, operand, dim, emit.call(aten.unsqueeze.default, live, 1))

"""Contraction pass: a linear reads the input channels that matter to this token, and no others.

Dense:  ``y = x Wᵀ``.
Pruned: ``y = threshold_linear(x, W, norm, threshold, center, base)``, ``base = center Wᵀ``.
A channel that is not read is taken to be its center: see :mod:`popc.ops.measure`. The choice is
made within the op, where x is at hand; C++ kernels make it once for all linears that read x.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import fx

from popc.analysis.capture import Captured
from popc.analysis.input_groups import InputGroup
from popc.analysis.linears import Linear
from popc.analysis.mutation import writes_first
from popc.analysis.propagation import shape
from popc.analysis.tokens import Mask, rows_of
from popc.ops import (
    count_active_channels,
    measure_inputs,
    select_kernel,
    threshold_linear,
    threshold_linears,
)
from popc.passes.builder import GraphBuilder, add_input, append_output, finish
from popc.passes.padding import valid_rows_node

aten = torch.ops.aten


def threshold_inputs(
    captured: Captured, groups: Sequence[InputGroup], scope: str, counting: bool
) -> None:
    """Rewrite the linears of ``groups``; the graph gains four inputs.

    - ``popc_scale`` float32 ``[ΣK]``: ``‖W[:, c]‖`` over the linears of a group, group by group.
    - ``popc_threshold`` float32 ``[G, S]``; S is 1, or B for ``scope="sequence"``.
    - ``popc_center`` float32 ``[S, ΣK]``, group by group.
    - ``popc_base`` float32 ``[S, ΣN]``: what the linears make of it, one after the other.

    With ``counting`` it also gains an output, int64 ``[G]``: how many channels each group reads.
    """
    graph = captured.gm.graph
    norms = _add_scale(captured, groups)
    lead = 1 if scope == "batch" else shape(groups[0].x)[0]
    with captured.fake_mode:
        limits = torch.empty((len(groups), lead), device=groups[0].x.meta["val"].device)
        middles = torch.empty((lead, segment_offsets(groups)[-1][1]), device=limits.device)
        outputs = sum(linear.outputs for group in groups for linear in group.linears)
        bases = torch.empty((lead, outputs), device=limits.device)
    limits_in = add_input(captured, "popc_threshold", limits)
    center_in = add_input(captured, "popc_center", middles)
    base_in = add_input(captured, "popc_base", bases)
    held = norms, limits_in, center_in, base_in
    place = {node: i for i, node in enumerate(graph.nodes)}
    writes = [i for node, i in place.items() if writes_first(node)]
    done = 0
    read: list[fx.Node] = []
    for i, (group, (start, _)) in enumerate(zip(groups, segment_offsets(groups), strict=True)):
        if counting:
            with graph.inserting_before(group.linears[0].node):
                emit = GraphBuilder(captured, group.linears[0].node)
                read.append(emit.call(count_active_channels, group.x, *held[:3], i, start))
        for linears in _together(group, place, writes):
            with graph.inserting_before(linears[0].node):
                emit = GraphBuilder(captured, linears[0].node)
                _contract(emit, group.x, linears, held, (i, start, done))
            done += sum(linear.outputs for linear in linears)
    if counting:
        append_output(captured, aten.stack.default, read)
    finish(captured)


def _contract(
    emit: GraphBuilder,
    x: fx.Node,
    linears: Sequence[Linear],
    held: tuple[fx.Node, fx.Node, fx.Node, fx.Node],
    own: tuple[int, int, int],
) -> None:
    """``linears`` become one op, which stands where the first of them is.

    Args:
        held: norms, thresholds, centers and bases of all groups.
        own: the group's place in them: its number, its first channel, and the first output.
    """
    norm, limit, center, base = held
    if len(linears) == 1:
        (linear,) = linears
        weight = linear.weight
        op = select_kernel(threshold_linear, x.meta["val"], weight.node.meta["val"])
        given = (x, weight.node, linear.bias, norm, limit, weight.out_dim)
        emit.change(linear.node, op, *given, center, base, *own)
        return
    weights = [linear.weight.node for linear in linears]
    biases = [linear.bias for linear in linears]
    out_dims = [linear.weight.out_dim for linear in linears]
    results = emit.call(
        threshold_linears, x, weights, biases, norm, limit, out_dims, center, base, *own
    )
    for i, linear in enumerate(linears):
        emit.change(linear.node, operator.getitem, results, i)


def _together(
    group: InputGroup, place: dict[fx.Node, int], writes: Sequence[int]
) -> list[list[Linear]]:
    """The group's linears, those together that one op can take: where the first of them stands.

    For that nothing may be written in between, and what they read must be there already, or be
    no more than a view of a parameter, which is then brought there. Triton has an op for each.

    Args:
        place: of each node in the graph; kept true for those that are brought elsewhere.
        writes: the places at which something is written.
    """
    x = group.x.meta["val"]
    if (
        select_kernel(threshold_linear, x, group.linears[0].weight.node.meta["val"])
        != threshold_linear
    ):
        return [[linear] for linear in group.linears]
    found = [[group.linears[0]]]
    for linear in group.linears[1:]:
        first = found[-1][0].node
        read = [*linear.weight.path, *([] if linear.bias is None else [linear.bias])]
        late = [node for node in read if place[node] > place[first]]
        written = any(place[first] <= at < place[linear.node] for at in writes)
        if written or any(node not in linear.weight.path for node in late):
            found.append([linear])
            continue
        for node in late:
            first.prepend(node)
            place[node] = place[first]
        found[-1].append(linear)
    return found


def measure_input_groups(captured: Captured, groups: Sequence[InputGroup], scope: str) -> None:
    """Append two outputs for each group: moments and a histogram, by ``popc::measure_inputs``.

    Their S is 1 for ``scope="batch"`` and the batch size for ``"sequence"``. The graph gains the
    inputs ``popc_scale``, as :func:`threshold_inputs` has it, and ``popc_moments``, those of the
    calls before, float64 ``[S, Σ(2K + 1)]``, group by group.
    """
    graph = captured.gm.graph
    output = graph.output_node()
    norms = _add_scale(captured, groups)
    lead = 1 if scope == "batch" else _sequences(groups[0].x)
    with captured.fake_mode:
        size = sum(2 * group.width + 1 for group in groups)
        device = norms.meta["val"].device
        before = torch.empty((lead, size), dtype=torch.float64, device=device)
    before_in = add_input(captured, "popc_moments", before)
    memo: dict[Mask, fx.Node] = {}
    done = 0
    for group, (start, stop) in zip(groups, segment_offsets(groups), strict=True):
        valid = valid_rows_node(captured, group.x, output, memo)
        with graph.inserting_before(output):
            emit = GraphBuilder(captured, group.x)
            norm = emit.call(aten.slice.Tensor, norms, 0, start, stop)
            sizes = _by_sequence(emit, group.x, scope)
            rows = emit.call(aten.reshape.default, group.x, [*sizes, group.width])
            if valid is not None:
                valid = emit.call(aten.reshape.default, valid, sizes)
            known = emit.call(aten.slice.Tensor, before_in, 1, done, done + 2 * group.width + 1)
            done += 2 * group.width + 1
            measured = emit.call(measure_inputs, rows, norm, valid, known)
        for i in range(2):
            append_output(captured, operator.getitem, measured, i)
    finish(captured)


def _add_scale(captured: Captured, groups: Sequence[InputGroup]) -> fx.Node:
    with captured.fake_mode:
        device = groups[0].x.meta["val"].device
        scale = torch.empty(sum(group.width for group in groups), device=device)
    return add_input(captured, "popc_scale", scale)


def segment_offsets(groups: Sequence[InputGroup]) -> list[tuple[int, int]]:
    """Where each group's norms start and stop in ``popc_scale``."""
    stops = list(accumulate(group.width for group in groups))
    return list(zip([0, *stops], stops, strict=False))


def _sequences(x: fx.Node) -> Any:
    """How many there are in x, as a number or a symbol."""
    rows = rows_of(x)
    if len(shape(x)) > 2 or rows is None:
        return shape(x)[0] if len(shape(x)) > 2 else 1
    return shape(rows.grid)[0]


def _by_sequence(emit: GraphBuilder, x: fx.Node, scope: str) -> list[Any]:
    """``[B, T]`` of x's rows, as a reshape takes it; one sequence where none can be told apart."""
    if len(shape(x)) > 2:
        return [emit.size(x, 0), -1]
    rows = rows_of(x)
    known = rows is not None and (scope == "sequence" or rows.is_plain)
    return [emit.size(rows.grid, 0), -1] if rows is not None and known else [1, -1]

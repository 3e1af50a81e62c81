"""Contraction pass: a linear reads the input channels that matter to this token, and no others.

Dense:  ``y = x Wᵀ``.
Pruned: ``y = threshold_linear(x - center, W, norm, threshold) + base``, ``base = center Wᵀ``.
A channel that is not read is taken to be its center: see :func:`popc.ops.measure.centers`. The
choice is made within the op, where x is at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import fx

from popc.analysis.capture import Captured
from popc.analysis.inputs import Inputs
from popc.analysis.tokens import Mask, rows_of
from popc.analysis.walk import shape
from popc.ops import centers, moments, score_histogram, served, threshold_linear
from popc.passes.emit import Emitter, add_input, append_output, finish
from popc.passes.validity import emit_valid_rows

aten = torch.ops.aten


def contract_inputs(
    captured: Captured, groups: Sequence[Inputs], scope: str, counting: bool
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
        center = torch.empty((lead, stretches(groups)[-1][1]), device=limits.device)
        outputs = sum(linear.outputs for group in groups for linear in group.linears)
        base = torch.empty((lead, outputs), device=limits.device)
    limits_in = add_input(captured, "popc_threshold", limits)
    center_in = add_input(captured, "popc_center", center)
    base_in = add_input(captured, "popc_base", base)
    done = 0
    read: list[fx.Node] = []
    for i, (group, (start, stop)) in enumerate(zip(groups, stretches(groups), strict=True)):
        with graph.inserting_before(group.linears[0].node):
            emit = Emitter(captured, group.linears[0].node)
            norm = emit.call(aten.slice.Tensor, norms, 0, start, stop)
            limit = emit.call(aten.select.int, limits_in, 0, i)
            middle = emit.part(center_in, start, stop, group.x)
            x = emit.call(aten.sub.Tensor, group.x, middle)
            if counting:
                read.append(_emit_count(emit, x, norm, limit))
        for linear in group.linears:
            weight = linear.weight
            op = served(threshold_linear, x.meta["val"], weight.node.meta["val"])
            with graph.inserting_before(linear.node):
                emit = Emitter(captured, linear.node)
                args = (x, weight.node, linear.bias, norm, limit, weight.out_dim)
                y = emit.call(op, *args)
                part = emit.part(base_in, done, done + linear.outputs, y)
            emit.change(linear.node, aten.add.Tensor, y, part)
            done += linear.outputs
    if counting:
        append_output(captured, aten.stack.default, read)
    finish(captured)


def add_histograms(captured: Captured, groups: Sequence[Inputs], scope: str) -> None:
    """Append two outputs: what was measured of each group.

    - float64 ``[S, G, BINS + 1]``, its :func:`popc.ops.score_histogram`; S is 1 for
      ``scope="batch"`` and the batch size for ``"sequence"``.
    - float64 ``[S, Σ(2K + 1)]``, its :func:`popc.ops.moments`, of this call and all before.

    The graph gains the inputs ``popc_scale``, as :func:`contract_inputs` has it, and
    ``popc_moments``, those of the calls before.
    """
    graph = captured.gm.graph
    output = graph.output_node()
    norms = _add_scale(captured, groups)
    lead = 1 if scope == "batch" else shape(groups[0].x)[0]
    with captured.fake_mode:
        size = sum(2 * group.width + 1 for group in groups)
        device = norms.meta["val"].device
        before = torch.empty((lead, size), dtype=torch.float64, device=device)
    before_in = add_input(captured, "popc_moments", before)
    memo: dict[Mask, fx.Node] = {}
    found: list[fx.Node] = []
    seen: list[fx.Node] = []
    rules: dict[int, fx.Graph] = {}  # tracing one takes milliseconds, and there are few widths
    done = 0
    for group, (start, stop) in zip(groups, stretches(groups), strict=True):
        valid = emit_valid_rows(captured, group.x, output, memo)
        with graph.inserting_before(output):
            emit = Emitter(captured, group.x)
            norm = emit.call(aten.slice.Tensor, norms, 0, start, stop)
            sizes = _by_sequence(emit, group.x)
            rows = emit.call(aten.reshape.default, group.x, [*sizes, group.width])
            if valid is not None:
                valid = emit.call(aten.reshape.default, valid, sizes)
            known = emit.call(aten.slice.Tensor, before_in, 1, done, done + 2 * group.width + 1)
            done += 2 * group.width + 1
            new = emit.call(moments, rows, valid)
            if scope == "batch":
                new = emit.call(aten.sum.dim_IntList, new, [0], True)
            seen.append(emit.call(aten.add.Tensor, known, new))
            if group.width not in rules:
                rules[group.width] = emit.traced(centers, seen[-1])
            middle = emit.splice(rules[group.width], seen[-1])
            one = emit.call(score_histogram, rows, norm, middle, valid)
            if scope == "batch":
                one = emit.call(aten.sum.dim_IntList, one, [0], True)
            found.append(one)
    append_output(captured, aten.stack.default, found, 1)
    append_output(captured, aten.cat.default, seen, 1)
    finish(captured)


def _add_scale(captured: Captured, groups: Sequence[Inputs]) -> fx.Node:
    with captured.fake_mode:
        device = groups[0].x.meta["val"].device
        scale = torch.empty(sum(group.width for group in groups), device=device)
    return add_input(captured, "popc_scale", scale)


def stretches(groups: Sequence[Inputs]) -> list[tuple[int, int]]:
    """Where each group's norms start and stop in ``popc_scale``."""
    stops = list(accumulate(group.width for group in groups))
    return list(zip([0, *stops], stops, strict=False))


def _by_sequence(emit: Emitter, x: fx.Node) -> list[Any]:
    """``[B, T]`` of x's rows, as a reshape takes it; one sequence where none can be told apart."""
    if len(shape(x)) > 2:
        return [emit.size(x, 0), -1]
    rows = rows_of(x)
    return [1, -1] if rows is None else [emit.size(rows.grid, 0), -1]


def _emit_count(emit: Emitter, x: fx.Node, norm: fx.Node, limit: fx.Node) -> fx.Node:
    """How many channels count for at least one token: see :func:`popc.ops.threshold.counts`."""
    rank = len(shape(x))
    limit = emit.call(aten.view.default, limit, [-1, *([1] * (rank - 1))])
    scores = emit.call(aten.mul.Tensor, emit.call(aten.abs.default, x), norm)
    below = emit.call(aten.le.Tensor, scores, limit)
    all_below = emit.call(aten.all.dims, below, list(range(rank - 1)))
    return emit.call(aten.sum.default, emit.call(aten.logical_not.default, all_below))

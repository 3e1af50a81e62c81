"""Measure inputs: a prompt's graph stays dense and tells how the scores of inputs are distributed.

What a policy of inputs makes thresholds of: see :mod:`popc.ops.measure`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from popc import ops
from popc.analysis.capture import Captured
from popc.analysis.input_groups import InputGroup
from popc.analysis.propagation import shape
from popc.analysis.tokens import Mask, mask_of, rows_of
from popc.passes.base import UNCHANGED, Binding, Call, PassResult
from popc.passes.builder import GraphBuilder, add_input, append_outputs, finish, following
from popc.passes.experts import expert_of_rows, flat_input
from popc.passes.padding import valid_rows_node
from popc.passes.region_binding import InputGroupBinding
from popc.passes.segments import InputState, add_scale, input_state, segment_offsets
from popc.planning.rewrite_plan import RewritePlan

aten = torch.ops.aten


def measure_inputs(captured: Captured, work: RewritePlan) -> PassResult:
    """Take the statistics of ``work.measured_inputs``."""
    groups = work.measured_inputs
    if not groups:
        return UNCHANGED
    binding = _InputStatistics(captured, work)
    append_statistics(captured, groups, work.config.scope)
    return PassResult(len(groups), binding)


class _InputStatistics(Binding[InputState]):
    """Feeds scales and the moments of the calls before, and takes moments and histograms."""

    owners: Sequence[InputGroupBinding]

    def __init__(self, captured: Captured, work: RewritePlan) -> None:
        config, groups = work.config, work.measured_inputs
        self.owners = [InputGroupBinding.of(group, captured) for group in groups]
        self.policies = [config.input_policy(group.kind) for group in groups]
        self.scope = config.scope
        self.outputs = 2 * len(groups)

    def state(self, args: Sequence[Any]) -> InputState:
        return input_state(self.owners, self.policies, args)

    def feed(self, call: Call, state: InputState) -> Sequence[Tensor]:
        scale, statistics = state.scale, call.session.inputs
        moments = statistics.moments(state.owners, self.scope, call.sequences, scale)
        return scale, moments

    def absorb(self, call: Call, state: InputState, outputs: Sequence[Tensor]) -> None:
        if call.measures:
            call.session.inputs.add(state.owners, self.scope, outputs)


def append_statistics(captured: Captured, groups: Sequence[InputGroup], scope: str) -> None:
    """Append two outputs for each group: moments and a histogram, by ``popc::measure_inputs``.

    Their S is 1 for ``scope="batch"`` and the batch size for ``"sequence"``. The graph gains the
    inputs ``popc_scale``, as :mod:`popc.passes.segments` has it, and ``popc_moments``, those of the
    calls before, float64 ``[S, Σ(2K + 1)]``, group by group.
    """
    graph = captured.gm.graph
    norms = add_scale(captured, groups)
    lead = 1 if scope == "batch" else _sequences(groups[0].x)
    with captured.fake_mode:
        size = sum(2 * group.width + 1 for group in groups)
        device = norms.meta["val"].device
        before = torch.empty((lead, size), dtype=torch.float64, device=device)
    before_in = add_input(captured, "popc_moments", before)
    memo: dict[Mask, fx.Node] = {}
    done = 0
    for group, (start, stop) in zip(groups, segment_offsets(groups), strict=True):
        # Right where x is: nothing has to be kept until the end, and layers stay alike.
        place = following(group.x, *_read_for(group, graph))
        valid = valid_rows_node(captured, group.x, place, memo)
        with graph.inserting_before(place):
            builder = GraphBuilder(captured, group.x)
            norm = builder.call(aten.slice.Tensor, norms, 0, start, stop)
            known = builder.call(aten.slice.Tensor, before_in, 1, done, done + 2 * group.width + 1)
            done += 2 * group.width + 1
            measure = _measure_experts if group.experts else _measure
            append_outputs(captured, *measure(builder, group, norm, valid, known, scope))
    finish(captured)


def _read_for(group: InputGroup, graph: fx.Graph) -> list[fx.Node]:
    """What else is read to measure a group."""
    mask = mask_of(group.x, graph)
    masks = [] if mask is None else [mask.node]
    return masks if not group.experts else [*masks, group.linears[0].node]


def _measure(
    builder: GraphBuilder,
    group: InputGroup,
    norm: fx.Node,
    valid: fx.Node | None,
    known: fx.Node,
    scope: str,
) -> tuple[fx.Node, fx.Node]:
    """The group's moments and histogram."""
    sizes = _by_sequence(builder, group.x, scope)
    rows = builder.call(aten.reshape.default, group.x, [*sizes, group.width])
    if valid is not None:
        valid = builder.call(aten.reshape.default, valid, sizes)
    measured = builder.call(ops.measure_inputs, rows, norm, valid, known)
    moments, histogram = (builder.call(operator.getitem, measured, i) for i in range(2))
    return moments, histogram


def _measure_experts(
    builder: GraphBuilder,
    group: InputGroup,
    norm: fx.Node,
    valid: fx.Node | None,
    known: fx.Node,
    scope: str,
) -> tuple[fx.Node, fx.Node]:
    """The same, of rows that each have their expert's scale: of their moments the count alone.

    Without the others there are no centers. Each row is a sequence of its own, as the scores are
    those of no order.
    """
    linear, width = group.linears[0], group.width
    x = builder.call(aten.to.dtype, flat_input(builder, linear), torch.float32)
    by_expert = builder.call(aten.view.default, norm, [group.experts, width])
    scale = builder.call(aten.index.Tensor, by_expert, [expert_of_rows(builder, linear)])
    scaled = builder.call(aten.unsqueeze.default, builder.call(aten.mul.Tensor, x, scale), 1)
    ones = builder.call(aten.new_ones.default, norm, [width])
    if valid is not None:
        valid = builder.call(aten.reshape.default, valid, [-1, 1])
    measured = builder.call(ops.measure_inputs, scaled, ones, valid, known)
    moments, histogram = (builder.call(operator.getitem, measured, i) for i in range(2))
    count = builder.call(aten.slice.Tensor, moments, 1, 2 * width, 2 * width + 1)
    none = builder.call(aten.new_zeros.default, moments, [1, 2 * width])
    return builder.call(aten.cat.default, [none, count], 1), histogram


def _sequences(x: fx.Node) -> Any:
    """How many there are in x, as a number or a symbol."""
    rows = rows_of(x)
    if len(shape(x)) > 2 or rows is None:
        return shape(x)[0] if len(shape(x)) > 2 else 1
    return shape(rows.grid)[0]


def _by_sequence(builder: GraphBuilder, x: fx.Node, scope: str) -> list[Any]:
    """``[B, T]`` of x's rows, as a reshape takes it; one sequence where none can be told apart."""
    if len(shape(x)) > 2:
        return [builder.size(x, 0), -1]
    rows = rows_of(x)
    known = rows is not None and (scope == "sequence" or rows.is_plain)
    return [builder.size(rows.grid, 0), -1] if rows is not None and known else [1, -1]

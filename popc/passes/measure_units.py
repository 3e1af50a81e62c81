"""Measure units: a prompt's graph stays dense and gains one output, sums of squares by column.

``Σ_t h_{t,c}²`` over the valid tokens is the statistic of arXiv 2602.06822's importance
``I_c = ‖down[:, c]‖ · ‖h_{·,c}‖₂``. It is summed in float64, so that sums over chunks add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from popc.analysis.capture import Captured
from popc.analysis.findings import Region
from popc.analysis.propagation import shape
from popc.analysis.tokens import Mask, rows_of
from popc.ops import sum_squares
from popc.passes.base import UNCHANGED, Binding, Call, PassResult, UnitState
from popc.passes.builder import GraphBuilder, add_input, append_output, finish
from popc.passes.experts import expert_of_rows, flat_input
from popc.passes.padding import valid_rows_node
from popc.passes.region_binding import RegionBinding
from popc.planning.rewrite_plan import RewritePlan
from popc.policies import UnitPolicy

aten = torch.ops.aten


def measure_units(captured: Captured, work: RewritePlan) -> PassResult:
    """Take the statistics of ``work.measured``."""
    regions, config = work.measured, work.config
    if not regions:
        return UNCHANGED
    binding = _UnitStatistics(captured, work)
    policies = [config.unit_policy(region.kind) for region in regions]
    append_statistics(captured, regions, policies, config.scope)
    return PassResult(len(regions), binding)


class _UnitStatistics(Binding[UnitState]):
    """Feeds which units a cache holds, and takes the sums."""

    outputs = 1
    owners: Sequence[RegionBinding]

    def __init__(self, captured: Captured, work: RewritePlan) -> None:
        self.config = work.config
        self.owners = [RegionBinding.of(region, captured) for region in work.measured]

    def state(self, args: Sequence[Any]) -> UnitState:
        config = self.config
        return UnitState(
            [
                owner.state(
                    args,
                    config.counts(owner.region.units, owner.region.kind),
                    config.unit_policy(owner.region.kind),
                )
                for owner in self.owners
            ]
        )

    def feed(self, call: Call, state: UnitState) -> Sequence[Tensor]:
        cached = [region for region in state.owners if region.cached]
        if not cached:
            return ()
        return (call.session.units.cached_units(cached, self.config.scope, call.sequences),)

    def absorb(self, call: Call, state: UnitState, outputs: Sequence[Tensor]) -> None:
        (sums,) = outputs
        if call.measures:
            call.session.units.add(state.owners, self.config.scope, sums)


def append_statistics(
    captured: Captured, regions: Sequence[Region], policies: Sequence[UnitPolicy], scope: str
) -> None:
    """Append the output ``[S, ΣK]`` float64, the regions' statistics side by side.

    Each is the sum of squares of what the region's policy measures: of h itself for the paper's; of
    all its values side by side where it has more. S is 1 for ``scope="batch"`` and the batch size
    for ``"sequence"``. K is the width of a region's h, E · K where experts are stacked. If some
    regions are cached, the graph also gains the input ``popc_keep`` float32 ``[S, ΣK]``: 0 for the
    columns of heads whose keys and values the cache lacks, since a decode step left them out; their
    output counts for nothing from then on.
    """
    graph = captured.gm.graph
    _zero_missing_units(captured, [r for r in regions if r.cached], scope)
    output = graph.output_node()
    memo: dict[Mask, fx.Node] = {}
    valid = [valid_rows_node(captured, region.hidden, output, memo) for region in regions]
    with graph.inserting_before(output):
        builder = GraphBuilder(captured, output)
        sums = [
            _add_sum(captured, region, value, mask, scope)
            for region, policy, mask in zip(regions, policies, valid, strict=True)
            for value in policy.values(builder, region.hidden, region)
        ]
    append_output(captured, aten.cat.default, sums, -1)
    finish(captured)


def _zero_missing_units(captured: Captured, regions: Sequence[Region], scope: str) -> None:
    """Multiply the regions' h with ``popc_keep``."""
    if not regions:
        return
    graph = captured.gm.graph
    lead = 1 if scope == "batch" else shape(regions[0].hidden)[0]
    with captured.fake_mode:
        device = regions[0].hidden.meta["val"].device
        value = torch.empty((lead, sum(r.width for r in regions)), device=device)
    keep = add_input(captured, "popc_keep", value)
    start = 0
    for region in regions:
        h = region.hidden
        with graph.inserting_before(h):
            builder = GraphBuilder(captured, h)
            whole = builder.call(h.target, *h.args, **h.kwargs)
            part = builder.part(keep, start, start + region.width, h)
            builder.change(h, aten.mul.Tensor, whole, part)
        start += region.width


def _add_sum(
    captured: Captured, region: Region, h: fx.Node, valid: fx.Node | None, scope: str
) -> fx.Node:
    """Nodes for ``Σ h²`` of one region, ``[S, K]``, or ``[1, E·K]`` with experts."""
    builder = GraphBuilder(captured, h)
    if region.experts:
        return _sum_by_expert(builder, region, h, valid)
    rank = len(shape(h))
    sizes = [builder.size(h, 0), -1] if rank > 2 else [1, -1]
    if scope == "sequence" and rank == 2:
        rows = rows_of(h)
        assert rows is not None
        sizes = [builder.size(rows.grid, d) for d in range(2)]
    h = builder.call(aten.reshape.default, h, [*sizes, region.width])
    if valid is not None:
        valid = builder.call(aten.reshape.default, valid, sizes)
    total = builder.call(sum_squares, h, valid)
    return total if scope == "sequence" else builder.call(aten.sum.dim_IntList, total, [0], True)


def _sum_by_expert(
    builder: GraphBuilder, region: Region, h: fx.Node, valid: fx.Node | None
) -> fx.Node:
    """Each expert's sum over the rows routed to it."""
    hidden = builder.call(aten.to.dtype, h, torch.float64)
    squares = builder.call(aten.mul.Tensor, hidden, hidden)
    if valid is not None:
        # where, not a product: a NaN in a padding token must not reach the statistic.
        zero = builder.call(aten.zeros_like.default, squares)
        squares = builder.call(aten.where.self, valid, squares, zero)
    linear = region.consumers[0]
    flat = flat_input(builder, linear)
    rows = builder.call(aten.reshape.default, squares, [-1, region.width])
    expert = expert_of_rows(builder, linear)
    zero = builder.call(
        aten.zeros.default,
        [region.experts, region.width],
        dtype=torch.float64,
        device=flat.meta["val"].device,
    )
    total = builder.call(aten.index_add.default, zero, 0, expert, rows)
    return builder.call(aten.view.default, total, [1, -1])

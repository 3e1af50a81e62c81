"""Prefill pass: the graph stays dense and gains one output, each column's sum of squares.

``Σ_t h_{t,c}²`` over the valid tokens is the statistic of arXiv 2602.06822's importance
``I_c = ‖down[:, c]‖ · ‖h_{·,c}‖₂``. It is summed in float64, so that sums over chunks add up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from popc.analysis.capture import Captured
from popc.analysis.findings import Region
from popc.analysis.propagation import shape
from popc.analysis.tokens import Mask, rows_of
from popc.ops import sum_squares
from popc.passes.builder import GraphBuilder, add_input, append_output, finish
from popc.passes.experts import expert_of_rows, flat_input
from popc.passes.padding import valid_rows_node
from popc.policies import UnitPolicy

aten = torch.ops.aten


def measure_units(
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
    _keep_living(captured, [r for r in regions if r.cached], scope)
    output = graph.output_node()
    memo: dict[Mask, fx.Node] = {}
    valid = [valid_rows_node(captured, region.hidden, output, memo) for region in regions]
    with graph.inserting_before(output):
        emit = GraphBuilder(captured, output)
        sums = [
            _emit_sum(captured, region, value, mask, scope)
            for region, policy, mask in zip(regions, policies, valid, strict=True)
            for value in policy.values(emit, region.hidden, region)
        ]
    append_output(captured, aten.cat.default, sums, -1)
    finish(captured)


def _keep_living(captured: Captured, regions: Sequence[Region], scope: str) -> None:
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
            emit = GraphBuilder(captured, h)
            whole = emit.call(h.target, *h.args, **h.kwargs)
            part = emit.part(keep, start, start + region.width, h)
            emit.change(h, aten.mul.Tensor, whole, part)
        start += region.width


def _emit_sum(
    captured: Captured, region: Region, h: fx.Node, valid: fx.Node | None, scope: str
) -> fx.Node:
    """Nodes for ``Σ h²`` of one region, ``[S, K]``, or ``[1, E·K]`` with experts."""
    emit = GraphBuilder(captured, h)
    if region.experts:
        return _sum_by_expert(emit, region, h, valid)
    rank = len(shape(h))
    sizes = [emit.size(h, 0), -1] if rank > 2 else [1, -1]
    if scope == "sequence" and rank == 2:
        rows = rows_of(h)
        assert rows is not None
        sizes = [emit.size(rows.grid, d) for d in range(2)]
    h = emit.call(aten.reshape.default, h, [*sizes, region.width])
    if valid is not None:
        valid = emit.call(aten.reshape.default, valid, sizes)
    total = emit.call(sum_squares, h, valid)
    return total if scope == "sequence" else emit.call(aten.sum.dim_IntList, total, [0], True)


def _sum_by_expert(
    emit: GraphBuilder, region: Region, h: fx.Node, valid: fx.Node | None
) -> fx.Node:
    """Each expert's sum over the rows routed to it."""
    hidden = emit.call(aten.to.dtype, h, torch.float64)
    squares = emit.call(aten.mul.Tensor, hidden, hidden)
    if valid is not None:
        # where, not a product: a NaN in a padding token must not reach the statistic.
        zero = emit.call(aten.zeros_like.default, squares)
        squares = emit.call(aten.where.self, valid, squares, zero)
    linear = region.consumers[0]
    flat = flat_input(emit, linear)
    rows = emit.call(aten.reshape.default, squares, [-1, region.width])
    expert = expert_of_rows(emit, linear)
    zero = emit.call(
        aten.zeros.default,
        [region.experts, region.width],
        dtype=torch.float64,
        device=flat.meta["val"].device,
    )
    total = emit.call(aten.index_add.default, zero, 0, expert, rows)
    return emit.call(aten.view.default, total, [1, -1])

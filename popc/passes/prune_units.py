"""Decode pass: linears read the rows of live units and the columns of active ones.

Dense:   ``h = f(x gateᵀ, x upᵀ)``, ``y = h downᵀ``.
Pruned:  ``h = f(gather_linear(x, gate, rows), ...)``, ``active = select_units(h, ...)``,
``y = gather_linear(h, down, columns=active)``. All values keep their full width, with zeros where
nothing was computed, so that ``f``, be it an activation or a whole attention, stays as it is.
With a gate, ``active`` is chosen by ``f``'s first factor, and its second is computed at ``active``.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from popc.analysis.capture import Captured
from popc.analysis.linears import Linear
from popc.analysis.propagation import shape
from popc.analysis.tokens import Mask
from popc.ops import gather_experts, gather_linear, select_kernel, select_units
from popc.passes.base import UNCHANGED, Binding, Call, PassResult, UnitState
from popc.passes.builder import GraphBuilder, add_input, finish, replace
from popc.passes.experts import expert_of_rows, flat_input, shaped_output
from popc.passes.padding import valid_rows_node
from popc.passes.region_binding import RegionBinding, weights_of
from popc.planning.packing import Packing, Slot
from popc.planning.rewrite_plan import RewritePlan

aten = torch.ops.aten


def prune_units(captured: Captured, work: RewritePlan) -> PassResult:
    """Prune the regions of ``work.pruned``."""
    if not work.pruned:
        return UNCHANGED
    binding = _Partitions(captured, work)
    binding.packing = gather_units(captured, work.pruned, work.config.scope)
    return PassResult(len(work.pruned), binding)


class _Partitions(Binding[UnitState]):
    """Feeds the lists of a partition, their norms, and what compensates for pruned units."""

    prunes = True
    owners: Sequence[RegionBinding]
    packing: Packing

    def __init__(self, captured: Captured, work: RewritePlan) -> None:
        self.slots, self.config = work.pruned, work.config
        self.owners = [RegionBinding.of(slot.region, captured) for slot in work.pruned]

    def state(self, args: Sequence[Any]) -> UnitState:
        pairs = zip(self.owners, self.slots, strict=True)
        return UnitState(
            [
                owner.state(args, slot.counts, self.config.unit_policy(slot.region.kind))
                for owner, slot in pairs
            ]
        )

    def feed(self, call: Call, state: UnitState) -> Sequence[Tensor] | None:
        partition = call.session.units.partition(
            state, state.owners, self.packing, self.config.scope, call.batch
        )
        if partition is None:
            return None
        call.partition = partition
        if not self.packing.compensating:
            return partition.index, partition.norm
        if partition.compensation is None:
            partition.compensation = self._compensation(call.args, partition.lost)
        return partition.index, partition.norm, partition.compensation

    def known(self, call: Call, state: UnitState) -> Mapping[Hashable, bool]:
        knows = call.session.units.knows
        return {r.key: knows(r, self.config.scope, call.sequences) for r in state.owners}

    def _compensation(self, args: Sequence[Any], lost: Sequence[Tensor]) -> Tensor:
        """``W`` times the means of pruned units, consumer after consumer, float32."""
        pairs = zip(self.owners, self.packing.slots, strict=True)
        compensating = [owner for owner, slot in pairs if slot.compensates]
        parts = []
        for owner, mean in zip(compensating, lost, strict=True):
            for linear, weight in weights_of(owner.region.consumers, owner.weights, args):
                wide = weight.float()
                parts.append(mean @ (wide.mT if linear.weight.out_dim == 0 else wide))
        total = torch.cat(parts, dim=-1)
        return total if self.config.scope == "sequence" else total[0]


def gather_units(captured: Captured, slots: Sequence[Slot], scope: str) -> Packing:
    """Rewrite the regions of ``slots``; the graph gains two inputs, or three.

    - ``popc_index`` int64 ``[total]``: the lists, as the returned packing lays them out;
      ``[B, total]`` for ``scope="sequence"``.
    - ``popc_norm`` float32: ``‖W[:, columns]‖`` of each live unit, region after region.
    - ``popc_compensation`` float32, if a slot compensates: what is added to the output of each
      consumer of such slots, one after the other.
    """
    rewrite = _Rewrite(captured, Packing(slots), scope)
    rewrite.run()
    finish(captured)
    return rewrite.packing


class _Rewrite:
    def __init__(self, captured: Captured, packing: Packing, scope: str) -> None:
        self.captured, self.packing, self.scope = captured, packing, scope
        self.graph = captured.gm.graph
        self.memo: dict[Mask, fx.Node] = {}
        self.experts: dict[Linear, fx.Node] = {}
        hidden = packing.slots[0].region.hidden
        # One list for the batch, or one for each sequence.
        self.lead = () if scope == "batch" else (shape(hidden)[0],)
        with captured.fake_mode:
            device = hidden.meta["val"].device
            index = torch.empty((*self.lead, packing.total), dtype=torch.int64, device=device)
            norm = torch.empty((*self.lead, packing.norm_total), device=device)
        self.index = add_input(captured, "popc_index", index)
        self.norm = add_input(captured, "popc_norm", norm)
        self.added: dict[fx.Node, list[tuple[int, int]]] = {}
        stop = 0
        for linear in (c for slot in packing.compensating for c in slot.region.consumers):
            start, stop = stop, stop + linear.outputs
            self.added.setdefault(linear.node, []).append((start, stop))
        if self.added:
            with captured.fake_mode:
                value = torch.empty((*self.lead, stop), device=device)
            self.compensation = add_input(captured, "popc_compensation", value)

    def run(self) -> None:
        """Linear by linear, in graph order: producers, consumers, and those that are both."""
        linears: dict[fx.Node, Linear] = {}
        rows: dict[fx.Node, list[int]] = {}
        columns: dict[fx.Node, list[int]] = {}
        late: dict[fx.Node, int] = {}
        for i, slot in enumerate(self.packing.slots):
            for producer in slot.listed:
                linears[producer.linear.node] = producer.linear
                rows.setdefault(producer.linear.node, []).append(i)
            if slot.gate is not None:
                linears[slot.gate.late.node] = slot.gate.late
                late[slot.gate.late.node] = i
                for node in (slot.gate.late.node, *slot.gate.path):
                    slot.gate.product.prepend(node)
            for linear in slot.region.consumers:
                linears[linear.node] = linear
                columns.setdefault(linear.node, []).append(i)
        active: dict[int, fx.Node] = {}
        for node in list(self.graph.nodes):
            if node not in linears:
                continue
            linear = linears[node]
            if node in late:
                gate = self.packing.slots[late[node]].gate
                assert gate is not None
                active[late[node]] = self._select(late[node], node, gate.scored, linear)
            for i in columns.get(node, []):
                if i not in active:
                    active[i] = self._select(i, node, linear.x, linear)
            with self.graph.inserting_before(node):
                chosen = {i: active[i] for i in columns.get(node, [])}
                if linear.experts is not None:
                    y = self._stack(linear, rows.get(node, []), chosen)
                else:
                    after_gate = active[late[node]] if node in late else None
                    y = self._linear(linear, rows.get(node, []), after_gate, chosen)
                for place in self.added.get(node, []):
                    y = self._compensated(y, node, *place)
            replace(node, y)

    def _list(self, builder: GraphBuilder, *name: object) -> fx.Node | None:
        place = self.packing.place(*name)
        return None if place is None else builder.call(aten.slice.Tensor, self.index, -1, *place)

    def _compensated(self, y: fx.Node, linear: fx.Node, start: int, stop: int) -> fx.Node:
        builder = GraphBuilder(self.captured, linear)
        part = builder.part(self.compensation, start, stop, y)
        return builder.call(aten.add.Tensor, y, part)

    def _select(self, i: int, at: fx.Node, h: fx.Node, linear: Linear) -> fx.Node:
        """The active units' columns: ``[k]``, or a list for each sequence or expert's row.

        Args:
            at: before which the choice stands. h: what it goes by.
        """
        slot = self.packing.slots[i]
        region, counts = slot.region, slot.counts
        valid = None
        if region.one_pass:
            valid = valid_rows_node(self.captured, h, at, self.memo)
        with self.graph.inserting_before(at):
            builder = GraphBuilder(self.captured, h)
            if valid is not None:
                zeros = builder.call(aten.zeros_like.default, h)
                h = builder.call(aten.where.self, valid, h, zeros)
            stack = (region.experts,) if region.experts else ()
            lead = tuple(builder.size(h, 0) for _ in self.lead)
            listed = self._list(builder, "columns", i)
            shaped = [*lead, *stack, counts.live, region.columns.shape[1]]
            listed = builder.call(aten.view.default, listed, shaped)
            start = self.packing.norm_starts[i]
            stop = start + counts.live * max(1, region.experts)
            norm = builder.call(aten.slice.Tensor, self.norm, -1, start, stop)
            if stack:
                norm = builder.call(aten.view.default, norm, [*stack, counts.live])
                expert = self._expert(builder, linear)
                h = flat_input(builder, linear)
                listed = builder.call(aten.index.Tensor, listed, [expert])
                norm = builder.call(aten.index.Tensor, norm, [expert])
            return builder.call(select_units, h, norm, listed, counts.retained, counts.active)

    def _expert(self, builder: GraphBuilder, linear: Linear) -> fx.Node:
        if linear not in self.experts:
            self.experts[linear] = expert_of_rows(builder, linear)
        return self.experts[linear]

    def _linear(
        self,
        linear: Linear,
        producing: Sequence[int],
        chosen_rows: fx.Node | None,
        chosen: Mapping[int, fx.Node],
    ) -> fx.Node:
        """The linear again, with its lists.

        Args:
            producing: slots of which it computes live units' rows.
            chosen_rows: in place of those, where it comes after a gate.
            chosen: the active units' columns of each slot that it contracts.
        """
        builder = GraphBuilder(self.captured, linear.node)
        weight = linear.weight
        listed = [self._rows(builder, i, linear) for i in producing]
        rows = chosen_rows or self._joined(builder, listed, "fixed rows", linear)
        columns = self._joined(builder, list(chosen.values()), "fixed columns", linear)
        op = select_kernel(gather_linear, linear.x.meta["val"], weight.node.meta["val"])
        return builder.call(op, linear.x, weight.node, linear.bias, rows, columns, weight.out_dim)

    def _stack(
        self, linear: Linear, producing: Sequence[int], chosen: Mapping[int, fx.Node]
    ) -> fx.Node:
        """The same for a stack of experts.

        Which of them run dense is marked for each slot, and the op takes one mark: a linear of
        several slots reads the columns of one by its lists, and computes all rows of the others.
        """
        builder = GraphBuilder(self.captured, linear.node)
        owner = next(iter([*chosen, *producing]))
        listed = []
        for i in producing if {*producing, *chosen} == {owner} else []:
            sizes = [linear.experts.count, -1]  # type: ignore[union-attr]
            listed.append(builder.call(aten.view.default, self._rows(builder, i, linear), sizes))
        rows = self._joined(builder, listed, "fixed rows", linear)
        columns = self._joined(builder, list(chosen.values()), "fixed columns", linear)
        full = self._list(builder, "full", owner)
        x, expert = flat_input(builder, linear), self._expert(builder, linear)
        weight = linear.weight
        op = select_kernel(gather_experts, linear.x.meta["val"], weight.node.meta["val"])
        y = builder.call(op, x, weight.node, expert, full, rows, columns, weight.out_dim - 1)
        return shaped_output(builder, linear, y)

    def _rows(self, builder: GraphBuilder, i: int, linear: Linear) -> fx.Node:
        rows = self._list(builder, "rows", i, linear.node)
        assert rows is not None
        return rows

    def _joined(
        self, builder: GraphBuilder, lists: list[fx.Node], rest: str, linear: Linear
    ) -> fx.Node | None:
        """Lists of several regions, and the channels that are in none, as one."""
        if not lists:
            return None
        fixed = self._list(builder, rest, linear.node)
        if fixed is not None:
            if len(shape(lists[0])) > len(shape(fixed)):
                sizes = [builder.size(lists[0], 0), shape(fixed)[0]]
                fixed = builder.call(aten.expand.default, fixed, sizes)
            lists = [*lists, fixed]
        return builder.call(aten.cat.default, lists, -1) if len(lists) > 1 else lists[0]

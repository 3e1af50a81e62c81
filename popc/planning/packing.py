"""How a partition reaches a decode graph: all its lists in one index tensor and one of norms.

The pass that writes the graph and the state that fills its inputs both read the layout off here.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from popc.analysis.findings import Producer, Region
from popc.analysis.gates import Gate
from popc.config import Config
from popc.policies import Counts


@dataclass(frozen=True, eq=False)
class Slot:
    """A region as a graph prunes it.

    ``rows`` is False where the producers stay dense, since the pass that scores is the pass that
    prunes: see :func:`popc.analysis.causality.runs_in_one_pass`. With a ``gate`` its first factor
    is scored. ``compensates``: consumers add what the pruned units give on average.
    """

    region: Region
    counts: Counts
    rows: bool
    gate: Gate | None = None
    compensates: bool = False

    @property
    def listed(self) -> list[Producer]:
        """The producers of which live units' rows are read."""
        late = None if self.gate is None else self.gate.late
        return [p for p in self.region.producers if self.rows and p.linear is not late]


def slot_of(region: Region, config: Config) -> Slot:
    """In one pass, all units are candidates: the score of this very pass decides."""
    counts = config.counts(region.units, region.kind)
    if region.one_pass:
        return Slot(region, Counts(0, region.units, counts.active), rows=False)
    compensates = config.unit_policy(region.kind).compensates
    gate = region.gate if config.scores_gates(region) else None
    return Slot(region, counts, True, gate, compensates)


@dataclass(frozen=True, eq=False)
class _Segment:
    """A segment of the index: ``table [U, m]`` at the live units of ``slot``; the same for every
    partition if ``slot`` is -1; the experts that run dense if ``table`` is None."""

    start: int
    size: int
    slot: int
    table: Tensor | None


class Packing:
    """The layout of ``popc_index`` and ``popc_norm``: ``[total]``, or ``[B, total]``."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = list(slots)
        self.compensating = [slot for slot in self.slots if slot.compensates]
        self._segments: dict[Hashable, _Segment] = {}
        self.total = 0
        self.norm_starts: list[int] = []
        self.norm_total = 0
        rows: dict[fx.Node, list[np.ndarray]] = {}
        columns: dict[fx.Node, list[np.ndarray]] = {}
        for i, slot in enumerate(self.slots):
            region, stack = slot.region, max(1, slot.region.experts)
            for producer in slot.listed:
                node = producer.linear.node
                self._add(("rows", i, node), i, producer.rows, stack)
                rows.setdefault(node, []).append(producer.rows)
            self._add(("columns", i), i, region.columns, stack)
            for linear in region.consumers:
                columns.setdefault(linear.node, []).append(region.columns)
            if region.experts:
                self._add(("full", i), i, None, stack)
            self.norm_starts.append(self.norm_total)
            self.norm_total += slot.counts.live * stack
        sizes = {p.linear.node: p.linear.outputs for s in self.slots for p in s.listed}
        for node, tables in rows.items():
            self._add_rest(("fixed rows", node), sizes[node], tables)
        widths = {c.node: c.inputs for s in self.slots for c in s.region.consumers}
        for node, tables in columns.items():
            self._add_rest(("fixed columns", node), widths[node], tables)

    def _add(self, name: Hashable, slot: int, table: np.ndarray | None, stack: int) -> None:
        live = self.slots[slot].counts.live
        size = stack if table is None else stack * live * table.shape[1]
        units = None if table is None else torch.from_numpy(np.ascontiguousarray(table))
        self._segments[name] = _Segment(self.total, size, slot, units)
        self.total += size

    def _add_rest(self, name: Hashable, size: int, tables: list[np.ndarray]) -> None:
        """Channels of a linear that are in no region: always read."""
        used = np.concatenate([table.ravel() for table in tables])
        rest = np.setdiff1d(np.arange(size), used)
        if len(rest):
            self._segments[name] = _Segment(self.total, len(rest), -1, torch.from_numpy(rest))
            self.total += len(rest)

    def place(self, *name: Hashable) -> tuple[int, int] | None:
        """Where a list starts and ends in the index; None if there is none of this name."""
        segment = self._segments.get(name)
        return None if segment is None else (segment.start, segment.start + segment.size)

    def pack(self, live: Sequence[Tensor], full: Sequence[Tensor | None]) -> Tensor:
        """The index ``[S, total]``.

        Args:
            live: for each slot, its live units ``[S, n]``, R then C; ``[E, n]`` with experts.
            full: for each slot with experts, which of them run dense, bool ``[E]``.
        """
        plain = [units.shape[0] for units, dense in zip(live, full, strict=True) if dense is None]
        sequences = max(plain, default=1)
        device = live[0].device
        parts = []
        for segment in self._segments.values():
            if segment.slot < 0:
                assert segment.table is not None
                parts.append(segment.table.to(device).expand(sequences, -1))
            elif segment.table is None:
                dense = full[segment.slot]
                assert dense is not None
                parts.append(dense.to(torch.int64)[None].expand(sequences, -1))
            else:
                listed = segment.table.to(device)[live[segment.slot]]
                wide = 1 if full[segment.slot] is not None else listed.shape[0]
                parts.append(listed.reshape(wide, -1).expand(sequences, -1))
        return torch.cat(parts, dim=-1)

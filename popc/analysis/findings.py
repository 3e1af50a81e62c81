"""What the analysis finds within a graph, tied to its nodes: passes rewrite the graph by it.

What is to outlive the graph is data: the ``record`` of each (``popc.Region`` is a region's), and
the :class:`popc.Plan` of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import fx

from popc.analysis.gates import Gate, find_gate
from popc.analysis.linears import Linear
from popc.analysis.plan import LinearRecord, Plan, ProducerRecord, RegionRecord, Skipped
from popc.analysis.propagation import shape
from popc.analysis.provenance import where
from popc.analysis.sizes import attention_sizes, experts_met, reads_context

if TYPE_CHECKING:
    from popc.analysis.input_groups import InputGroup


@dataclass(frozen=True, eq=False)
class Producer:
    """A linear that writes channels of a region.

    ``rows`` int64 ``[U, m]``: its output channels that belong to each unit.
    """

    linear: Linear
    rows: np.ndarray


@dataclass(frozen=True, eq=False)
class Region:
    """A region in its graph: see :class:`popc.analysis.plan.RegionRecord` for what one is.

    Attributes:
        producers: linears that write the units' channels.
        body: the ops between producers and consumers, in graph order.
        hidden: h, what the consumers read.
        columns: int64 ``[U, m]``, the positions of each unit along h's contracted dim.
        consumers: linears that contract h.
        kind, name, units, cached, key, source, one_pass: as in the record.
    """

    kind: str
    name: str
    units: int
    producers: tuple[Producer, ...]
    body: tuple[fx.Node, ...]
    hidden: fx.Node
    columns: np.ndarray
    consumers: tuple[Linear, ...]
    cached: bool
    key: tuple[Any, ...]
    source: str = ""
    one_pass: bool = False

    @property
    def experts(self) -> int:
        """E, the number of experts whose weights are stacked; 0 in other regions."""
        experts = self.consumers[0].experts
        return experts.count if experts is not None else 0

    @property
    def by_grade(self) -> bool:
        """Whether it has experts, each of which can read its inputs by grade."""
        stored = (linear.weight.has_channel_planes for linear in self.linears)
        return bool(self.experts) and not self.one_pass and all(stored)

    @property
    def linears(self) -> list[Linear]:
        """Those that write its channels, then those that contract them."""
        return [*(producer.linear for producer in self.producers), *self.consumers]

    @property
    def width(self) -> int:
        """K, the size of h along the contracted dim."""
        return self.consumers[0].inputs

    @cached_property
    def gate(self) -> Gate | None:
        """Where its channels are a product of which one factor can be computed first."""
        return find_gate(self)

    @cached_property
    def record(self) -> RegionRecord:
        """The region as plain data, with all sizes that its costs are made of."""
        producers = tuple(
            ProducerRecord(record_of(p.linear), p.rows, reads_context(p.linear, self))
            for p in self.producers
        )
        late = None
        if self.gate is not None:
            late = [p.linear.node for p in self.producers].index(self.gate.late.node)
        return RegionRecord(
            kind=self.kind,
            name=self.name,
            units=self.units,
            columns=self.columns,
            rank=len(shape(self.hidden)),
            producers=producers,
            consumers=tuple(map(record_of, self.consumers)),
            cached=self.cached,
            key=self.key,
            source=self.source,
            one_pass=self.one_pass,
            by_grade=self.by_grade,
            late=late,
            input_channels=sum({linear.x: linear.inputs for linear in self.linears}.values()),
            experts_met=experts_met(self),
            attention=attention_sizes(self) if self.kind == "attention" else None,
        )

    def coarsened(self, columns: np.ndarray) -> Region:
        """With units that are unions of its own: those of ``columns [U', m']``."""
        coarse = np.full(self.width, -1)
        coarse[columns] = np.arange(len(columns))[:, None]
        order = np.argsort(coarse[self.columns[:, 0]], kind="stable")
        producers = tuple(
            Producer(p.linear, p.rows[order].reshape(len(columns), -1)) for p in self.producers
        )
        return replace(self, units=len(columns), columns=columns, producers=producers)


def record_of(linear: Linear) -> LinearRecord:
    """A linear as plain data; it must be of :func:`popc.analysis.linears.all_linears`."""
    assert linear.position is not None
    weight, bias = linear.weight, linear.bias
    return LinearRecord(
        op=str(linear.node.target),
        name=where(linear.node),
        inputs=linear.inputs,
        outputs=linear.outputs,
        experts=0 if linear.experts is None else linear.experts.count,
        weight=weight.identity,
        out_dim=weight.out_dim,
        bytes=weight.bytes,
        element_bytes=weight.element_bytes,
        bias_bytes=0 if bias is None else int(bias.meta["val"].element_size()),
        position=linear.position,
    )


@dataclass
class Findings:
    """Regions, inputs and refusals of one graph: a backend refuses what it must leave dense.

    Attributes:
        regions: what can be pruned, in graph order.
        skipped: linears left dense, each with its reason.
        inputs: linears of which a decode step leaves input channels out, by what they read.
    """

    regions: list[Region] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    inputs: list[InputGroup] = field(default_factory=list)

    def refuse(self, reasons: Mapping[Region | InputGroup, str], kind: str) -> None:
        """Turn the regions and inputs that have a reason into refusals."""
        self.skipped += [Skipped(o.name, why, "", o.source, kind) for o, why in reasons.items()]
        self.regions = [region for region in self.regions if region not in reasons]
        self.inputs = [group for group in self.inputs if group not in reasons]

    def refuse_all(self, reason: str, kind: str) -> None:
        """Turn all regions and inputs into refusals; if there are none, refuse the graph."""
        owners: list[Region | InputGroup] = [*self.regions, *self.inputs]
        left = [Skipped(o.name, reason, "", o.source, kind, key=o.key) for o in owners]
        self.skipped += left or [Skipped("the graph", reason, kind=kind)]
        self.regions, self.inputs = [], []

    def plan(self) -> Plan:
        """All of it as plain data."""
        regions, groups = [r.record for r in self.regions], [g.record for g in self.inputs]
        return Plan(regions, list(self.skipped), groups)

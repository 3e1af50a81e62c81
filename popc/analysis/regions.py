"""Find regions: follow every output channel of every linear to where it is contracted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import fx

from popc.analysis.capture import Captured
from popc.analysis.causality import runs_in_one_pass
from popc.analysis.findings import Findings, Producer, Region, record_of
from popc.analysis.labeled_graph import LabeledGraph, Side
from popc.analysis.labels import NONE, Event, LabeledValue, same_size
from popc.analysis.linears import uses_of_weights
from popc.analysis.plan import Skipped
from popc.analysis.propagation import shape
from popc.analysis.provenance import common, source_of, where
from popc.analysis.rules.traits import Trait, has
from popc.analysis.wrapped import refusal


def find_regions(captured: Captured) -> Findings:
    """Every prunable region of the graph, and a refusal for each linear that is in none."""
    return _Analysis(LabeledGraph(captured)).findings()


class _Analysis:
    """What the labels of a graph's values say: which channels are pruned together, and which not.

    ``classes`` holds the class of each label: tied labels share one, and a class is a unit.
    """

    def __init__(self, labeled: LabeledGraph) -> None:
        self.labeled = labeled
        self.order = labeled.order
        self.flow = labeled.propagation.flow
        self.producers, self.consumers = labeled.producers, labeled.consumers
        self.uses = uses_of_weights(labeled.linears)
        self.classes = self.flow.classes()

    def findings(self) -> Findings:
        findings = Findings()
        spoiled = self._marked([event.labels for event in self.flow.spoiled])
        attention = self._marked(
            [value.labels for _, value, _ in self.labeled.propagation.attention]
        )
        cached = self._marked([np.array(sorted(self.labeled.cached), dtype=np.int64)])
        pruned: set[fx.Node] = set()
        groups = []
        for group in self._groups():
            group = group[~spoiled[group]]
            if len(group) < 2:
                continue
            region = self._region(group, attention, cached)
            if region is not None:
                findings.regions.append(region)
                groups.append(group)
                pruned.update(producer.linear.node for producer in region.producers)
        findings.regions = self._with_bodies(findings.regions, groups)
        findings.regions.sort(key=lambda region: self.order[region.consumers[0].node])
        left = [side for side in self.producers if side.linear.node not in pruned]
        findings.skipped += map(self._refusal, left)
        findings.skipped += [refusal(node, kind) for node, kind in self.labeled.wrapped.items()]
        return findings

    def _marked(self, labels: list[np.ndarray]) -> np.ndarray:
        """For each class, whether it is that of one of ``labels``."""
        marked = np.zeros(len(self.classes), dtype=bool)
        for part in labels:
            marked[self.classes[part[part != NONE]]] = True
        return marked

    def _groups(self) -> list[np.ndarray]:
        """Classes with the same signature: as many rows and columns of the same linears."""
        signature = np.zeros(len(self.classes), dtype=np.uint64)
        contracted = np.zeros(len(self.classes), dtype=bool)
        for number, side in enumerate((*self.producers, *self.consumers)):
            classes, counts = np.unique(
                self.classes[side.labels[side.labels != NONE]], return_counts=True
            )
            signature[classes] += _hashed(counts.astype(np.uint64), number)
            if number >= len(self.producers):
                contracted[classes] = True
        classes = np.flatnonzero(contracted)
        if not len(classes):
            return []
        order = classes[np.argsort(signature[classes], kind="stable")]
        cuts = np.flatnonzero(np.diff(signature[order]) != 0) + 1
        return [group for group in np.split(order, cuts) if len(group) > 1]

    def _region(
        self, group: np.ndarray, attention: np.ndarray, cached: np.ndarray
    ) -> Region | None:
        """The region of a group of classes, or None where it can't be one: see _refusal."""
        member = np.zeros(len(self.classes), dtype=bool)
        member[group] = True
        consumers = [side for side in self.consumers if self._touches(side, member)]
        producers = [side for side in self.producers if self._touches(side, member)]
        if not producers or _consumers_differ(consumers):
            return None
        columns = self._places(consumers[0], member)
        number = {c: i for i, c in enumerate(self.classes[consumers[0].labels[columns[:, 0]]])}
        tables = []
        for side in producers:
            rows = self._places(side, member)
            units = [number[c] for c in self.classes[side.labels[rows[:, 0]]]]
            tables.append(Producer(side.linear, rows[np.argsort(units)]))
        linears = [side.linear for side in consumers]
        identities = tuple(linear.weight.identity for linear in linears)
        experts = {linear.experts.count if linear.experts else 0 for linear in linears}
        experts |= {p.linear.experts.count if p.linear.experts else 0 for p in tables}
        if len(experts) > 1:
            return None
        kind = "experts" if experts != {0} else "mlp"
        if kind == "mlp" and attention[group].any():
            kind = "attention"
        labeled, hidden = self.labeled, linears[0].x
        if any(linear.x is not hidden for linear in linears):
            hidden = _unflattened(hidden)  # what the others are made of
        everything = [*(p.linear.node for p in tables), *(linear.node for linear in linears)]
        return Region(
            kind=kind,
            name=common([where(node) for node in everything]),
            units=len(group),
            producers=tuple(tables),
            body=(),
            hidden=hidden,
            columns=columns,
            consumers=tuple(linears),
            cached=bool(cached[group].any()),
            key=(identities, self.uses[linears[0].node], int(columns[0, 0])),
            source=source_of(linears[0].node),
            one_pass=runs_in_one_pass(
                hidden,
                labeled.graph,
                labeled.caches,
                labeled.propagation.captured.parameters,
            ),
        )

    def _touches(self, side: Side, member: np.ndarray) -> bool:
        labels = side.labels[side.labels != NONE]
        return bool(member[self.classes[labels]].any())

    def _places(self, side: Side, member: np.ndarray) -> np.ndarray:
        """``[U, m]``: where each class of a group is on one side of a linear, in that order."""
        classes = np.where(side.labels == NONE, -1, self.classes[side.labels])
        places = np.flatnonzero((classes >= 0) & member[classes])
        by_class = places[np.argsort(classes[places], kind="stable")]
        units = len(np.unique(classes[places]))
        table = by_class.reshape(units, -1)  # the signature says that all have as many
        return table[np.argsort(table[:, 0], kind="stable")]

    def _with_bodies(self, regions: list[Region], groups: list[np.ndarray]) -> list[Region]:
        """The regions with the ops between their producers and consumers."""
        number = np.full(len(self.classes), -1)
        for i, group in enumerate(groups):
            number[group] = i
        bodies: list[list[fx.Node]] = [[] for _ in regions]
        producers = {side.linear.node for side in self.producers}
        for node, value in self.labeled.propagation.carried.items():
            if not isinstance(value, LabeledValue) or node in producers or node.op == "placeholder":
                continue
            labels = value.labels[value.labels != NONE]
            for i in np.unique(number[self.classes[labels]]):
                if i >= 0:
                    bodies[i].append(node)
        return [
            replace(region, body=tuple(sorted(body, key=self.order.__getitem__)))
            for region, body in zip(regions, bodies, strict=True)
        ]

    def _refusal(self, side: Side) -> Skipped:
        """Why the output channels of a linear are in no region."""
        classes = self.classes[side.labels]
        units = len(np.unique(classes))
        spoiled = self.flow.spoiled
        mixes = self.flow.mixes if units == 1 and side.linear.outputs > 1 else []

        def first(events: list[Event], labels: np.ndarray, of: np.ndarray | None) -> Event | None:
            near = [
                event
                for event in events
                if np.isin(event.labels if of is None else of[event.labels], labels).any()
            ]
            return min(near, key=lambda event: self.order[event.node], default=None)

        event = first([*spoiled, *mixes], side.labels, None)
        event = event or first([*spoiled, *mixes], classes, self.classes)
        linear, at = record_of(side.linear), source_of(side.linear.node)
        if event is not None:
            why = event.reason
            if event in mixes:
                why += ", so all its channels are one unit"
            op = str(getattr(event.node, "target", event.node))
            return Skipped(linear.name, why, op, source_of(event.node) or at, event.kind, linear)
        if units == 1:
            why = "a single unit: there is nothing to choose from"
            return Skipped(linear.name, why, "", at, "single unit", linear)
        member = np.zeros(len(self.classes), dtype=bool)
        member[classes] = True
        consumers = [c for c in self.consumers if self._touches(c, member)]
        if not consumers:
            why = "no linear contracts the channels"
            return Skipped(linear.name, why, "", at, "no consumer", linear)
        if _consumers_differ(consumers):
            why = "different values of the channels are contracted, so no single score ranks them"
            op = str(consumers[1].linear.node.target)
            return Skipped(linear.name, why, op, at, "different values", linear)
        why = "its units have different numbers of channels"
        return Skipped(linear.name, why, "", at, "uneven units", linear)


def _consumers_differ(consumers: list[Side]) -> bool:
    return len({_unflattened(side.linear.x) for side in consumers}) != 1


def _unflattened(x: fx.Node) -> fx.Node:
    """What ``x`` has the same rows as, before they were laid out along other dims."""
    while has(x, Trait.RESHAPE):
        source = x.all_input_nodes[0]
        if not same_size(shape(source)[-1], shape(x)[-1]):
            break
        x = source
    return x


def _hashed(counts: np.ndarray, number: int) -> np.ndarray:
    """splitmix64 of (count, number of the linear): sums of them tell signatures apart."""
    with np.errstate(over="ignore"):
        x = counts * np.uint64(0x9E3779B97F4A7C15) + np.uint64(number + 1) * np.uint64(
            0xD1B54A32D192ED03
        )
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

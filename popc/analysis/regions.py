"""Find regions: follow every output channel of every linear to where it is contracted."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import fx

from popc.analysis.capture import Captured, may_alias
from popc.analysis.findings import Findings, Producer, Region, record_of
from popc.analysis.labels import NONE, Event, LabeledValue, Mixes
from popc.analysis.linears import Linear, all_linears, uses_of_weights
from popc.analysis.plan import Skipped
from popc.analysis.propagation import Propagation, shape
from popc.analysis.provenance import common, source_of, where
from popc.analysis.rules.joins import unview
from popc.analysis.rules.reductions import CONTRACTIONS
from popc.analysis.rules.table import rule_of
from popc.analysis.tokens import runs_in_one_pass
from popc.analysis.wrapped import op_name, refusal, why, wrapped_linears
from popc.log import logger

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class _Side:
    """One side of a linear: the labels of its output channels, or of its input channels."""

    linear: Linear
    labels: np.ndarray


def find_regions(captured: Captured) -> Findings:
    """Every prunable region of the graph, and a refusal for each linear that is in none."""
    return _Analysis(captured).findings()


class _Analysis:
    """The walk over a graph, and what it concludes."""

    def __init__(self, captured: Captured) -> None:
        self.graph = captured.gm.graph
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}
        self.walk = Propagation(captured)
        self.producers: list[_Side] = []
        self.consumers: list[_Side] = []
        self.linears = {linear.node: linear for linear in all_linears(captured)}
        self.leaks: list[fx.Node] = []
        self.caches: set[fx.Node] = set()
        self.wrapped = wrapped_linears(captured)
        for node in self.graph.nodes:
            self._visit(node)
        self.uses = uses_of_weights(self.linears.values())
        self.cached = self._judge_leaks()
        self.classes = self.walk.flow.classes()

    # --- the walk ---

    def _visit(self, node: fx.Node) -> None:
        walk = self.walk
        if node.op == "output":
            self.leaks += [n for n in node.all_input_nodes if walk.of(n) is not None]
            return
        if node.op not in ("call_function", "call_method"):
            return
        linear = self.linears.get(node)
        if linear is not None:
            try:
                walk.carried[node] = self._through(linear)
            except Mixes as mixes:
                held = walk.of(linear.x)
                walk.flow.spoil(held.labels, f"{node.target} {mixes}", node, mixes.kind)  # type: ignore[union-attr]
            return
        if node.target is operator.getitem:
            source, number = node.args
            pieces = walk.carried.get(source) if isinstance(source, fx.Node) else None
            if isinstance(pieces, list) and isinstance(number, int):
                walk.carried[node] = pieces[number]
            return
        incoming = [held for n in node.all_input_nodes if (held := walk.of(n)) is not None]
        if not incoming or node.target is aten.sym_size.int:
            return
        rule = rule_of(node.target)
        try:
            if node in self.wrapped:
                raise Mixes(f"reads them, and {why(self.wrapped[node])}", "subclass")
            if rule is None:
                raise Mixes("mixes channels, as far as popc knows", "unknown op")
            walk.carried[node] = rule(walk, node)
            if node not in walk.scores and any(n in walk.scores for n in node.all_input_nodes):
                # A product with values sums over the pairs; all else keeps them.
                if rule not in CONTRACTIONS:
                    walk.scores.add(node)
            if _is_mutable(node):
                self._write_back(node, node.args[0])
        except Mixes as mixes:
            for held in incoming:
                walk.flow.spoil(held.labels, f"{op_name(node)} {mixes}", node, mixes.kind)
        except Exception as error:
            # A form of the op that its rule does not foresee is refused, never guessed at.
            logger.info("%s: %s", node.format_node(), error)
            for held in incoming:
                reason = f"{node.target} could not be followed"
                walk.flow.spoil(held.labels, reason, node, "not followed")

    def _through(self, linear: Linear) -> LabeledValue:
        """Channels end here, and new ones are born."""
        walk = self.walk
        x, y = walk.of(linear.x), linear.y_dim
        sizes = shape(linear.node)
        mixed = False
        if x is not None:
            others = [dim for dim in range(len(x.dims)) if dim != linear.x_dim]
            if linear.x in walk.scores:
                mixed = True
            elif all(x.is_free(dim) for dim in others):
                self.consumers.append(_Side(linear, x.along(linear.x_dim)))
            else:
                # One linear for all heads, say: each output still belongs to its head.
                reason = "a linear that other channels share mixes them"
                held = walk.flow.mix(x, [linear.x_dim], linear.node, reason)
                if linear.experts is None:
                    return held.resized(linear.x_dim, sizes[y])
                walk.flow.spoil(x.labels, reason, linear.node)
        rows = walk.flow.fresh(linear.outputs)
        if mixed:
            # Talking heads: with one left out, the others would no longer be what they were.
            reason = "heads are mixed before their values are read"
            for labels in (x.labels, rows):  # type: ignore[union-attr]
                walk.flow.spoil(labels, reason, linear.node, "heads")
        self.producers.append(_Side(linear, rows))
        return LabeledValue.over(sizes, y, rows)

    def _write_back(self, node: fx.Node, base: object) -> None:
        """``node`` wrote in place: what ``base`` is a view of holds its labels from now on."""
        value = self.walk.of(node)
        walk = self.walk
        while isinstance(base, fx.Node) and value is not None:
            before = walk.of(base)
            if before is not None and (before.labels != NONE).any():
                letters = range(len(before.dims))
                pair = [(value, letters), (before, letters)]
                value = walk.flow.combine(pair, letters, dict(enumerate(shape(base))))
            elif self._is_viewed_elsewhere(base, node):
                raise Mixes("writes in place to a value that has other views")
            walk.carried[base] = value
            if base.op == "placeholder":
                self.leaks.append(base)
                return
            if not may_alias(base):
                return
            value = unview(walk, base, value)
            (base, *_) = base.all_input_nodes

    def _is_viewed_elsewhere(self, base: fx.Node, writer: fx.Node) -> bool:
        """Whether a view taken of ``base`` before ``writer`` wrote to it is read afterwards."""
        own = writer.args[0]
        return any(
            self.order[view] < self.order[writer] < max(self.order[user] for user in view.users)
            for view in base.users
            if view is not own and view.op == "call_function" and view.users and may_alias(view)
        )

    # --- what leaves the graph ---

    def _judge_leaks(self) -> set[int]:
        """Spoil channels that leave the graph, but for keys and values: those go to a cache."""
        flow, walk = self.walk.flow, self.walk
        kept = self._keys_and_values()
        kept_labels = _unique([walk.of(node).labels for node in kept])  # type: ignore[union-attr]
        cached: set[int] = set()
        for leak in self.leaks:
            labels = walk.of(leak).labels  # type: ignore[union-attr]
            if _unsliced(leak, kept) in kept and np.isin(labels, kept_labels).all():
                cached.update(_unique([labels]).tolist())
                self.caches.add(leak)
            else:
                flow.spoil(labels, "the channels leave the graph", leak, "leaves the graph")
        return cached

    def _keys_and_values(self) -> set[fx.Node]:
        """Labelled values that an attention's keys and values are made of."""
        found: set[fx.Node] = set()
        queue = [node for _, _, operands in self.walk.attention for node in operands]
        linears = {side.linear.node for side in self.producers}
        while queue:
            node = queue.pop()
            if node in found or self.walk.carried.get(node) is None:
                continue
            if isinstance(self.walk.carried[node], LabeledValue):
                found.add(node)
            if node not in linears:
                queue += node.all_input_nodes
        return {node for node in found if self.walk.of(node) is not None}

    # --- conclusions ---

    def findings(self) -> Findings:
        found = Findings()
        spoiled = self._marked([event.labels for event in self.walk.flow.spoiled])
        attention = self._marked([held.labels for _, held, _ in self.walk.attention])
        cached = self._marked([np.array(sorted(self.cached), dtype=np.int64)])
        pruned: set[fx.Node] = set()
        groups = []
        for group in self._groups():
            group = group[~spoiled[group]]
            if len(group) < 2:
                continue
            region = self._region(group, attention, cached)
            if region is not None:
                found.regions.append(region)
                groups.append(group)
                pruned.update(producer.linear.node for producer in region.producers)
        found.regions = self._with_bodies(found.regions, groups)
        found.regions.sort(key=lambda region: self.order[region.consumers[0].node])
        left = [side for side in self.producers if side.linear.node not in pruned]
        found.skipped += map(self._refusal, left)
        found.skipped += [refusal(node, kind) for node, kind in self.wrapped.items()]
        return found

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
            found = self.classes[side.labels[side.labels != NONE]]
            classes, counts = np.unique(found, return_counts=True)
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
        hidden = linears[0].x
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
                hidden, self.graph, self.caches, self.walk.captured.parameters
            ),
        )

    def _touches(self, side: _Side, member: np.ndarray) -> bool:
        labels = side.labels[side.labels != NONE]
        return bool(member[self.classes[labels]].any())

    def _places(self, side: _Side, member: np.ndarray) -> np.ndarray:
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
        for node, value in self.walk.carried.items():
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

    def _refusal(self, side: _Side) -> Skipped:
        """Why the output channels of a linear are in no region."""
        own = self.classes[side.labels]
        units = len(np.unique(own))
        spoiled = self.walk.flow.spoiled
        mixes = self.walk.flow.mixes if units == 1 and side.linear.outputs > 1 else []

        def first(events: list[Event], labels: np.ndarray, of: np.ndarray | None) -> Event | None:
            near = [
                event
                for event in events
                if np.isin(event.labels if of is None else of[event.labels], labels).any()
            ]
            return min(near, key=lambda event: self.order[event.node], default=None)

        event = first([*spoiled, *mixes], side.labels, None)
        event = event or first([*spoiled, *mixes], own, self.classes)
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
        member[own] = True
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


def _is_mutable(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _unsliced(node: fx.Node, kept: set[fx.Node]) -> fx.Node:
    """What ``node`` is a slice of: a cache with a window keeps the last keys alone."""
    while node not in kept and node.target in (aten.slice.Tensor, aten.narrow.default, *_COPIES):
        (node,) = node.args[:1]  # type: ignore[assignment]
    return node


_COPIES = (aten.contiguous.default, aten.clone.default, aten.detach.default, aten.alias.default)


def _consumers_differ(consumers: list[_Side]) -> bool:
    return len({side.linear.x for side in consumers}) != 1


def _unique(parts: list[np.ndarray]) -> np.ndarray:
    flat = [part[part != NONE].ravel() for part in parts]
    return np.unique(np.concatenate(flat)) if flat else np.zeros(0, dtype=np.int64)


def _hashed(counts: np.ndarray, number: int) -> np.ndarray:
    """splitmix64 of (count, number of the linear): sums of them tell signatures apart."""
    with np.errstate(over="ignore"):
        x = counts * np.uint64(0x9E3779B97F4A7C15) + np.uint64(number + 1) * np.uint64(
            0xD1B54A32D192ED03
        )
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

"""Label a graph: labels start at the outputs of linears, follow the rules, and end at linears."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from popc.analysis.capture import Captured
from popc.analysis.labels import NONE, LabeledValue, Mixes
from popc.analysis.linears import Linear, all_linears
from popc.analysis.mutation import is_mutable, may_alias
from popc.analysis.propagation import Propagation, shape
from popc.analysis.rules.joins import unview
from popc.analysis.rules.registry import RuleError, rule_of
from popc.analysis.rules.traits import Trait, has
from popc.analysis.wrapped import op_name, why, wrapped_linears
from popc.log import logger

aten = torch.ops.aten

# Ops that sum over pairs of tokens, as a product with values does; all else keeps scores scores.
_SUMS = Trait.PRODUCT | Trait.LINEAR | Trait.ATTENTION


@dataclass(frozen=True, eq=False)
class Side:
    """One side of a linear: the labels of its output channels, or of its input channels."""

    linear: Linear
    labels: np.ndarray


class LabeledGraph:
    """A graph whose values have labels.

    Attributes:
        propagation: the labels, and what ties and spoils them.
        linears: every linear, in graph order.
        producers, consumers: their output sides, and the input sides that have channels.
        caches: values that leave the graph as a cache of keys or values.
        cached: the labels of these.
        wrapped: see :func:`popc.analysis.wrapped.wrapped_linears`.
        order: where each node stands in the graph.
    """

    def __init__(self, captured: Captured) -> None:
        self.graph = captured.gm.graph
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}
        self.propagation = Propagation(captured)
        self.producers: list[Side] = []
        self.consumers: list[Side] = []
        self.linears = all_linears(captured)
        self._linear_of = {linear.node: linear for linear in self.linears}
        self.caches: set[fx.Node] = set()
        self.wrapped = wrapped_linears(captured)
        self._leaks: list[fx.Node] = []
        for node in self.graph.nodes:
            self._visit(node)
        self.cached = self._resolve_leaks()

    def _visit(self, node: fx.Node) -> None:
        labels_of = self.propagation.of
        if node.op == "output":
            self._leaks += [n for n in node.all_input_nodes if labels_of(n) is not None]
            return
        if node.op not in ("call_function", "call_method"):
            return
        linear = self._linear_of.get(node)
        if linear is not None:
            self._visit_linear(linear)
        elif node.target is operator.getitem:
            self._visit_getitem(node)
        elif node.target is not aten.sym_size.int:
            incoming = [v for n in node.all_input_nodes if (v := labels_of(n)) is not None]
            if incoming:
                self._apply_rule(node, incoming)

    def _visit_linear(self, linear: Linear) -> None:
        propagation = self.propagation
        try:
            propagation.carried[linear.node] = self._labels_of_output(linear)
        except Mixes as mixes:
            x = propagation.of(linear.x)
            assert x is not None  # else nothing could be mixed
            reason = f"{linear.node.target} {mixes}"
            propagation.flow.spoil(x.labels, reason, linear.node, mixes.kind)

    def _visit_getitem(self, node: fx.Node) -> None:
        source, number = node.args
        outputs = self.propagation.carried.get(source) if isinstance(source, fx.Node) else None
        if isinstance(outputs, list) and isinstance(number, int):
            self.propagation.carried[node] = outputs[number]

    def _apply_rule(self, node: fx.Node, incoming: Sequence[LabeledValue]) -> None:
        """Label ``node`` by its op's rule; where it has none, its inputs' channels stay dense."""
        propagation = self.propagation
        rule = rule_of(node.target)
        try:
            if node in self.wrapped:
                raise Mixes(f"reads them, and {why(self.wrapped[node])}", "subclass")
            if rule is None:
                raise Mixes("mixes channels, as far as popc knows", "unknown op")
            propagation.carried[node] = rule(propagation, node)
            if not has(node, _SUMS):
                if not propagation.scores.isdisjoint(node.all_input_nodes):
                    propagation.scores.add(node)
            if is_mutable(node):
                self._write_back(node, node.args[0])
        except Mixes as mixes:
            reason, kind = f"{op_name(node)} {mixes}", mixes.kind
        except RuleError:
            raise
        except Exception as error:
            # A form of the op that its rule does not foresee is refused, never guessed at.
            logger.info("%s: %s", node.format_node(), error)
            reason, kind = f"{node.target} could not be followed", "not followed"
        else:
            return
        for value in incoming:
            propagation.flow.spoil(value.labels, reason, node, kind)

    def _labels_of_output(self, linear: Linear) -> LabeledValue:
        """The labels of a linear's output: its input's channels end here, and new ones start."""
        propagation = self.propagation
        x, y = propagation.of(linear.x), linear.y_dim
        sizes = shape(linear.node)
        mixed = False
        if x is not None:
            others = [dim for dim in range(len(x.dims)) if dim != linear.x_dim]
            if linear.x in propagation.scores:
                mixed = True
            elif all(x.is_free(dim) for dim in others):
                self.consumers.append(Side(linear, x.along(linear.x_dim)))
            else:
                # One linear for all heads, say: each output still belongs to its head.
                reason = "a linear that other channels share mixes them"
                value = propagation.flow.mix(x, [linear.x_dim], linear.node, reason)
                if linear.experts is None:
                    return value.resized(linear.x_dim, sizes[y])
                propagation.flow.spoil(x.labels, reason, linear.node)
        rows = propagation.flow.fresh(linear.outputs)
        if mixed:
            # Talking heads: with one left out, the others would no longer be what they were.
            reason = "heads are mixed before their values are read"
            for labels in (x.labels, rows):  # type: ignore[union-attr]
                propagation.flow.spoil(labels, reason, linear.node, "heads")
        self.producers.append(Side(linear, rows))
        return LabeledValue.over(sizes, y, rows)

    def _write_back(self, node: fx.Node, base: object) -> None:
        """``node`` wrote in place: what ``base`` is a view of holds its labels from now on."""
        propagation = self.propagation
        value = propagation.of(node)
        while isinstance(base, fx.Node) and value is not None:
            before = propagation.of(base)
            if before is not None and (before.labels != NONE).any():
                letters = range(len(before.dims))
                pair = [(value, letters), (before, letters)]
                value = propagation.flow.combine(pair, letters, dict(enumerate(shape(base))))
            elif self._is_viewed_elsewhere(base, node):
                raise Mixes("writes in place to a value that has other views")
            propagation.carried[base] = value
            if base.op == "placeholder":
                self._leaks.append(base)
                return
            if not may_alias(base):
                return
            value = unview(propagation, base, value)
            (base, *_) = base.all_input_nodes

    def _is_viewed_elsewhere(self, base: fx.Node, writer: fx.Node) -> bool:
        """Whether a view taken of ``base`` before ``writer`` wrote to it is read afterwards."""
        return any(
            self.order[view] < self.order[writer] < max(self.order[user] for user in view.users)
            for view in base.users
            if view is not writer.args[0]
            and (view.op == "call_function" and view.users and may_alias(view))
        )

    # --- what leaves the graph ---

    def _resolve_leaks(self) -> set[int]:
        """Spoil channels that leave the graph, but for keys and values: those go to a cache."""
        propagation = self.propagation
        kept = self._keys_and_values()
        kept_labels = _unique([propagation.of(node).labels for node in kept])  # type: ignore[union-attr]
        cached: set[int] = set()
        for leak in self._leaks:
            labels = propagation.of(leak).labels  # type: ignore[union-attr]
            if _unsliced(leak, kept) in kept and np.isin(labels, kept_labels).all():
                cached.update(_unique([labels]).tolist())
                self.caches.add(leak)
            else:
                reason = "the channels leave the graph"
                propagation.flow.spoil(labels, reason, leak, "leaves the graph")
        return cached

    def _keys_and_values(self) -> set[fx.Node]:
        """Labelled values that an attention's keys and values are made of."""
        values: set[fx.Node] = set()
        carried = self.propagation.carried
        queue = [node for _, _, operands in self.propagation.attention for node in operands]
        linears = {side.linear.node for side in self.producers}
        while queue:
            node = queue.pop()
            if node in values or carried.get(node) is None:
                continue
            if isinstance(carried[node], LabeledValue):
                values.add(node)
            if node not in linears:
                queue += node.all_input_nodes
        return values


def _unsliced(node: fx.Node, kept: set[fx.Node]) -> fx.Node:
    """What ``node`` is a slice of: a cache with a window keeps the last keys alone."""
    while node not in kept and has(node, Trait.SLICE | Trait.COPY):
        (node,) = node.args[:1]  # type: ignore[assignment]
    return node


def _unique(parts: list[np.ndarray]) -> np.ndarray:
    flat = [part[part != NONE].ravel() for part in parts]
    return np.unique(np.concatenate(flat)) if flat else np.zeros(0, dtype=np.int64)

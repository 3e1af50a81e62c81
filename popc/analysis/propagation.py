"""The labels of a graph's values as they are propagated, and what the rules for ops share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from popc.analysis.capture import Captured
from popc.analysis.labels import LabeledValue, LabelUnion, Mixes

aten = torch.ops.aten

Labels = LabeledValue | list[LabeledValue | None] | None


@dataclass
class Propagation:
    """What is known of one graph's values, as labels are propagated through it node by node.

    Attributes:
        carried: the labels of each value so far.
        attention: contractions of two activations, as in ``q kᵀ``; with their second operands.
        scores: values that hold a score for each pair of tokens, as ``q kᵀ`` does.
    """

    captured: Captured
    flow: LabelUnion = field(default_factory=LabelUnion)
    carried: dict[fx.Node, Labels] = field(default_factory=dict)
    attention: list[tuple[fx.Node, LabeledValue, list[fx.Node]]] = field(default_factory=list)
    scores: set[fx.Node] = field(default_factory=set)

    def of(self, value: Any) -> LabeledValue | None:
        """The labels of an argument, None if it has none."""
        labels = self.carried.get(value) if isinstance(value, fx.Node) else None
        return labels if isinstance(labels, LabeledValue) else None


Rule = Callable[[Propagation, fx.Node], Labels]


def shape(node: Any) -> torch.Size:
    """The shape of a node's value; sizes may be symbolic."""
    return node.meta["val"].shape


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument of ``node`` by its name in the op's schema; ``default`` if the op has none."""
    if name in node.kwargs:
        return node.kwargs[name]
    for i, known in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if known.name == name:
            return node.args[i] if i < len(node.args) else known.default_value
    return default


def is_tensor(value: Any) -> bool:
    """Whether ``value`` is a node whose value is one tensor."""
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


def only_input(propagation: Propagation, node: fx.Node, name: str | None = None) -> LabeledValue:
    """The labels of the input that a rule for one input is about: the first, or ``name``.

    Raises:
        Mixes: another input has labels, and this one has not.
    """
    value = argument(node, name) if name else node.args[0]
    labels = propagation.of(value)
    others = [other for other in node.all_input_nodes if other is not value]
    if labels is None or any(propagation.of(other) for other in others):
        raise Mixes("takes channels where it takes indices, sizes or weights")
    return labels


def dims_of(node: fx.Node, rank: int, name: str = "dim") -> list[int]:
    """Dims given by an argument, all if it is empty, as non-negative numbers."""
    dims = argument(node, name)
    if dims is None or dims == []:
        return list(range(rank))
    return [d % rank for d in (dims if isinstance(dims, list | tuple) else [dims])]


def order_of(node: fx.Node) -> list[int]:
    """Which dim of its input each dim of a transpose is; the last two change places where it names
    none."""
    rank = len(shape(node))
    if argument(node, "dims") is not None:
        return [dim % rank for dim in argument(node, "dims")]
    order = list(range(rank))
    if node.target is aten.numpy_T.default:
        return order[::-1]
    named = [argument(node, "dim0"), argument(node, "dim1")]
    if None in named:
        named = [argument(node, "axis0"), argument(node, "axis1")]
    a, b = (-1, -2) if None in named else named
    if rank > 1:
        order[a], order[b] = order[b], order[a]
    return order


def mixing(node: fx.Node) -> str:
    """The reason for which an op that mixes channels ends a region."""
    return f"{node.target} mixes channels"

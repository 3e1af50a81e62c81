"""What an op does to channels, found by running it, against what its rule says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from popc.analysis.capture import Captured
from popc.analysis.labels import NONE, DimFactor, LabeledValue, free
from popc.analysis.propagation import Labels, Propagation
from popc.analysis.rules.registry import rule_of

TRIALS = 8  # with values of their own; a maximum, say, is not moved by each of them


@dataclass(frozen=True)
class Channels:
    """An input of that shape: a channel for each index of ``dims``, the same along all others."""

    shape: tuple[int, ...] = (2, 3, 4)
    dims: tuple[int, ...] = (-1,)
    dtype: torch.dtype = torch.float64

    def draw(self, random: torch.Generator) -> Tensor:
        level = torch.rand((), generator=random)
        if self.dtype is torch.bool:
            return torch.rand(self.shape, generator=random) < level
        if not self.dtype.is_floating_point and not self.dtype.is_complex:
            return torch.randint(-9, 9, self.shape, dtype=self.dtype, generator=random)
        return torch.randn(self.shape, dtype=self.dtype, generator=random) * 10 ** (2 * level - 1)

    def labels(self, first: int) -> LabeledValue:
        tracked = [dim % len(self.shape) in self._dims() for dim in range(len(self.shape))]
        sizes = [size for size, is_tracked in zip(self.shape, tracked, strict=True) if is_tracked]
        dims = tuple(
            (DimFactor(size, True),) if is_tracked else free(size)
            for size, is_tracked in zip(self.shape, tracked, strict=True)
        )
        return LabeledValue(dims, first + np.arange(np.prod(sizes, dtype=int)).reshape(sizes))

    def _dims(self) -> set[int]:
        return {dim % len(self.shape) for dim in self.dims}


@dataclass(frozen=True)
class Constant:
    """A tensor that the program holds."""

    value: Tensor


@dataclass(frozen=True)
class Opaque:
    """What a graph holds by name: a function, say."""

    value: Any


def _is_leaf(value: Any) -> bool:
    return isinstance(value, Channels | Constant | Opaque)


class Run:
    """An op on arguments of which some are :class:`Channels`: its rule's labels, and the truth.

    Attributes:
        labels: by the rule.
        classes: for each channel, its class by the rule; tied ones share one.
        reaches: ``[channels, positions]`` for each output, whether a channel moves a position.
    """

    def __init__(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.op, self.tree = op, (args, kwargs)
        self.random = torch.Generator().manual_seed(0)
        leaves, _ = pytree.tree_flatten(self.tree, is_leaf=_is_leaf)
        self.inputs = [leaf for leaf in leaves if isinstance(leaf, Channels)]
        self.outputs = self._outputs(self._call([value.draw(self.random) for value in self.inputs]))

    def apply_rule(self) -> None:
        """Raises what the rule does."""
        graph, root = fx.Graph(), nn.Module()
        labels: dict[fx.Node, Labels] = {}
        count = 0

        def placed(leaf: Any) -> Any:
            nonlocal count
            if isinstance(leaf, Constant | Opaque):
                name = f"held_{len(graph.nodes)}"
                setattr(root, name, leaf.value)
                node = graph.get_attr(name)
                node.meta["val"] = leaf.value
            elif isinstance(leaf, Channels | Tensor):
                node = graph.placeholder(f"x_{len(graph.nodes)}")
                node.meta["val"] = leaf if isinstance(leaf, Tensor) else leaf.draw(self.random)
                if isinstance(leaf, Channels):
                    labels[node] = value = leaf.labels(count)
                    count += value.labels.size
            else:
                return leaf
            return node

        args, kwargs = pytree.tree_map(placed, self.tree, is_leaf=_is_leaf)
        node = graph.call_function(self.op, args, kwargs)
        node.meta["val"] = self._call([value.draw(self.random) for value in self.inputs])
        propagation = Propagation(Captured(fx.GraphModule(root, graph), {}, None))
        propagation.carried.update(labels)
        propagation.flow.count = count
        rule = rule_of(self.op)
        assert rule is not None
        result = rule(propagation, node)
        several = isinstance(node.meta["val"], list | tuple)
        self.labels = list(result) if several and result is not None else [result]  # type: ignore[arg-type]
        self.classes = propagation.flow.classes()

    def measure(self) -> None:
        """Find the truth: give one channel other values, and see which positions change."""
        numbers, count = [], 0
        for value in self.inputs:
            labels = value.labels(count)
            numbers.append(torch.tensor(spread(labels, value.shape)))
            count += labels.labels.size
        sizes = [np.prod(out.shape, dtype=int) for out in self.outputs]
        self.reaches = [np.zeros((count, size), dtype=bool) for size in sizes]
        rare = any(value.dtype is torch.bool for value in self.inputs)
        for _ in range(6 * TRIALS if rare else TRIALS):
            values = [value.draw(self.random) for value in self.inputs]
            before = self._outputs(self._call(values))
            for channel in range(count):
                others = [
                    torch.where(number == channel, channels.draw(self.random), value)
                    for number, channels, value in zip(numbers, self.inputs, values, strict=True)
                ]
                after = self._outputs(self._call(others))
                for reached, a, b in zip(self.reaches, before, after, strict=True):
                    reached[channel] |= ((a != b) & ((a == a) | (b == b))).ravel()

    def _call(self, values: list[Tensor]) -> Any:
        left = iter(values)

        def filled(leaf: Any) -> Any:
            if isinstance(leaf, Channels):
                return next(left).clone()
            if isinstance(leaf, Opaque):
                return leaf.value
            value = leaf.value if isinstance(leaf, Constant) else leaf
            return value.clone() if isinstance(value, Tensor) else value

        args, kwargs = pytree.tree_map(filled, self.tree, is_leaf=_is_leaf)
        torch.manual_seed(0)
        with torch.no_grad():
            return self.op(*args, **kwargs)

    @staticmethod
    def _outputs(result: Any) -> list[np.ndarray]:
        results = result if isinstance(result, list | tuple) else [result]
        return [
            value.detach().resolve_conj().numpy()
            if isinstance(value, Tensor)
            else np.asarray(value)
            for value in results
        ]

    # --- rule against truth ---

    def assert_sound(self) -> None:
        """No position depends on a channel that the labels do not name, or is not tied to."""
        assert len(self.labels) in (1, len(self.outputs))
        for number, (out, reaches) in enumerate(zip(self.outputs, self.reaches, strict=True)):
            labels = self.positions(number, out)
            for channel, position in zip(*np.nonzero(reaches), strict=True):
                label = labels[position]
                assert label != NONE, f"position {position} depends on channel {channel}"
                assert self.classes[label] == self.classes[channel], (
                    f"position {position} is labelled {label}, and depends on channel {channel}"
                )

    def assert_exact(self) -> None:
        """Nothing is tied, and no output labelled, that need not be."""
        count = len(self.classes)
        positions = np.concatenate(self.reaches, axis=1)
        joint = (positions.astype(int) @ positions.T.astype(int)) > 0
        classes = connected_components(joint, directed=False)[1]
        ties = self.classes[:count, None] == self.classes[None, :count]
        assert (ties == (classes[:, None] == classes[None])).all(), "other channels are tied"
        for number, (out, reaches) in enumerate(zip(self.outputs, self.reaches, strict=True)):
            labels = self.positions(number, out)
            named = set(self.classes[labels[labels != NONE]])
            assert named == set(self.classes[reaches.any(1)]), f"output {number}"

    def positions(self, number: int, out: np.ndarray) -> np.ndarray:
        """The label of each position of an output."""
        value = self.labels[number] if len(self.labels) > 1 else self.labels[0]
        if value is None:
            return np.full(out.size, NONE)
        return spread(value, out.shape).ravel()


def spread(value: LabeledValue, shape: tuple[int, ...]) -> np.ndarray:
    """The label of each position of a value of that shape."""
    factors = [factor for dim in value.dims for factor in dim]
    assert len(value.dims) == len(shape), f"labels of {len(value.dims)} dims for {shape}"
    for dim, size in zip(value.dims, shape, strict=True):
        assert np.prod([factor.size for factor in dim], dtype=int) == size, (value.dims, shape)
    labels = value.labels.reshape([f.size if f.tracked else 1 for f in factors])
    return np.broadcast_to(labels, [f.size for f in factors]).reshape(shape)

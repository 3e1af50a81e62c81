"""Labels: for each position of a value, which output channel of which linear it depends on.

Every output channel of every linear has a label, a number. Where an op makes one position depend on
several channels, their labels are *tied*; the classes of tied labels are what can be pruned, unit
by unit. Labels are concrete arrays, so any layout (split, chunked, interleaved, transposed) is
followed by doing to the labels what the op does to the value. Only the dims along which labels
differ are stored: batch and tokens stay symbolic.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

NONE = -1  # the label of a position that depends on no channel

# A product of two channel axes larger than this is taken for a mix of all: exact would be as good.
LARGEST = 1 << 24


class Mixes(Exception):
    """The op mixes channels in a way that popc does not follow. Says why, and of which kind."""

    def __init__(self, why: str, kind: str = "not followed") -> None:
        super().__init__(why)
        self.kind = kind


@dataclass(frozen=True)
class DimFactor:
    """A factor of a dim: ``tracked`` if labels differ along it."""

    size: Any
    tracked: bool


Dim = tuple[DimFactor, ...]


@dataclass(frozen=True, eq=False)
class LabeledValue:
    """The labels of one value.

    Attributes:
        dims: each dim as a product of factors, the slowest first; a dim of size 1 has none.
        labels: int64, one axis for each tracked factor, in the order of ``dims``.
    """

    dims: tuple[Dim, ...]
    labels: np.ndarray

    @classmethod
    def over(cls, sizes: Sequence[Any], dim: int, labels: np.ndarray) -> LabeledValue:
        """A value of ``sizes`` whose positions along ``dim`` have ``labels``."""
        dims = [free(size) for size in sizes]
        dims[dim] = (DimFactor(len(labels), True),)
        return cls(tuple(dims), labels)

    def axes(self, dim: int) -> list[int]:
        """The axes of ``labels`` that belong to ``dim``."""
        start = sum(factor.tracked for before in self.dims[:dim] for factor in before)
        return list(range(start, start + sum(factor.tracked for factor in self.dims[dim])))

    def is_free(self, dim: int) -> bool:
        """Whether labels are the same all along ``dim``."""
        return not any(factor.tracked for factor in self.dims[dim])

    def along(self, dim: int) -> np.ndarray:
        """``labels`` with ``dim`` as one last axis.

        Raises:
            Mixes: ``dim`` is merged with an axis whose size is known only at run time.
        """
        factors, axes = self.dims[dim], self.axes(dim)
        moved = np.moveaxis(self.labels, axes, range(-len(axes), 0)) if axes else self.labels
        lead = moved.shape[: moved.ndim - len(axes)]
        if any(not isinstance(factor.size, int) for factor in factors):
            raise Mixes("merges channels with another axis")
        spread = [factor.size if factor.tracked else 1 for factor in factors]
        whole = np.broadcast_to(
            moved.reshape((*lead, *spread)), (*lead, *(factor.size for factor in factors))
        )
        return whole.reshape((*lead, -1))

    def replaced(self, dim: int, labels: np.ndarray) -> LabeledValue:
        """With ``dim`` as one tracked factor: the inverse of :meth:`along`."""
        dims = list(self.dims)
        size = labels.shape[-1]
        if size == 1:
            dims[dim] = ()
            return LabeledValue(tuple(dims), labels[..., 0])
        dims[dim] = (DimFactor(size, True),)
        at = sum(factor.tracked for before in self.dims[:dim] for factor in before)
        return LabeledValue(tuple(dims), np.moveaxis(labels, -1, at))

    def resized(self, dim: int, size: Any) -> LabeledValue:
        """A free ``dim`` with another size."""
        return LabeledValue((*self.dims[:dim], free(size), *self.dims[dim + 1 :]), self.labels)

    def permuted(self, order: Sequence[int]) -> LabeledValue:
        """Its dims in another order, as ``Tensor.permute`` has it."""
        axes = [axis for dim in order for axis in self.axes(dim)]
        return LabeledValue(tuple(self.dims[d] for d in order), self.labels.transpose(axes))

    def squeezed(self, dim: int) -> LabeledValue:
        """Without ``dim``, along which labels are the same."""
        return LabeledValue((*self.dims[:dim], *self.dims[dim + 1 :]), self.labels)

    def unsqueezed(self, dim: int, size: Any = 1) -> LabeledValue:
        """With an unlabeled dim of ``size`` put in before ``dim``."""
        return LabeledValue((*self.dims[:dim], free(size), *self.dims[dim:]), self.labels)

    def viewed(self, sizes: Sequence[Any]) -> LabeledValue:
        """As ``view(sizes)`` lays it out.

        Raises:
            Mixes: it is not known which axes the new sizes are made of.
        """
        left = [factor for dim in self.dims for factor in dim]
        dims: list[Dim] = []
        for size in reversed(sizes):
            if not any(factor.tracked for factor in left):
                dims.insert(0, free(size))
                continue
            dims.insert(0, _take(left, size))
        if any(factor.tracked for factor in left):
            raise Mixes("splits or merges channels in an unknown way")
        shape = [factor.size for dim in dims for factor in dim if factor.tracked]
        return LabeledValue(tuple(dims), self.labels.reshape(shape))


def free(size: Any) -> Dim:
    """An unlabeled dim of ``size``, which may be symbolic; one of size 1 has no factors."""
    return () if isinstance(size, int) and size == 1 else (DimFactor(size, False),)


def _take(left: list[DimFactor], size: Any) -> Dim:
    """Take factors of product ``size`` off the end of ``left``."""
    taken: list[DimFactor] = []
    while not same_size(size, 1):
        if not left:
            raise Mixes("splits or merges channels in an unknown way")
        factor = left.pop()
        if same_size(factor.size, size):
            taken.insert(0, factor)
            break
        if divides(factor.size, size):
            taken.insert(0, factor)
            size = size // factor.size
        elif divides(size, factor.size):
            left.append(DimFactor(factor.size // size, factor.tracked))
            taken.insert(0, DimFactor(size, factor.tracked))
            break
        else:
            raise Mixes("splits or merges channels in an unknown way")
    return tuple(taken)


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal without a new guard."""
    return bool(statically_known_true(a == b))


def divides(a: Any, b: Any) -> bool:
    """Whether ``a`` is known to divide ``b``."""
    return bool(statically_known_true(b % a == 0))


@dataclass(frozen=True, eq=False)
class Event:
    """Something that ties or spoils channels, to be named in a refusal of that ``kind``."""

    labels: np.ndarray
    reason: str
    node: fx.Node
    kind: str


@dataclass
class LabelUnion:
    """What propagation through a graph has found out about its labels."""

    count: int = 0
    ties: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    mixes: list[Event] = field(default_factory=list)
    spoiled: list[Event] = field(default_factory=list)

    def fresh(self, size: int) -> np.ndarray:
        """``size`` new labels, ``[size]`` int, each a set of its own."""
        self.count += size
        return np.arange(self.count - size, self.count)

    def tie(self, a: np.ndarray, b: np.ndarray) -> None:
        """Positions of ``a`` and ``b`` depend on each other's channels."""
        a, b = np.broadcast_arrays(a, b)
        differ = (a != b) & (a != NONE) & (b != NONE)
        if differ.any():
            self.ties.append((a[differ], b[differ]))

    def tie_along(self, labels: np.ndarray, axes: Sequence[int]) -> np.ndarray:
        """Tie all labels along ``axes``; the rest of the axes, with one label of each class."""
        if not axes:
            return labels
        moved = np.moveaxis(labels, list(axes), range(len(axes)))
        moved = moved.reshape((-1, *moved.shape[len(axes) :]))
        if not len(moved):
            return np.full(moved.shape[1:], NONE)
        first = moved.max(axis=0)  # NONE only where nothing else is
        self.tie(moved, first[None])
        return first

    def mix(
        self,
        value: LabeledValue,
        dims: Sequence[int],
        node: fx.Node,
        reason: str,
        kind: str = "mixes",
    ) -> LabeledValue:
        """Tie all channels along ``dims`` of ``value``, whose labels are then free along them."""
        axes = [axis for dim in dims for axis in value.axes(dim)]
        if axes:
            self.mixes.append(Event(_some(value.labels), reason, node, kind))
        labels = self.tie_along(value.labels, axes)
        out = list(value.dims)
        for dim in dims:
            out[dim] = tuple(DimFactor(factor.size, False) for factor in out[dim])
        return LabeledValue(tuple(out), labels)

    def spoil(self, labels: np.ndarray, reason: str, node: fx.Node, kind: str = "mixes") -> None:
        """The channels of ``labels`` can't be pruned, for ``reason``."""
        self.spoiled.append(Event(_some(labels), reason, node, kind))

    def combine(
        self,
        operands: Sequence[tuple[LabeledValue, Sequence[Hashable]]],
        order: Sequence[Hashable],
        sizes: Mapping[Any, Any],
    ) -> LabeledValue:
        """The elementwise combination of operands whose dims are named by letters.

        Args:
            order: the letters of the result. Operands' sizes agree, or are 1.
            sizes: the result's size at each letter.

        Raises:
            Mixes: two operands split a dim into factors that do not fit.
        """
        dims: dict[Hashable, Dim] = {}
        for letter in order:
            factors = [_dim_at(operand, letter) for operand in operands]
            known = [dim for dim in factors if any(factor.tracked for factor in dim)]
            dims[letter] = _refined(known) if known else free(sizes[letter])
        shape = [factor.size for letter in order for factor in dims[letter] if factor.tracked]
        spread = [_spread(operand, order, dims) for operand in operands]
        if math.prod(shape) > LARGEST:
            labels = [self.tie_along(s, range(s.ndim)) for s in spread]
            for other in labels[1:]:
                self.tie(labels[0], other)
            loose = {k: tuple(DimFactor(a.size, False) for a in dim) for k, dim in dims.items()}
            return LabeledValue(tuple(loose[letter] for letter in order), labels[0])
        result = np.broadcast_to(spread[0], shape)
        for other in spread[1:]:
            self.tie(result, other)
            result = np.where(result == NONE, other, result)
        return LabeledValue(tuple(dims[letter] for letter in order), np.asarray(result))

    def classes(self) -> np.ndarray:
        """The class of each label; tied labels share one."""
        if not self.ties:
            return np.arange(self.count)
        a = np.concatenate([pair[0].ravel() for pair in self.ties])
        b = np.concatenate([pair[1].ravel() for pair in self.ties])
        graph = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(self.count, self.count))
        return connected_components(graph, directed=False)[1].astype(np.int64)


def _some(labels: np.ndarray) -> np.ndarray:
    return np.unique(labels[labels != NONE])


def _dim_at(operand: tuple[LabeledValue, Sequence[Hashable]], letter: Hashable) -> Dim:
    value, letters = operand
    return value.dims[list(letters).index(letter)] if letter in letters else ()


def _refined(dims: Sequence[Dim]) -> Dim:
    """The coarsest dim that every one of ``dims`` is a merge of; tracked where any is."""
    result = dims[0]
    for other in dims[1:]:
        a, b = list(result), list(other)
        out: list[DimFactor] = []
        while a and b:
            x, y = a.pop(), b.pop()
            if same_size(x.size, y.size):
                size = x.size
            elif divides(x.size, y.size):
                size = x.size
                b.append(DimFactor(y.size // size, y.tracked))
            elif divides(y.size, x.size):
                size = y.size
                a.append(DimFactor(x.size // size, x.tracked))
            else:
                raise Mixes("brings together channels of axes that do not fit")
            out.insert(0, DimFactor(size, x.tracked or y.tracked))
        if a or b:
            raise Mixes("brings together channels of axes that do not fit")
        result = tuple(out)
    return result


def _spread(
    operand: tuple[LabeledValue, Sequence[Hashable]],
    order: Sequence[Hashable],
    dims: Mapping[Hashable, Dim],
) -> np.ndarray:
    """The operand's labels, one axis (maybe of size 1) for each tracked factor of the result."""
    value, letters = operand
    placed = value.permuted([list(letters).index(letter) for letter in order if letter in letters])
    sizes: list[int] = []
    for letter in order:
        left = list(_dim_at(operand, letter))
        axes: list[int] = []
        for factor in reversed(dims[letter]):
            tracked = False
            if left:
                last = left.pop()
                tracked = last.tracked
                if not same_size(last.size, factor.size):
                    left.append(DimFactor(last.size // factor.size, last.tracked))
            if factor.tracked:
                axes.insert(0, factor.size if tracked else 1)
        sizes += axes
    return placed.labels.reshape(sizes)

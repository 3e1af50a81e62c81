"""Traits: what is true of an op whatever its arguments, for those who ask about many ops at once.

The traits of each op stand on its line of :mod:`popc.analysis.rules.table`. What torch knows of an
op is not repeated there: that it is elementwise is a tag, that it writes or aliases its arguments
is in its schema (:mod:`popc.analysis.mutation`).
"""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import fx


class Trait(enum.Flag):
    """What an op does. A *row* is an index of all dims of a value but the last."""

    NOTHING = 0

    # The same values:
    COPY = enum.auto()  # of the same shape and dtype as the first input
    ALIAS = enum.auto()  # besides, always in the first input's memory
    CAST = enum.auto()  # maybe in another dtype, or on another device
    DROPOUT = enum.auto()  # in inference; in training some are zeroed
    RESHAPE = enum.auto()  # in the same order, with other sizes
    AXIS = enum.auto()  # with a dim of size 1 more or less
    TRANSPOSE = enum.auto()  # with dims in the order that propagation.order_of gives
    REPEAT = enum.auto()  # each of them several times

    # Some of the values:
    PART = enum.auto()  # a part at a fixed place, as a view of the first input
    EQUAL_PARTS = enum.auto()  # several outputs, of one size
    SLICE = enum.auto()  # a range of positions along one dim
    INDEX = enum.auto()  # positions that a tensor of indices names
    CHOICE = enum.auto()  # which ones depends on their sizes: topk, sort

    # How rows and channels meet:
    POINTWISE = enum.auto()  # elementwise with broadcasting; torch's tag says so too
    ROWWISE = enum.auto()  # each row is computed from the same row of the first input
    ROW_CHOICE = enum.auto()  # done to a mask ``[rows, 1]``, it gives the mask of the output's rows
    SOFTMAX = enum.auto()
    LINEAR = enum.auto()  # x Wᵀ, with x first
    FLAT = enum.auto()  # that of several weights, in one dim: x's rows for one, then for the next
    PRODUCT = enum.auto()  # sums of products of two inputs
    MATMUL = enum.auto()  # a product of the first two arguments, matrices or stacks of them
    BATCHED = enum.auto()  # a product that keeps the leading dims of both inputs
    ATTENTION = enum.auto()  # softmax(q kᵀ) v, with q, k and v first
    LOOKUP = enum.auto()  # rows of a table
    ORDERING = enum.auto()  # compares by size


_declared: dict[Any, Trait] = {}


def declare(op: Any, traits: Trait) -> None:
    """Let ``op`` have these traits, and no others."""
    _declared[op] = traits


def forget(op: Any) -> None:
    """Let ``op`` have no traits but those that torch knows."""
    _declared.pop(op, None)


def is_declared(op: Any) -> bool:
    """Whether traits were declared for ``op``."""
    return op in _declared


def traits_of(op: Any) -> Trait:
    """All traits of an op."""
    traits = _declared.get(op, Trait.NOTHING)
    if torch.Tag.pointwise in getattr(op, "tags", ()):
        traits |= Trait.POINTWISE
    return traits


def has(op: Any, traits: Trait) -> bool:
    """Whether an op, or the op of a node, has one of ``traits``."""
    return bool(traits_of(op.target if isinstance(op, fx.Node) else op) & traits)

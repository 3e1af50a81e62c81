"""The transfer table: what each op does to a channel axis. One op, one line.

A rule is called for each input of a node that carries an axis, and answers at which dimension of
the node's output the axis lives on. It raises :class:`Mixes` where the op mixes the channels. An
op that the table does not know mixes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten = torch.ops.aten


class Mixes(Exception):
    """The op mixes the channels of the axis, so the axis cannot be pruned. Says why."""


Rule = Callable[[fx.Node, fx.Node, int], int]


@dataclass(frozen=True)
class LinearForm:
    """How a linear-like op holds ``y = x Wᵀ + b``: argument positions and W's output dimension."""

    x: int
    weight: int
    bias: int | None
    out_dim: int

    @property
    def in_dim(self) -> int:
        return 1 - self.out_dim


LINEARS: dict[Any, LinearForm] = {
    aten.linear.default: LinearForm(x=0, weight=1, bias=2, out_dim=0),
    aten.addmm.default: LinearForm(x=1, weight=2, bias=0, out_dim=1),
    aten.mm.default: LinearForm(x=0, weight=1, bias=None, out_dim=1),
    aten.matmul.default: LinearForm(x=0, weight=1, bias=None, out_dim=1),
}


def shape(node: fx.Node) -> torch.Size:
    return node.meta["val"].shape


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of ``node``, given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def transfer(node: fx.Node, source: fx.Node, dim: int) -> int:
    """Where the axis at ``dim`` of ``source`` is in ``node``'s output.

    Raises:
        Mixes: it does not live on.
    """
    rule = RULES.get(node.target)
    if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        rule = _same
    if rule is None:
        raise Mixes(f"{node.target} mixes channels, as far as popc knows")
    if not isinstance(node.meta.get("val"), torch.Tensor):
        raise Mixes(f"{node.target} does not return one tensor")
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable:
        raise Mixes(f"{node.target} writes in place to a value that is read elsewhere")
    return rule(node, source, dim)


def reads_size(node: fx.Node, dim: int) -> bool:
    """Whether ``node`` only asks for the size of another dimension than ``dim``."""
    return node.target is aten.sym_size.int and argument(node, 1, "dim") != dim


def _same(node: fx.Node, source: fx.Node, dim: int) -> int:
    """Elementwise, with broadcasting: aligned from the right."""
    out = dim + len(shape(node)) - len(shape(source))
    if shape(node)[out] != shape(source)[dim]:
        raise Mixes(f"{node.target} broadcasts the channel axis")
    return out


def _dropout(node: fx.Node, source: fx.Node, dim: int) -> int:
    if argument(node, 2, "train", True):
        raise Mixes("dropout in training mode")
    return dim


def _transpose(node: fx.Node, source: fx.Node, dim: int) -> int:
    rank = len(shape(source))
    a, b = argument(node, 1, "dim0") % rank, argument(node, 2, "dim1") % rank
    return {a: b, b: a}.get(dim, dim)


def _permute(node: fx.Node, source: fx.Node, dim: int) -> int:
    rank = len(shape(source))
    return [d % rank for d in argument(node, 1, "dims")].index(dim)


def _unsqueeze(node: fx.Node, source: fx.Node, dim: int) -> int:
    at = argument(node, 1, "dim") % len(shape(node))
    return dim + (dim >= at)


def _view(node: fx.Node, source: fx.Node, dim: int) -> int:
    """Keeps an axis whose own size, and the product of all that follow it, stay as they were."""
    before, after = shape(source), shape(node)
    size, right = before[dim], math.prod(before[dim + 1 :])
    for out in range(len(after)):
        if same_size(after[out], size) and same_size(math.prod(after[out + 1 :]), right):
            return out
    raise Mixes(f"{node.target} splits or merges the channel axis")


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal without a new guard."""
    return bool(statically_known_true(a == b))


VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)

RULES: dict[Any, Rule] = {
    aten.dropout.default: _dropout,
    aten.to.dtype: _same,
    aten.to.device: _same,
    aten.to.dtype_layout: _same,
    aten._to_copy.default: _same,
    aten.contiguous.default: _same,
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.lift_fresh_copy.default: _same,
    aten.hardswish.default: _same,
    aten.log_sigmoid.default: _same,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.expand.default: _same,
    **dict.fromkeys(VIEWS, _view),
}

# Where an op states output sizes: the argument in which the axis' size must follow its pruning.
SIZE_ARGUMENT: dict[Any, int] = dict.fromkeys((*VIEWS, aten.expand.default), 1)

# Ops that only rename a weight: looking through them finds the parameter.
WEIGHT_VIEWS = (aten.detach.default, aten.alias.default)
WEIGHT_TRANSPOSES = (aten.t.default, aten.transpose.int, aten.numpy_T.default)

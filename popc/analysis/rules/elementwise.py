"""Rules for ops that leave each channel where it is: elementwise ones, casts, copies."""

from __future__ import annotations

import numpy as np
from torch import fx

from popc.analysis.labels import Mixes
from popc.analysis.propagation import Labels, Propagation, argument, mixing, only_input, shape


def pointwise(propagation: Propagation, node: fx.Node) -> Labels:
    """Elementwise, with broadcasting: dims are aligned from the right."""
    sizes = shape(node)
    rank = len(sizes)
    operands = []
    for source in node.all_input_nodes:
        value = propagation.of(source)
        if value is not None:
            lead = rank - len(value.dims)
            operands.append((value, [lead + d for d in range(len(value.dims))]))
    return propagation.flow.combine(operands, range(rank), dict(enumerate(sizes)))


def same(propagation: Propagation, node: fx.Node) -> Labels:
    """Like the one input that has channels."""
    return only_input(propagation, node)


def first(propagation: Propagation, node: fx.Node) -> Labels:
    """Like the first input; of any other only size, dtype or device is read."""
    return propagation.of(node.args[0])


def sizes_alone(propagation: Propagation, node: fx.Node) -> Labels:
    """Made of an input's sizes, not of its values."""
    return None


def as_complex(propagation: Propagation, node: fx.Node) -> Labels:
    """``view_as_complex``: pairs of values become one, mixed."""
    value = only_input(propagation, node)
    last = len(value.dims) - 1
    return propagation.flow.mix(value, [last], node, mixing(node)).squeezed(last)


def as_real(propagation: Propagation, node: fx.Node) -> Labels:
    """``view_as_real``: the two parts of a value have its label."""
    return only_input(propagation, node).unsqueezed(len(shape(node)) - 1, 2)


def dropout(propagation: Propagation, node: fx.Node) -> Labels:
    """``dropout`` in inference."""
    if argument(node, "train"):
        raise Mixes("is dropout in training mode", "training")
    return only_input(propagation, node)


def glu(propagation: Propagation, node: fx.Node) -> Labels:
    """The first half of a dim times a function of the second; of the last dim if none is named."""
    value = only_input(propagation, node)
    dim = argument(node, "dim", -1) % len(value.dims)
    if value.is_free(dim):
        return value.resized(dim, shape(node)[dim])
    gated, gate = np.split(value.along(dim), 2, axis=-1)
    propagation.flow.tie(gated, gate)
    return value.replaced(dim, gated)

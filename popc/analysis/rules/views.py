"""Rules for ops that lay values out anew: views, transposes, slices, pieces, pads."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import fx

from popc.analysis.labels import NONE, LabeledValue, Mixes, free, same_size
from popc.analysis.propagation import (
    Labels,
    Propagation,
    Rule,
    argument,
    dims_of,
    only_input,
    order_of,
    shape,
)

aten = torch.ops.aten


def view(propagation: Propagation, node: fx.Node) -> Labels:
    """``view`` and ``reshape``: the factors of the dims, dealt out anew."""
    value = propagation.of(node.args[0])
    return None if value is None else value.viewed(shape(node))


def reorder(propagation: Propagation, node: fx.Node) -> Labels:
    """``permute``, ``transpose`` and their like."""
    return only_input(propagation, node).permuted(order_of(node))


def movedim(propagation: Propagation, node: fx.Node) -> Labels:
    """``movedim``."""
    value = only_input(propagation, node)
    rank = len(value.dims)
    source, target = dims_of(node, rank, "source"), dims_of(node, rank, "destination")
    rest = [d for d in range(rank) if d not in source]
    for to, d in sorted(zip(target, source, strict=True)):
        rest.insert(to, d)
    return value.permuted(rest)


def unsqueeze(propagation: Propagation, node: fx.Node) -> Labels:
    """``unsqueeze``: a new dim without labels."""
    return only_input(propagation, node).unsqueezed(argument(node, "dim") % len(shape(node)))


def squeeze(propagation: Propagation, node: fx.Node) -> Labels:
    """``squeeze``: dims of size 1 fall away."""
    value = only_input(propagation, node)
    before = shape(node.args[0])
    for dim in reversed(dims_of(node, len(before))):
        if same_size(before[dim], 1):
            value = value.squeezed(dim)
    return value


def expand(propagation: Propagation, node: fx.Node) -> Labels:
    """``expand``: a dim of size 1 without labels takes the new size."""
    value = propagation.of(node.args[0])
    if value is None:
        return None
    sizes = shape(node)
    lead = len(sizes) - len(value.dims)
    kept = [
        free(size) if not dim and not same_size(size, 1) else dim
        for dim, size in zip(value.dims, sizes[lead:], strict=True)
    ]
    return LabeledValue((*map(free, sizes[:lead]), *kept), value.labels)


def repeat(propagation: Propagation, node: fx.Node) -> Labels:
    """``repeat``: labels are tiled."""
    value = only_input(propagation, node)
    times = argument(node, "repeats")
    for _ in range(len(times) - len(value.dims)):
        value = value.unsqueezed(0)
    for dim, (count, size) in enumerate(zip(times, shape(node), strict=True)):
        if value.is_free(dim):
            value = value.resized(dim, size)
        elif not same_size(count, 1):
            value = value.replaced(dim, np.tile(value.along(dim), count))
    return value


def repeat_interleave(propagation: Propagation, node: fx.Node) -> Labels:
    """``repeat_interleave`` by a constant: each label stands several times in a row."""
    value = only_input(propagation, node)
    count, dim = argument(node, "repeats"), argument(node, "dim")
    if dim is None:
        raise Mixes("flattens channels with other axes")
    dim %= len(value.dims)
    if value.is_free(dim):
        return value.resized(dim, shape(node)[dim])
    if not isinstance(count, int):
        raise Mixes("repeats channels by numbers known only at run time")
    return value.replaced(dim, np.repeat(value.along(dim), count, axis=-1))


def on_dim(change: Callable[[fx.Node, np.ndarray, int], np.ndarray], name: str = "dim") -> Rule:
    """A rule for an op that re-arranges positions along dims, one after the other."""

    def rule(propagation: Propagation, node: fx.Node) -> Labels:
        value = only_input(propagation, node)
        for at, dim in enumerate(dims_of(node, len(value.dims), name)):
            if not value.is_free(dim):
                value = value.replaced(dim, change(node, value.along(dim), at))
            elif len(shape(node)) == len(value.dims):
                value = value.resized(dim, shape(node)[dim])
        return value

    return rule


def sliced(node: fx.Node, labels: np.ndarray, _: int) -> np.ndarray:
    """The labels ``[..., n]`` that ``slice`` keeps."""
    bounds = [argument(node, name) for name in ("start", "end", "step")]
    if not all(bound is None or isinstance(bound, int) for bound in bounds):
        raise Mixes("slices channels at a place known only at run time")
    return labels[..., slice(*bounds)]


def narrowed(node: fx.Node, labels: np.ndarray, _: int) -> np.ndarray:
    """The labels ``[..., n]`` that ``narrow`` keeps."""
    start, length = argument(node, "start"), argument(node, "length")
    if not isinstance(start, int) or not isinstance(length, int):
        raise Mixes("slices channels at a place known only at run time")
    start %= labels.shape[-1]
    return labels[..., start : start + length]


def flipped(node: fx.Node, labels: np.ndarray, _: int) -> np.ndarray:
    """``flip``."""
    return labels[..., ::-1]


def rolled(node: fx.Node, labels: np.ndarray, at: int) -> np.ndarray:
    """The labels ``[..., n]`` as ``roll`` turns them."""
    shifts = argument(node, "shifts")
    shift = shifts[at] if isinstance(shifts, list | tuple) else shifts
    return np.roll(labels, shift, axis=-1)


def select(propagation: Propagation, node: fx.Node) -> Labels:
    """``select``: one label, its dim dropped."""
    value = only_input(propagation, node)
    dim, index = argument(node, "dim") % len(value.dims), argument(node, "index")
    if value.is_free(dim):
        return value.squeezed(dim)
    if not isinstance(index, int):
        raise Mixes("picks a channel known only at run time")
    return value.replaced(dim, value.along(dim)[..., [index]]).squeezed(dim)


def pieces(propagation: Propagation, node: fx.Node) -> Labels:
    """split, chunk, tensor_split: the outputs' sizes tell where the cuts are."""
    value = only_input(propagation, node)
    dim = (argument(node, "dim") or 0) % len(value.dims)
    outputs, start, parts = node.meta["val"], 0, []
    for output in outputs:
        size = output.shape[dim]
        if value.is_free(dim):
            parts.append(value.resized(dim, size))
            continue
        parts.append(value.replaced(dim, value.along(dim)[..., start : start + size]))
        start += size
    return parts  # type: ignore[return-value]


def unbind(propagation: Propagation, node: fx.Node) -> Labels:
    """``unbind``: a value for each place of the dim."""
    value = only_input(propagation, node)
    dim = argument(node, "dim") % len(value.dims)
    if value.is_free(dim):
        return [value.squeezed(dim)] * len(node.meta["val"])
    labels = value.along(dim)
    return [value.replaced(dim, labels[..., [i]]).squeezed(dim) for i in range(labels.shape[-1])]


def unfold(propagation: Propagation, node: fx.Node) -> Labels:
    """``unfold`` along a dim without labels."""
    value = only_input(propagation, node)
    dim = argument(node, "dimension") % len(value.dims)
    if not value.is_free(dim):
        raise Mixes("takes windows over the channels")
    value = value.resized(dim, shape(node)[dim])
    return value.unsqueezed(len(value.dims), shape(node)[-1])


def pad(propagation: Propagation, node: fx.Node) -> Labels:
    """``pad``: new labels, of nothing, around those there are."""
    value = only_input(propagation, node)
    pads = argument(node, "pad")
    for i in range(len(pads) // 2):
        dim, (before, after) = len(value.dims) - 1 - i, pads[2 * i : 2 * i + 2]
        if value.is_free(dim):
            value = value.resized(dim, shape(node)[dim])
        elif before or after:
            if not (isinstance(before, int) and isinstance(after, int)) or min(before, after) < 0:
                raise Mixes("cuts channels off")
            if argument(node, "mode", "constant") != "constant":
                raise Mixes("pads channels with other channels")
            labels = value.along(dim)
            width = [(0, 0)] * (labels.ndim - 1) + [(before, after)]
            value = value.replaced(dim, np.pad(labels, width, constant_values=NONE))
    return value

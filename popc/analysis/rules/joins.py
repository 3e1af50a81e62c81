"""Rules for ops that join values, pick rows of them, or write one into another."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from popc.analysis.labels import NONE, LabeledValue, Mixes, same_size
from popc.analysis.propagation import (
    Labels,
    Propagation,
    Rule,
    argument,
    is_tensor,
    only_input,
    order_of,
    shape,
)
from popc.analysis.rules.traits import Trait, has

aten = torch.ops.aten


def cat(propagation: Propagation, node: fx.Node) -> Labels:
    """``cat``: the labels of its parts one after the other; empty placeholders are left out."""
    dim = (argument(node, "dim") or 0) % len(shape(node))
    parts: list[Any] = [
        part
        for part in node.args[0]  # type: ignore[union-attr]
        if len(shape(part)) > 1 and not same_size(shape(part)[dim], 0)
    ]
    parts = parts or list(node.args[0])  # type: ignore[arg-type]
    return _joined(propagation, node, parts, [propagation.of(part) for part in parts], dim)


def stack(propagation: Propagation, node: fx.Node) -> Labels:
    """``stack``: as ``cat``, along a new dim."""
    dim = (argument(node, "dim") or 0) % len(shape(node))
    parts = list(node.args[0])  # type: ignore[arg-type]
    values = [
        None if value is None else value.unsqueezed(dim) for value in map(propagation.of, parts)
    ]
    return _joined(propagation, node, parts, values, dim, stacked=True)


def constant(propagation: Propagation, value: Any) -> np.ndarray | None:
    """The numbers in a tensor that the program holds, None if they come from elsewhere."""
    while isinstance(value, fx.Node) and has(value, Trait.COPY):
        value = value.args[0]
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    tensor = getattr(propagation.captured.gm, str(value.target), None)
    is_real = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    return tensor.detach().cpu().numpy() if is_real else None  # type: ignore[union-attr]


def _joined(
    propagation: Propagation,
    node: fx.Node,
    parts: list[fx.Node],
    values: list[LabeledValue | None],
    dim: int,
    stacked: bool = False,
) -> LabeledValue:
    """Values one after the other along ``dim``."""
    known = [value for value in values if value is not None]
    letters = list(range(len(shape(node))))
    sizes = dict(enumerate(shape(node)))
    if not stacked and all(value.is_free(dim) for value in known):
        # Along tokens, say: at each position it is one or the other.
        out = propagation.flow.combine([(value, letters) for value in known], letters, sizes)
        return out.resized(dim, sizes[dim])
    pieces = []
    frame = propagation.flow.combine(
        [(value, letters) for value in _framed(known, dim)], letters, {**sizes, dim: 1}
    )
    for part, value in zip(parts, values, strict=True):
        size = 1 if stacked else shape(part)[dim]
        if not isinstance(size, int):
            raise Mixes("joins channels with a part whose size is known only at run time")
        pieces.append(_piece(propagation, node, frame, value, dim, size))
    return frame.replaced(dim, np.concatenate(pieces, axis=-1))


def _piece(
    propagation: Propagation,
    node: fx.Node,
    frame: LabeledValue,
    value: LabeledValue | None,
    dim: int,
    size: int,
) -> np.ndarray:
    """One part's labels, laid out like ``frame``, with ``dim`` last."""
    nothing = np.full((*frame.labels.shape, size), NONE)
    if value is None:
        return nothing
    axes = value.axes(dim)
    if not axes:
        labels = np.broadcast_to(value.labels[..., None], (*value.labels.shape, size))
    else:
        labels = value.along(dim)
    if labels.shape == nothing.shape:
        return labels
    # The same for all units, as the rotary part of a latent key is: it is always computed.
    reason = f"{node.target} shares the channels among all units"
    propagation.flow.spoil(labels, reason, node, "shared")
    return nothing


def written_into(
    propagation: Propagation,
    view: fx.Node,
    value: LabeledValue,
    before: LabeledValue | None,
    dim: int,
) -> LabeledValue:
    """The labels of what ``view`` is a slice of along ``dim``, once ``value`` is written to it."""
    sizes = dict(enumerate(shape(view.args[0])))
    bounds = [argument(view, name) for name in ("start", "end", "step")]
    known = [bound for bound in (*bounds, sizes[dim], shape(view)[dim]) if bound is not None]
    if not all(isinstance(number, int) for number in known) or view.target != aten.slice.Tensor:
        raise Mixes("writes channels at a place known only at run time")
    letters = list(range(len(sizes)))
    values = [value] if before is None else [value, before]
    frames = [(framed, letters) for framed in _framed(values, dim)]
    frame = propagation.flow.combine(frames, letters, {**sizes, dim: 1})
    labels = _piece(propagation, view, frame, before, dim, sizes[dim]).copy()
    labels[..., slice(*bounds)] = _piece(propagation, view, frame, value, dim, shape(view)[dim])
    return frame.replaced(dim, labels)


def _framed(values: list[LabeledValue], dim: int) -> list[LabeledValue]:
    """The values' dims without ``dim``, as values without channels: only their layout counts."""
    framed = []
    for value in values:
        axes = value.axes(dim)
        labels = value.labels.max(axis=tuple(axes)) if axes else value.labels
        dims = (*value.dims[:dim], (), *value.dims[dim + 1 :])
        framed.append(LabeledValue(dims, np.full_like(labels, NONE)))
    return framed


def index(propagation: Propagation, node: fx.Node) -> Labels:
    """``x[:, i, ...]``: rows picked by index along free dims."""
    value = only_input(propagation, node, "self")
    indices = list(node.args[1])  # type: ignore[arg-type]
    places = [dim for dim, index in enumerate(indices) if index is not None]
    known = constant(propagation, indices[places[0]])
    if len(places) == 1 and known is not None and known.ndim == 1:
        dim = places[0]
        if not value.is_free(dim):
            return value.replaced(dim, value.along(dim)[..., known])
    if any(not value.is_free(dim) for dim in places):
        raise Mixes("picks channels known only at run time")
    picked = torch.broadcast_shapes(*(shape(indices[dim]) for dim in places))
    if any(indices[dim].meta["val"].dtype == torch.bool for dim in places):
        raise Mixes("picks rows by a mask")
    together = places == list(range(places[0], places[-1] + 1))
    at = places[0] if together else 0
    for dim in reversed(places):
        value = value.squeezed(dim)
    for size in reversed(picked):
        value = value.unsqueezed(at, size)
    return value


def index_select(propagation: Propagation, node: fx.Node) -> Labels:
    """``index_select``: the picked labels, where the index is a constant."""
    value = only_input(propagation, node)
    dim = argument(node, "dim") % len(value.dims)
    if not value.is_free(dim):
        known = constant(propagation, argument(node, "index"))
        if known is None:
            raise Mixes("picks channels known only at run time")
        return value.replaced(dim, value.along(dim)[..., known])
    return value.resized(dim, shape(node)[dim])


def gather(propagation: Propagation, node: fx.Node) -> Labels:
    """``gather`` along a dim without labels."""
    value = only_input(propagation, node)
    dim = argument(node, "dim") % len(value.dims)
    if not value.is_free(dim) or not same_rest(node, dim):
        raise Mixes("picks channels known only at run time")
    return value.resized(dim, shape(node)[dim])


def same_rest(node: fx.Node, dim: int) -> bool:
    """Whether output and first input have the same sizes but along ``dim``."""
    a, b = shape(node), shape(node.args[0])
    return all(same_size(x, y) for d, (x, y) in enumerate(zip(a, b, strict=True)) if d != dim)


def written(source: str, *dims: str) -> Rule:
    """Writing ``source`` into the first argument at places along dims; the rest of it stays."""

    def rule(propagation: Propagation, node: fx.Node) -> Labels:
        base, new = propagation.of(node.args[0]), propagation.of(argument(node, source))
        if not dims:  # all of it is overwritten
            base = None
        letters = list(range(len(shape(node))))
        operands = []
        places = [argument(node, name) % len(letters) for name in dims]
        if new is not None:
            lead = len(letters) - len(new.dims)
            if places and lead and source == "src":
                new, lead = new.unsqueezed(places[0]), lead - 1
            operands.append((new, letters[lead:]))
        if base is not None:
            operands.append((base, letters))
        if not operands:
            return None
        if base is not None and any(not base.is_free(d) for d in places):
            raise Mixes("writes over channels")
        if new is not None and any(
            not operands[0][0].is_free(d - lead) for d in places if d >= lead
        ):
            raise Mixes("writes over channels")
        return propagation.flow.combine(operands, letters, dict(enumerate(shape(node))))

    return rule


def index_put(propagation: Propagation, node: fx.Node) -> Labels:
    """``x[..., i, ...] = v`` with indices along some dims: v's dims follow x's on the rest."""
    if argument(node, "accumulate"):
        raise Mixes("adds channels at places known only at run time")
    base, values = propagation.of(node.args[0]), propagation.of(node.args[2])
    indices = list(node.args[1])  # type: ignore[arg-type]
    rank = len(shape(node))
    places = [dim for dim, index in enumerate(indices) if index is not None]
    if any(propagation.of(indices[dim]) for dim in places):
        raise Mixes("takes channels where it takes indices")
    picked = len(torch.broadcast_shapes(*(shape(indices[dim]) for dim in places)))
    together = places == list(range(places[0], places[-1] + 1))
    at = places[0] if together else 0
    operands = []
    if base is not None:
        if any(not base.is_free(dim) for dim in places):
            raise Mixes("writes over channels")
        operands.append((base, list(range(rank))))
    if values is not None:
        rest = [d for d in range(rank) if d not in places]
        before = sum(d < at for d in rest) if together else 0
        letters: list[Any] = [*rest[:before], *(("i", k) for k in range(picked)), *rest[before:]]
        letters = letters[len(letters) - len(values.dims) :]
        for position, letter in enumerate(letters):
            if isinstance(letter, tuple) and not values.is_free(position):
                raise Mixes("writes channels at places known only at run time")
        for position in reversed(range(len(letters))):
            if isinstance(letters[position], tuple):
                values, letters = (
                    values.squeezed(position),
                    [*letters[:position], *letters[position + 1 :]],
                )
        operands.append((values, letters))
    return propagation.flow.combine(operands, range(rank), dict(enumerate(shape(node))))


# --- writing in place ---------------------------------------------------------------------------


def unview(propagation: Propagation, view: fx.Node, value: LabeledValue) -> LabeledValue:
    """The labels of what ``view`` is a view of, given the view's.

    Raises:
        Mixes: they are not known.
    """
    (source, *_) = view.all_input_nodes
    if not is_tensor(source):
        raise Mixes("writes in place to a part of a value")
    sizes = shape(source)
    if has(view, Trait.ALIAS):
        return value
    if has(view, Trait.SLICE):
        dim = (argument(view, "dim") or 0) % len(sizes)
        before = propagation.of(source)
        if value.is_free(dim) and (before is None or before.is_free(dim)):
            return value.resized(dim, sizes[dim])
        return written_into(propagation, view, value, before, dim)
    if view.target is aten.select.int:
        dim = argument(view, "dim") % len(sizes)
        return value.unsqueezed(dim, sizes[dim])
    if has(view, Trait.TRANSPOSE):
        order = order_of(view)
        return value.permuted([order.index(dim) for dim in range(len(sizes))])
    # Not all that may be a view: what ``reshape`` gives may be a copy.
    if view.target is aten.view.default or has(view, Trait.AXIS):
        return value.viewed(sizes)
    raise Mixes("writes in place to a view of a value")

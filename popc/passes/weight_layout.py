"""Layout pass: weights are stored channel-major, along the axis that a decode step's lists index.

A gather saves bytes only where a channel's values are neighbours: ``down [D, F]``, read by columns,
is to be stored as ``[F, D]``. The storage is replaced once: the parameter keeps its object, shape
and values, and becomes a transposed view of new memory; the old is freed. No second copy stays, and
all that shares the parameter sees the same values.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakTensorKeyDictionary

from popc import compat
from popc.analysis.capture import Captured
from popc.analysis.input_groups import InputGroup
from popc.analysis.labels import same_size
from popc.analysis.linears import Linear, Weight, is_view_of_weight
from popc.ops.pages import collapse, page_out
from popc.passes.base import UNCHANGED, PassResult
from popc.passes.builder import map_arguments
from popc.passes.pack_weights import has_kernel
from popc.planning.rewrite_plan import Owner, RewritePlan

aten = torch.ops.aten


def store_channel_major(captured: Captured, work: RewritePlan) -> PassResult:
    """Store the weights of ``work.owners`` channel-major; refuse those that can't be stored so.

    Devices without a kernel for gathers have no use for it: see :mod:`popc.passes.pack_weights`.
    """
    if work.device is None or not has_kernel(work.device):
        return UNCHANGED
    changed: list[fx.Node] = []
    try:
        refused = _relayout_all(captured, work.owners, changed)
    except Exception:
        # The graph runs dense then, with those that have changed by now.
        _take_new_strides(captured, changed)
        raise
    _take_new_strides(captured, changed)
    if refused:
        work.refuse(refused, "layout")
        work.assign(captured)
    return PassResult(len(changed))


def _take_new_strides(captured: Captured, placeholders: Sequence[fx.Node]) -> None:
    """Tell Dynamo the new strides of these, and give the graph's values those that follow."""
    if not placeholders:
        return
    compat.take_new_strides([captured.parameters[node] for node in placeholders])
    for node in placeholders:
        parameter = captured.parameters[node]
        node.meta["val"] = compat.fakify(captured.fake_mode, parameter)
    propagate_strides(captured, placeholders)


def propagate_strides(captured: Captured, nodes: Sequence[fx.Node]) -> None:
    """Give values the strides that follow from those of ``nodes``, which have changed."""
    changed = set(nodes)
    for node in captured.gm.graph.nodes:
        if node.op != "call_function" or changed.isdisjoint(node.all_input_nodes):
            continue
        before = node.meta["val"]
        args, kwargs = map_arguments(node.args, node.kwargs, lambda n: n.meta["val"])
        with captured.fake_mode:
            value = node.target(*args, **kwargs)
        if not _same_strides(before, value):
            node.meta["val"] = value
            changed.add(node)


def _same_strides(before: Any, value: Any) -> bool:
    pairs = zip(compat.pytree.tree_leaves(before), compat.pytree.tree_leaves(value), strict=True)
    return all(
        all(map(same_size, one.stride(), other.stride()))
        for one, other in pairs
        if isinstance(one, Tensor)
    )


def _relayout_all(
    captured: Captured, owners: Sequence[Owner], changed: list[fx.Node]
) -> dict[Owner, str]:
    """Store channel-major what gains by it; ``changed`` gains each parameter as soon as it changes.

    Returns:
        The owners whose weights can't be stored channel-major, with the reason.
    """
    linears = {linear.node for owner in owners for linear, _ in _weight_uses(owner)}
    roles: dict[fx.Node, list[tuple[Weight, int]]] = {}
    for owner in owners:
        for linear, dim in _weight_uses(owner):
            roles.setdefault(linear.weight.parameter, []).append((linear.weight, dim))
    refused: dict[fx.Node, str] = {}
    for parameter, uses in roles.items():
        if parameter in captured.quantized:
            continue  # stored as they are read when they were quantised
        real = captured.parameters[parameter]
        is_laid_out = any(is_contiguous_along(weight.node.meta["val"], dim) for weight, dim in uses)
        if is_laid_out or not any(_transposing_helps(weight, dim, real) for weight, dim in uses):
            # As one of its lists has it: a change would cost that list what another gains.
            _laid_out[real] = True
            continue
        reason = _refusal(parameter, captured, linears)
        if real in _laid_out:
            warnings.warn(_CONFLICT, stacklevel=2)  # and what lists leave out is still left out
        elif reason is None:
            # One parameter at a time: the peak is one weight above what the model holds.
            before = real.detach()
            real.data = transpose_storage(before)
            changed.append(parameter)
            page_out(before)
            del before
            _laid_out[real] = True
        else:
            refused[parameter] = reason
    use_huge_pages(captured.parameters[parameter] for parameter in roles)
    return {
        owner: refused[linear.weight.parameter]
        for owner in owners
        for linear, _ in _weight_uses(owner)
        if linear.weight.parameter in refused
    }


_laid_out = WeakTensorKeyDictionary()  # weights whose layout a compiled graph relies on
_CONFLICT = (
    "another popc.compile of this model, under another policy, has stored its weights otherwise: "
    "this one is right, but reads more than it needs. Compile a copy.deepcopy of the model instead."
)
_in_huge_pages = WeakTensorKeyDictionary()


def use_huge_pages(weights: Iterable[Tensor]) -> None:
    """Ask for huge pages, once for each storage."""
    for weight in filter(_has_plain_storage, weights):
        address = weight.untyped_storage().data_ptr()
        if _in_huge_pages.get(weight) != address:
            _in_huge_pages[weight] = address
            collapse(weight)


def transpose_storage(value: Tensor) -> Tensor:
    """``value`` with its last two dims swapped in memory; shape and values stay."""
    return value.mT.contiguous().mT


def _weight_uses(owner: Owner) -> list[tuple[Linear, int]]:
    """The owner's linears, each with the dim of its weight that lists name channels of."""
    if isinstance(owner, InputGroup):
        return [(linear, linear.weight.in_dim) for linear in owner.linears]
    uses = [(p.linear, p.linear.weight.out_dim) for p in owner.producers]
    return uses + [(linear, linear.weight.in_dim) for linear in owner.consumers]


def is_contiguous_along(value: Tensor, dim: int) -> bool:
    """Whether the values of one index of ``dim`` (one of the last two) are neighbours."""
    other = 2 * value.dim() - 3 - dim
    return value.stride(other) == 1 or value.shape[other] == 1


def _has_plain_storage(value: Tensor) -> bool:
    """Whether its storage can be replaced: no subclass, and no tensor of inference mode."""
    return type(value) in (Tensor, torch.nn.Parameter) and not value.is_inference()


def _transposing_helps(weight: Weight, dim: int, real: Tensor) -> bool:
    if is_contiguous_along(weight.node.meta["val"], dim) or real.dim() < 2:
        return False
    transposed = weight.replayed(transpose_storage(torch.empty_like(real, device="meta")))
    return is_contiguous_along(transposed, dim)


def _refusal(parameter: fx.Node, captured: Captured, linears: set[fx.Node]) -> str | None:
    """Why the parameter's storage can't be replaced."""
    weight = captured.parameters[parameter]
    if weight.device.type == "meta":
        return "its weight is on the meta device, or offloaded: there is no storage to lay out"
    if not _has_plain_storage(weight):
        kind = type(weight).__name__
        return f"its weight is a {kind} that is no plain tensor, or was made in inference mode"
    if weight.untyped_storage().nbytes() != weight.nbytes:
        return "its weight is a part of a larger storage, which others share"
    others = [
        node
        for node, other in captured.parameters.items()
        if other is not weight and other.device == weight.device and node not in captured.wrapped
        and other.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    ]  # fmt: skip
    if others or compat.storage_users(weight) > 1:
        return "its weight is tied: other tensors share its storage"
    other_user = user_outside(parameter, linears)
    if other_user is not None:
        return f"its weight is shared with {other_user.target}, which reads it otherwise"
    return None


def user_outside(value: fx.Node, known: set[fx.Node]) -> fx.Node | None:
    """A node that reads the weight and is not among those that are ``known``."""
    for user in value.users:
        if user in known:
            continue
        if not is_view_of_weight(user):
            return user
        other = user_outside(user, known)
        if other is not None:
            return other
    return None

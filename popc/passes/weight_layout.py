"""Layout pass: a weight lies in memory by the channels that its lists name.

A gather saves bytes only where a channel's values are neighbours: ``down [D, F]``, read by columns,
is to be stored as ``[F, D]``. The change is made once, in place of the original storage: the
parameter keeps its object, shape and values, and becomes a transposed view of new memory; the old
is freed. No second copy stays, and all that shares the parameter sees the same values.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakTensorKeyDictionary

from popc import compat
from popc.analysis.capture import Captured
from popc.analysis.findings import Region
from popc.analysis.input_groups import InputGroup
from popc.analysis.linears import Linear, Weight, is_view_of_weight
from popc.log import logger
from popc.ops.pages import collapse, page_out

aten = torch.ops.aten

Owner = Region | InputGroup


def store_channel_major(
    captured: Captured, owners: Sequence[Owner]
) -> tuple[list[Tensor], dict[Owner, str]]:
    """Lay the weights of regions and of inputs out by channel, in place.

    Returns:
        The parameters that changed, as graphs traced before are out of date then; and the owners
        that can't be read by channel, with the reason.
    """
    turned: list[Tensor] = []
    try:
        return turned, _turn_all(captured, owners, turned)
    except Exception:
        if not turned:
            raise
        # Whatever comes now must know of these first. It runs again then, and fails again.
        return turned, {}


def _turn_all(
    captured: Captured, owners: Sequence[Owner], turned: list[Tensor]
) -> dict[Owner, str]:
    """:func:`store_channel_major`; ``turned`` gains what changes, as soon as it does."""
    linears = {linear.node for owner in owners for linear, _ in _uses(owner)}
    roles: dict[fx.Node, list[tuple[Weight, int]]] = {}
    for owner in owners:
        for linear, dim in _uses(owner):
            roles.setdefault(linear.weight.parameter, []).append((linear.weight, dim))
    refused: dict[fx.Node, str] = {}
    for parameter, uses in roles.items():
        held = captured.parameters[parameter]
        lies = any(is_contiguous_along(weight.node.meta["val"], dim) for weight, dim in uses)
        if lies or not any(_turning_helps(weight, dim, held) for weight, dim in uses):
            # Where it lies for one of its lists, what another gained that one would lose.
            _claimed[held] = True
            continue
        reason = _refusal(parameter, captured, linears)
        if held in _claimed:
            warnings.warn(_TAKEN, stacklevel=2)  # and what lists leave out is still left out
        elif reason is None:
            # One parameter at a time: the peak is one weight above what the model holds.
            before = held.detach()
            held.data = turn(before)
            turned.append(held)
            page_out(before)
            del before
            _claimed[held] = True
        else:
            refused[parameter] = reason
    if turned:
        logger.info("%d weights now lie by channel", len(turned))
    else:
        _collapse(captured.parameters[parameter] for parameter in roles)
    return {
        owner: refused[linear.weight.parameter]
        for owner in owners
        for linear, _ in _uses(owner)
        if linear.weight.parameter in refused
    }


_claimed = WeakTensorKeyDictionary()  # weights that lie as a compiled graph wants them
_TAKEN = (
    "another popc.compile of this model, under another policy, has laid its weights out otherwise: "
    "this one is right, but reads more than it needs. Compile a copy.deepcopy of the model instead."
)
_collapsed = WeakTensorKeyDictionary()


def _collapse(weights: Iterable[Tensor]) -> None:
    """Ask for huge pages, once for each storage."""
    for weight in filter(_is_plain, weights):
        where = weight.untyped_storage().data_ptr()
        if _collapsed.get(weight) != where:
            _collapsed[weight] = where
            collapse(weight)


def turn(value: Tensor) -> Tensor:
    """``value``, its last two dims the other way round in memory."""
    return value.mT.contiguous().mT


def _uses(owner: Owner) -> list[tuple[Linear, int]]:
    """The owner's linears, each with the dim of its weight that lists name channels of."""
    if isinstance(owner, InputGroup):
        return [(linear, linear.weight.in_dim) for linear in owner.linears]
    made = [(p.linear, p.linear.weight.out_dim) for p in owner.producers]
    return made + [(linear, linear.weight.in_dim) for linear in owner.consumers]


def is_contiguous_along(value: Tensor, dim: int) -> bool:
    """Whether the values of one index of ``dim`` (one of the last two) are neighbours."""
    other = 2 * value.dim() - 3 - dim
    return value.stride(other) == 1 or value.shape[other] == 1


def _is_plain(value: Tensor) -> bool:
    """Whether its storage is what it seems: no subclass, and no tensor of inference mode."""
    return type(value) in (Tensor, torch.nn.Parameter) and not value.is_inference()


def _turning_helps(weight: Weight, dim: int, held: Tensor) -> bool:
    if is_contiguous_along(weight.node.meta["val"], dim) or held.dim() < 2:
        return False
    turned = weight.replayed(turn(torch.empty_like(held, device="meta")))
    return is_contiguous_along(turned, dim)


def _refusal(parameter: fx.Node, captured: Captured, linears: set[fx.Node]) -> str | None:
    """Why the parameter's storage can't be replaced."""
    held = captured.parameters[parameter]
    if held.device.type == "meta":
        return "its weight is on the meta device, or offloaded: there is no storage to lay out"
    if not _is_plain(held):
        kind = type(held).__name__
        return f"its weight is a {kind} that is no plain tensor, or was made in inference mode"
    if held.untyped_storage().nbytes() != held.nbytes:
        return "its weight is a part of a larger storage, which others share"
    others = [
        node
        for node, other in captured.parameters.items()
        if other is not held and other.device == held.device and node not in captured.wrapped
        and other.untyped_storage().data_ptr() == held.untyped_storage().data_ptr()
    ]  # fmt: skip
    if others or compat.storage_users(held) > 1:
        return "its weight is tied: other tensors share its storage"
    foreign = _other_user(parameter, linears)
    if foreign is not None:
        return f"its weight is shared with {foreign.target}, which reads it otherwise"
    return None


def _other_user(value: fx.Node, linears: set[fx.Node]) -> fx.Node | None:
    """A node that reads the weight and is not among ``linears``."""
    for user in value.users:
        if user in linears:
            continue
        if not is_view_of_weight(user):
            return user
        found = _other_user(user, linears)
        if found is not None:
            return found
    return None

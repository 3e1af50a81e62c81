"""``popc_scale``: what the scores of all input groups of a graph are scaled with, side by side.

Where weights are quantised, that is for their high planes; ``popc_low_scale`` is for the low ones.
Scales of a group are ``[K]``, or ``[E, K]`` of experts, which come after all others: so channels
begin where they do in ``popc_center``, which experts are not in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx

from popc.analysis.capture import Captured
from popc.analysis.input_groups import InputGroup
from popc.passes.base import State
from popc.passes.builder import add_input
from popc.passes.region_binding import InputGroupBinding
from popc.policies import InputPolicy
from popc.sessions.inputs import InputGroupState


@dataclass(frozen=True, eq=False)
class InputState(State):
    """Input groups, and both scales for the parameters of one layer, or of one model."""

    owners: Sequence[InputGroupState]
    scale: Tensor
    low_scale: Tensor


def add_scale(
    captured: Captured, groups: Sequence[InputGroup], name: str = "popc_scale"
) -> fx.Node:
    """A new input, float32 ``[ΣK]``."""
    with captured.fake_mode:
        device = groups[0].x.meta["val"].device
        scale = torch.empty(sum(group.scale_count for group in groups), device=device)
    return add_input(captured, name, scale)


def segment_offsets(groups: Sequence[InputGroup]) -> list[tuple[int, int]]:
    """Where each group's scales start and stop in ``popc_scale``."""
    order = _in_order(groups)
    stops = list(accumulate(groups[i].scale_count for i in order))
    offsets = dict(zip(order, zip([0, *stops], stops, strict=False), strict=True))
    return [offsets[i] for i in range(len(groups))]


def _in_order(groups: Sequence[InputGroup]) -> list[int]:
    """Their numbers as their scales are stored."""
    return sorted(range(len(groups)), key=lambda i: bool(groups[i].experts))


def input_state(
    owners: Sequence[InputGroupBinding], policies: Sequence[InputPolicy], args: Sequence[Any]
) -> InputState:
    """The groups and their scales for the parameters among ``args``."""
    pairs = list(zip(owners, policies, strict=True))
    states = [owner.state(args, policy) for owner, policy in pairs]
    order = _in_order([owner.group for owner in owners])
    scales = zip(*(pairs[i][0].scales(args, pairs[i][1]) for i in order), strict=True)
    return InputState(states, *map(torch.cat, scales))

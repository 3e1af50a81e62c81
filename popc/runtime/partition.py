"""What the runtime knows of regions and inputs, and how statistics become their partition."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from popc.policies import Counts, InputPolicy, UnitPolicy
from popc.policies.allocation import GroupSpec


@dataclass(frozen=True, eq=False)
class RegionState:
    """What the runtime must know of one region, in every graph that it is part of.

    Attributes:
        key: the same in a prefill graph and in a decode graph: see :class:`popc.Region`.
        columns: int64 ``[U, m]``, the columns of h that belong to each unit.
        width: K, how many columns h has.
        experts: E, 0 where weights are not stacked.
        norm: ``‖W[:, columns]‖`` of what contracts h, float32 ``[U]``; ``[E, U]`` with experts.
        cached: whether a cache keeps keys or values of the units, so that what is pruned once has
            holes there and stays pruned.
        one_pass: whether the units are chosen by the pass that they are pruned in.
    """

    key: tuple[Any, ...]
    columns: Tensor
    width: int
    experts: int
    counts: Counts
    norm: Tensor
    cached: bool
    one_pass: bool
    policy: UnitPolicy

    @property
    def weights(self) -> tuple[Hashable, ...]:
        """Which parameters it is known by."""
        return self.key[0]

    @property
    def measure(self) -> Hashable:
        """By what its statistics are known: the region, and the policy that measures."""
        return self.key, self.policy.name


@dataclass(frozen=True, eq=False)
class InputGroupState:
    """What the runtime must know of linears that share an input: see :class:`InputGroup`."""

    key: tuple[Any, ...]
    demand: GroupSpec
    policy: InputPolicy

    @property
    def weights(self) -> tuple[Hashable, ...]:
        """Which parameters it is known by."""
        return self.key[0]


@dataclass
class Partition:
    """Inputs of a decode graph: see :func:`popc.passes.prune_units.prune_units`.

    ``lost`` are float32 ``[S, K]``: h's mean at pruned units and 0 elsewhere, for each region that
    compensates; ``compensation`` is what their weights make of it. ``weights`` are copies of live
    rows, where :func:`popc.passes.pack.pack_weights` has them made.
    """

    index: Tensor
    norm: Tensor
    lost: Sequence[Tensor] = ()
    weights: Sequence[Tensor] | None = None
    compensation: Tensor | None = None


@dataclass
class ThresholdInputs:
    """Inputs of a decode graph, for ``groups``: see :mod:`popc.passes.threshold_inputs`.

    ``missing``: how many of the groups no prompt has measured; they read all their channels.
    """

    groups: Sequence[InputGroupState]
    thresholds: Tensor
    center: Tensor
    base: Tensor | None = None
    missing: int = 0


def _by_expert(sums: Tensor, region: RegionState) -> Tensor:
    return sums.view(region.experts, region.width) if region.experts else sums


def lost_of(sums: Tensor, region: RegionState, live: Tensor) -> Tensor:
    """h's mean at the columns of pruned units, 0 at others; float32 ``[S, K]``."""
    mean = region.policy.mean(*sums.chunk(region.policy.parts, dim=-1)).float()
    columns = region.columns.to(mean.device)
    own = columns.flatten()  # a linear may contract other channels too
    lost = torch.zeros_like(mean).index_copy(1, own, mean.index_select(1, own))
    return lost.scatter(1, columns[live].flatten(1), 0.0)


def unseen(sums: Tensor, region: RegionState) -> Tensor:
    """Bool ``[E]``: experts that no prompt token reached. They run dense until one has."""
    plain = sums.chunk(region.policy.parts, dim=-1)[0]
    return (_by_expert(plain, region) == 0).all(dim=-1)


def split(sums: Tensor, region: RegionState, living: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """R and C by rank of the policy's importance, the paper's ``‖W[:, u]‖ · sqrt(Σ h²)``.

    Args:
        sums: ``Σ h²``, float64 ``[S, K]``; with experts ``[1, E·K]``; all the policy's values'.
        living: bool ``[S, U]``: units that a cache holds in full; the others rank last.

    Returns:
        ``index`` int64 ``[S, |R| + |C|]`` (``[E, ...]`` with experts), R then C, each in ascending
        order of unit, and ``norm`` float32 of the same shape, what scores are scaled with. Of equal
        importances the lower unit ranks first.
    """
    counts = region.counts
    columns = region.columns.to(sums.device)
    policy = region.policy
    squares = [
        _by_expert(part, region)[:, columns].sum(-1) for part in sums.chunk(policy.parts, dim=-1)
    ]
    importance = policy.importance(squares[0], region.norm, *squares[1:])
    # NaN would rank first for good; such a unit was never usefully measured.
    importance = importance.nan_to_num(nan=0.0)
    if living is not None and living.shape == importance.shape:
        importance = importance.masked_fill(~living, -1.0)
    order = importance.argsort(dim=-1, descending=True, stable=True)
    retained = order[:, : counts.retained].sort(dim=-1).values
    candidate = order[:, counts.retained : counts.live].sort(dim=-1).values
    index = torch.cat((retained, candidate), dim=-1)
    norm = policy.scale(region.norm, *squares).expand(index.shape[0], -1)
    return index, norm.gather(-1, index)

"""Units of regions: what prompts measured of them, and the partitions that follow from it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from popc.planning.packing import Packing
from popc.policies import Counts, UnitPolicy
from popc.sessions.rows import for_rows


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


@dataclass
class Partition:
    """Inputs of a decode graph: see :func:`popc.passes.prune_units.prune_units`.

    ``lost`` are float32 ``[S, K]``: h's mean at pruned units and 0 elsewhere, for each region that
    compensates; ``compensation`` is what their weights make of it. ``weights`` are copies of live
    rows, where :func:`popc.passes.pack_weights.pack_weights` has them made.
    """

    index: Tensor
    norm: Tensor
    lost: Sequence[Tensor] = ()
    weights: Sequence[Tensor] | None = None
    compensation: Tensor | None = None


def _by_expert(sums: Tensor, region: RegionState) -> Tensor:
    return sums.view(region.experts, region.width) if region.experts else sums


def pruned_means(sums: Tensor, region: RegionState, live: Tensor) -> Tensor:
    """h's mean at the columns of pruned units, 0 at others; float32 ``[S, K]``."""
    mean = region.policy.mean(*sums.chunk(region.policy.parts, dim=-1)).float()
    columns = region.columns.to(mean.device)
    # A linear may contract other channels too.
    in_region = columns.flatten()
    lost = torch.zeros_like(mean).index_copy(1, in_region, mean.index_select(1, in_region))
    return lost.scatter(1, columns[live].flatten(1), 0.0)


def unseen_experts(sums: Tensor, region: RegionState) -> Tensor:
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
    norm = policy.scale(region.norm, *squares).float().expand(index.shape[0], -1)
    return index, norm.gather(-1, index)


@dataclass
class UnitStatistics:
    """Of one session, by the keys of the regions and the names of the policies that measure.

    Attributes:
        base: what policies that are calibrated go by, if not by this.
        seen: the weights of all regions that were measured.
        regions: those that were measured, by key.
    """

    base: UnitStatistics | None = None
    seen: set[Hashable] = field(default_factory=set)
    regions: dict[Hashable, RegionState] = field(default_factory=dict)
    _sums: dict[tuple[Hashable, str], Tensor] = field(default_factory=dict)
    _cached: dict[tuple[Hashable, str], Tensor] = field(default_factory=dict)
    _partitions: dict[Hashable, Partition] = field(default_factory=dict)

    def copy(self) -> UnitStatistics:
        """Tensors are shared: what is measured is replaced, never changed in place."""
        known = {name: value for name, value in vars(self).items() if name != "base"}
        return UnitStatistics(self.base, **{name: value.copy() for name, value in known.items()})

    def add(self, regions: Sequence[RegionState], scope: str, sums: Tensor) -> None:
        """Add a prefill's statistics ``[S, ΣK]`` float64 and let the partition be renewed."""
        widths = [r.width * max(1, r.experts) * r.policy.parts for r in regions]
        pieces = sums.detach().split(widths, dim=-1)
        for region, piece in zip(regions, pieces, strict=True):
            if self._base_of(region) is not None:
                continue
            before = for_rows(self._sums.get((region.measure, scope)), len(piece))
            # A copy: the compiled graph may reuse the memory of its output.
            total = piece.clone() if before is None else before + piece
            self._sums[region.measure, scope] = total
            self.seen.update(region.weights)
            self.regions[region.key] = region
        self._partitions.clear()

    def knows(self, region: RegionState, scope: str, sequences: int) -> bool:
        """Whether there are statistics for a partition of the region, or none are needed."""
        return region.one_pass or self._measured(region, scope, sequences) is not None

    def statistics(self, key: Hashable, scope: str, policy: str = "pop") -> Tensor | None:
        """The sum of squares ``[S, K]`` of a region so far, or None before its prefill.

        Of a policy that measures several values, theirs side by side.
        """
        return self._sums.get(((key, policy), scope))

    def all_rows(self) -> list[Tensor]:
        """Every statistic, its first dim the sequences."""
        return list(self._sums.values())

    def _measured(self, region: RegionState, scope: str, sequences: int) -> Tensor | None:
        """The statistics that the region's policy goes by."""
        base = self._base_of(region)
        sums = (base or self)._sums.get((region.measure, scope))
        if sums is None or base is None:
            return sums if region.experts else for_rows(sums, sequences)
        return sums.sum(0, keepdim=True).expand(sequences, -1)

    def _base_of(self, region: RegionState) -> UnitStatistics | None:
        return self.base if region.policy.calibrated else None

    def cached_units(self, regions: Sequence[RegionState], scope: str, batch: int) -> Tensor:
        """``popc_keep`` of :mod:`popc.passes.measure_units` for cached regions."""
        parts = []
        for region in regions:
            cached = for_rows(self._cached.get((region.key, scope)), batch)
            device = region.norm.device
            part = torch.ones(batch, region.width, device=device)
            if cached is not None:
                flat = region.columns.to(device).reshape(-1)
                part[:, flat] = cached.float().repeat_interleave(region.columns.shape[1], dim=-1)
            parts.append(part)
        return torch.cat(parts, dim=-1)

    def partition(
        self,
        owner: Hashable,
        regions: Sequence[RegionState],
        packing: Packing,
        scope: str,
        batch: int | None,
    ) -> Partition | None:
        """The partition for ``regions``, packed, or None if it is not known.

        Args:
            owner: whoever asks; each owner's partition is kept until the next prefill.
            batch: with ``scope="sequence"``, the batch size; a partition of another does not fit.
        """
        cached = self._partitions.get(owner)
        if cached is not None and (batch is None or len(cached.index) == batch):
            return cached
        partition = self._new_partition(regions, packing, scope, batch)
        if partition is not None and batch is not None and len(partition.index) != batch:
            partition = None
        if partition is not None:
            self._partitions[owner] = partition
        return partition

    def _new_partition(
        self, regions: Sequence[RegionState], packing: Packing, scope: str, batch: int | None
    ) -> Partition | None:
        live: list[Tensor] = []
        norms: list[Tensor] = []
        full: list[Tensor | None] = []
        lost: list[Tensor] = []
        sequences = batch or 1
        for region in regions:
            if region.one_pass:
                units = torch.arange(len(region.columns), device=region.norm.device)
                live.append(units.expand(sequences, -1))
                norms.append(region.norm.expand(sequences, -1))
                full.append(None)
                continue
            sums = self._measured(region, scope, sequences)
            if sums is None:
                return None
            cached = for_rows(self._cached.get((region.key, scope)), sequences)
            units, norm = split(sums, region, cached)
            if region.policy.compensates:
                lost.append(pruned_means(sums, region, units))
            live.append(units)
            norms.append(norm.reshape(1, -1) if region.experts else norm)
            full.append(unseen_experts(sums, region) if region.experts else None)
        if len({norm.shape[0] for norm in norms}) > 1:
            return None
        for region, units in zip(regions, live, strict=True):
            if region.cached:
                cached = torch.zeros(units.shape[0], len(region.columns), dtype=torch.bool)
                self._cached[region.key, scope] = cached.to(units.device).scatter_(1, units, True)
        index, norm = packing.pack(live, full), torch.cat(norms, dim=-1)
        if scope == "batch":
            index, norm = index[0], norm[0]
        return Partition(index, norm, lost)

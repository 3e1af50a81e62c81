"""Inputs of linears: what prompts measured of them, and the thresholds that follow from it."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from popc.ops.measure import centers
from popc.policies import InputPolicy
from popc.policies.allocation import READ_ALL, Budget, GroupSpec
from popc.sessions.rows import for_rows


@dataclass(frozen=True, eq=False)
class InputGroupState:
    """What the runtime must know of linears that share an input: see :class:`InputGroup`."""

    key: tuple[Any, ...]
    spec: GroupSpec
    policy: InputPolicy

    @property
    def weights(self) -> tuple[Hashable, ...]:
        """Which parameters it is known by."""
        return self.key[0]


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


@dataclass
class InputStatistics:
    """Of one session, by the keys of the groups.

    Attributes:
        seen: the weights of all groups that were measured.
        reads: under ``Config(count=True)``, the channels that each group read, step by step; one
            whose high plane alone was read counts as the share of its bytes that that is.
    """

    seen: set[Hashable] = field(default_factory=set)
    reads: dict[Hashable, list[float]] = field(default_factory=dict)
    _histograms: dict[tuple[Hashable, str], Tensor] = field(default_factory=dict)
    _moments: dict[tuple[Hashable, str], Tensor] = field(default_factory=dict)
    _groups: dict[Hashable, InputGroupState] = field(default_factory=dict)
    _allocated: dict[Hashable, dict[Hashable, Tensor]] = field(default_factory=dict)
    _fed: dict[Hashable, ThresholdInputs] = field(default_factory=dict)  # what each owner last was
    _by_budget: dict[tuple[Hashable, Budget], ThresholdInputs] = field(default_factory=dict)

    def copy(self) -> InputStatistics:
        """Tensors are shared: what is measured is replaced, never changed in place."""
        reads = {key: list(steps) for key, steps in self.reads.items()}
        known = {name: value.copy() for name, value in vars(self).items()}
        return InputStatistics(**{**known, "reads": reads})

    def moments(
        self, groups: Sequence[InputGroupState], scope: str, sequences: int, like: Tensor
    ) -> Tensor:
        """``popc_moments``, see :mod:`popc.passes.measure_inputs`: 0 before a prefill."""
        sizes = [2 * group.spec.width + 1 for group in groups]
        total = torch.zeros((sequences, sum(sizes)), dtype=torch.float64, device=like.device)
        for group, part in zip(groups, total.split(sizes, 1), strict=True):
            known = for_rows(self._moments.get((group.key, scope)), sequences)
            if known is not None:
                part.copy_(known)
        return total

    def add(
        self, groups: Sequence[InputGroupState], scope: str, measured: Sequence[Tensor]
    ) -> None:
        """Add a prefill's histograms and let thresholds be renewed.

        Args:
            measured: for each group the moments ``[S, 2K + 1]`` of all prefills, this one too, and
                the histogram ``[S, BINS + 1]`` of this one.
        """
        for group, moments, histogram in zip(groups, measured[::2], measured[1::2], strict=True):
            # Kept as they are: what measures is no CUDA graph, which would write to them again.
            self._moments[group.key, scope] = moments
            before = for_rows(self._histograms.get((group.key, scope)), len(histogram))
            if before is not None:
                histogram = before + histogram
            self._histograms[group.key, scope] = histogram
            self._groups[group.key] = group
            self.seen.update(group.weights)
        self._fed.clear()
        self._by_budget.clear()
        self._allocated.clear()

    def histogram(self, key: Hashable, scope: str) -> Tensor | None:
        """The scores of a group of inputs so far, ``[S, BINS + 1]``; None before its prefill."""
        return self._histograms.get((key, scope))

    def all_rows(self) -> list[Tensor]:
        """Every histogram, its first dim the sequences."""
        return list(self._histograms.values())

    def feed(
        self,
        owner: Hashable,
        groups: Sequence[InputGroupState],
        scope: str,
        budget: Budget,
        like: Tensor,
        batch: int | None = None,
    ) -> ThresholdInputs | None:
        """The thresholds of ``groups`` and their centers, on the device of ``like``.

        The budget is that of all groups that prompts measured, in whatever graphs, so that it does
        not matter how Dynamo splits a model. A group that none measured reads all its channels;
        None if that holds for each.

        Args:
            owner: whoever asks; each owner's thresholds are kept until the next prefill, those of
                each budget.
            batch: with ``scope="sequence"``, the batch size; thresholds of another do not fit.
        """
        known = self._by_budget.get((owner, budget))
        if known is not None and (batch is None or len(known.center) == batch):
            self._fed.pop(owner, None)  # to the end: what was fed last is what counts
            self._fed[owner] = known
            return known
        thresholds = self._thresholds(scope, budget, batch)
        if not any(group.key in thresholds for group in groups):
            return None
        rows = len(next(iter(thresholds.values())))
        unknown = torch.full((rows,), READ_ALL)
        limits = torch.stack([thresholds.get(g.key, unknown) for g in groups]).to(like.device)
        before = self._fed.pop(owner, None)
        if before is not None and len(before.center) == rows:
            fed = replace(before, thresholds=limits)  # its center, and what weights make of it
        else:
            fed = ThresholdInputs(
                groups=tuple(groups),
                thresholds=limits,
                center=self._centers(groups, thresholds.keys(), scope, rows, like),
                missing=sum(group.key not in thresholds for group in groups),
            )
        self._fed[owner] = self._by_budget[owner, budget] = fed
        return fed

    def _centers(
        self,
        groups: Sequence[InputGroupState],
        known: Collection[Hashable],
        scope: str,
        rows: int,
        like: Tensor,
    ) -> Tensor:
        """Of those groups that are ``known``, and else 0, float32 ``[rows, ΣK]`` side by side."""
        parts = [
            centers(self._moments[group.key, scope])
            if group.key in known
            else torch.zeros(1, group.spec.width, device=like.device)
            for group in groups
            if group.spec.has_centers
        ]
        none = torch.zeros(rows, 0, device=like.device)
        return torch.cat([none, *(part.expand(rows, -1) for part in parts)], 1)

    def _thresholds(self, scope: str, budget: Budget, batch: int | None) -> dict[Hashable, Tensor]:
        """Of all measured groups, float32 ``[S]`` on the CPU by their keys."""
        key = scope, budget, batch
        if key not in self._allocated:
            self._allocated[key] = self._allocate(*key)
        return self._allocated[key]

    def _allocate(self, scope: str, budget: Budget, batch: int | None) -> dict[Hashable, Tensor]:
        histograms = {
            key: histogram if batch is None else for_rows(histogram, batch)
            for (key, histogram_scope), histogram in self._histograms.items()
            if histogram_scope == scope
        }
        known = {key: histogram for key, histogram in histograms.items() if histogram is not None}
        if not known or len({len(histogram) for histogram in known.values()}) > 1:
            return {}
        thresholds: dict[Hashable, Tensor] = {}
        for policy in dict.fromkeys(self._groups[key].policy for key in known):
            keys = [key for key in known if self._groups[key].policy is policy]
            specs = [self._groups[key].spec for key in keys]
            by_sequence = [
                policy.allocate(histograms_of_sequence, specs, budget).thresholds
                for histograms_of_sequence in torch.stack([known[key] for key in keys], 1).cpu()
            ]
            thresholds.update(zip(keys, torch.stack(by_sequence, 1), strict=True))
        return thresholds

    @property
    def thresholds(self) -> dict[Hashable, Tensor]:
        """Of pruned inputs, since the last prefill, float32 ``[S]`` by the key of the inputs."""
        fed = self._fed.values()
        return {g.key: row for x in fed for g, row in zip(x.groups, x.thresholds, strict=True)}

    @property
    def centers(self) -> dict[Hashable, Tensor]:
        """Likewise, float32 ``[S, K]``."""
        by_key: dict[Hashable, Tensor] = {}
        for fed in self._fed.values():
            groups = [group for group in fed.groups if group.spec.has_centers]
            parts = fed.center.split([group.spec.width for group in groups], 1)
            by_key.update(zip([group.key for group in groups], parts, strict=True))
        return by_key

    def count(self, groups: Sequence[InputGroupState], read: Tensor) -> None:
        """Note what a decode step read.

        Args:
            read: of how many channels, int64 ``[G]``; or ``[G, 2]``, the high and the low planes.
        """
        for group, counted in zip(groups, read.tolist(), strict=True):
            self.reads.setdefault(group.key, []).append(_channels(group.spec, counted))


def _channels(spec: GroupSpec, counted: int | Sequence[int]) -> float:
    """How many channels take as many bytes as what was read."""
    if isinstance(counted, int):
        return counted
    high, low = counted
    return high if spec.high is None else low + spec.high.share * (high - low)

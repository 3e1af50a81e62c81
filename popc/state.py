"""Sessions: the statistics and the partition that belong to one KV cache.

A session is told in one of two ways. ``popc.compile``'s wrapper sees the cache object, which holds
its session, and names that around the call (:func:`use`). Under ``torch.compile(backend="popc")``
only tensors are seen: a static cache's tensors stay the same objects, and a dynamic cache's tensors
of one call are the inputs of the next, so sessions are found by the tensors they touched, held
weakly. Either way, a dropped cache frees its session.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Hashable, Iterable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from popc import compat
from popc.budget import Budget, allocate
from popc.ops.measure import centers
from popc.partition import InputsState, Limits, Partition, RegionState, lost_of, split, unseen
from popc.passes.packing import Packing


class Left(NamedTuple):
    """A tensor as a call left it, after so many writes to it."""

    tensor: weakref.ref[Tensor]
    writes: int | None

    def is_still(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is that one, and nobody wrote to it since.

        What goes through ``.data`` is not seen.
        """
        return self.tensor() is tensor and compat.writes_to(tensor) == self.writes


class Session:
    """Statistics of one KV cache, and the partitions that follow from them.

    Not shared between threads: one generation runs in one thread at a time.

    Attributes:
        whole: whether it began with an empty cache, so that all its tokens were seen.
        base: what policies that are calibrated take their statistics from, if not from here.
        regions: those that were measured, by key.
        told: whether Dynamo was told which sizes grow with each token.
        left: a tensor of the cache, as the last call left it: see :mod:`popc.caches`.
        lengths: those that caches hold in a tensor, likewise.
        reads: with ``count``, the channels that each group of inputs read, step by step.
    """

    def __init__(self, whole: bool = True, base: Session | None = None) -> None:
        self.whole, self.base = whole, base
        self._sums: dict[tuple[Hashable, str], Tensor] = {}
        self._living: dict[tuple[Hashable, str], Tensor] = {}
        self._partitions: dict[Hashable, Partition] = {}
        self._histograms: dict[tuple[Hashable, str], Tensor] = {}
        self._moments: dict[tuple[Hashable, str], Tensor] = {}
        self._limits: dict[Hashable, Limits] = {}
        self._seen: set[Hashable] = set()
        self.told = False
        self.left: weakref.ref[Tensor] | None = None
        self.lengths: Sequence[Left] = ()
        self.reads: dict[Hashable, list[int]] = {}
        self.regions: dict[Hashable, RegionState] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        """For the copy of a cache, as of a prefix that several prompts share.

        What is measured is replaced, never changed in place, so copies may share it.
        """
        other = Session(self.whole, self.base)
        for name, held in vars(self).items():
            setattr(other, name, held.copy() if isinstance(held, dict | set) else held)
        # Of a cache, attributes are copied in order, and its session was the last one.
        left = None if self.left is None else memo.get(id(self.left()))
        other.left = None if left is None else weakref.ref(left)
        other.reads = {key: list(steps) for key, steps in self.reads.items()}
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        """A cache read from a file has no partition: what sessions hold is known by identity."""
        return Session, (False,)

    def add(self, regions: Sequence[RegionState], scope: str, sums: Tensor) -> None:
        """Add a prefill's statistics ``[S, ΣK]`` float64 and let the partition be renewed."""
        widths = [r.width * max(1, r.experts) * r.policy.parts for r in regions]
        pieces = sums.detach().split(widths, dim=-1)
        for region, piece in zip(regions, pieces, strict=True):
            if self._base_of(region) is not None:
                continue
            before = self._sums.get((region.measure, scope))
            known = before is not None and before.shape == piece.shape
            # A copy: the compiled graph may reuse the memory of its output.
            self._sums[region.measure, scope] = before + piece if known else piece.clone()
            self._seen.update(region.weights)
            self.regions[region.key] = region
        self._partitions.clear()

    def has_seen(self, owners: Iterable[RegionState | InputsState]) -> bool:
        """Whether a prefill measured a weight of ``owners``, be it as part of others."""
        return any(not self._seen.isdisjoint(owner.weights) for owner in owners)

    def rows_differ(self) -> bool:
        """Whether sequences have statistics of their own, so that their order counts."""
        held = (*self._sums.values(), *self._histograms.values())
        return any(len(rows) > 1 and bool((rows != rows[:1]).any()) for rows in held)

    def statistics(self, key: Hashable, scope: str, policy: str = "pop") -> Tensor | None:
        """The sum of squares ``[S, K]`` of a region so far, or None before its prefill.

        Of a policy that measures several values, theirs side by side.
        """
        return self._sums.get(((key, policy), scope))

    def _measured(self, region: RegionState, scope: str, sequences: int) -> Tensor | None:
        """The statistics that the region's policy goes by."""
        base = self._base_of(region)
        sums = (base or self)._sums.get((region.measure, scope))
        if sums is None or base is None:
            return sums
        return sums.sum(0, keepdim=True).expand(sequences, -1)

    def _base_of(self, region: RegionState) -> Session | None:
        return self.base if region.policy.calibrated else None

    def moments(
        self, groups: Sequence[InputsState], scope: str, sequences: int, like: Tensor
    ) -> Tensor:
        """``popc_moments`` of :func:`popc.passes.contract.add_measures`: 0 before a prefill."""
        sizes = [2 * group.demand.width + 1 for group in groups]
        total = torch.zeros((sequences, sum(sizes)), dtype=torch.float64, device=like.device)
        for group, part in zip(groups, total.split(sizes, 1), strict=True):
            known = self._moments.get((group.key, scope))
            if known is not None and len(known) == sequences:
                part.copy_(known)
        return total

    def add_measures(
        self, groups: Sequence[InputsState], scope: str, measured: Sequence[Tensor]
    ) -> None:
        """Add a prefill's histograms and let thresholds be renewed.

        Args:
            measured: for each group the moments ``[S, 2K + 1]`` of all prefills, this one too, and
                the histogram ``[S, BINS + 1]`` of this one.
        """
        for group, seen, counted in zip(groups, measured[::2], measured[1::2], strict=True):
            # Held as they are: what measures is no CUDA graph, which would write to them again.
            self._moments[group.key, scope] = seen
            before = self._histograms.get((group.key, scope))
            if before is not None and before.shape == counted.shape:
                counted = before + counted
            self._histograms[group.key, scope] = counted
            self._seen.update(group.weights)
        self._limits.clear()

    def histogram(self, key: Hashable, scope: str) -> Tensor | None:
        """The scores of a group of inputs so far, ``[S, BINS + 1]``; None before its prefill."""
        return self._histograms.get((key, scope))

    def limits(
        self,
        owner: Hashable,
        groups: Sequence[InputsState],
        scope: str,
        budget: Budget,
        like: Tensor,
    ) -> Limits | None:
        """The thresholds of ``groups`` and their centers, on the device of ``like``.

        None if a group's prefill is not known. ``owner`` as in :meth:`partition`.
        """
        held = self._limits.get(owner)
        if held is not None:
            return held
        found = [self.histogram(group.key, scope) for group in groups]
        counted = [histogram for histogram in found if histogram is not None]
        if len(counted) < len(groups) or len({len(histogram) for histogram in counted}) > 1:
            return None
        demands = [group.demand for group in groups]
        by_sequence = [
            allocate(one, demands, budget).thresholds for one in torch.stack(counted, 1).cpu()
        ]
        thresholds = torch.stack(by_sequence, 1).to(like.device)
        middles = [centers(self._moments[group.key, scope]) for group in groups]
        self._limits[owner] = Limits(tuple(groups), thresholds, torch.cat(middles, 1))
        return self._limits[owner]

    @property
    def thresholds(self) -> dict[Hashable, Tensor]:
        """Of contraction, since the last prefill, float32 ``[S]`` by the key of the inputs."""
        held = self._limits.values()
        return {g.key: row for x in held for g, row in zip(x.groups, x.thresholds, strict=True)}

    @property
    def centers(self) -> dict[Hashable, Tensor]:
        """Likewise, float32 ``[S, K]``."""
        found: dict[Hashable, Tensor] = {}
        for held in self._limits.values():
            parts = held.center.split([group.demand.width for group in held.groups], 1)
            found.update(zip([group.key for group in held.groups], parts, strict=True))
        return found

    def count(self, groups: Sequence[InputsState], read: Tensor) -> None:
        """Note how many channels ``[G]`` a decode step read."""
        for group, channels in zip(groups, read.tolist(), strict=True):
            self.reads.setdefault(group.key, []).append(channels)

    def keep(self, regions: Sequence[RegionState], scope: str, batch: int) -> Tensor:
        """``popc_keep`` of :func:`popc.passes.prefill.add_statistics` for cached regions."""
        parts = []
        for region in regions:
            living = self._living.get((region.key, scope))
            device = region.norm.device
            if living is None or living.shape[0] != batch:
                parts.append(torch.ones(batch, region.width, device=device))
                continue
            part = torch.ones(batch, region.width, device=device)
            flat = region.columns.to(device).reshape(-1)
            spread = living.float().repeat_interleave(region.columns.shape[1], dim=-1)
            part[:, flat] = spread
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
        held = self._partitions.get(owner)
        if held is None:
            held = self._new_partition(regions, packing, scope, batch)
            if held is None:
                return None
            self._partitions[owner] = held
        if batch is not None and held.index.shape[0] != batch:
            return None
        return held

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
            units, norm = split(sums, region, self._living.get((region.key, scope)))
            if region.policy.compensates:
                lost.append(lost_of(sums, region, units))
            live.append(units)
            norms.append(norm.reshape(1, -1) if region.experts else norm)
            full.append(unseen(sums, region) if region.experts else None)
        if len({norm.shape[0] for norm in norms}) > 1:
            return None
        for region, units in zip(regions, live, strict=True):
            if region.cached:
                living = torch.zeros(units.shape[0], len(region.columns), dtype=torch.bool)
                self._living[region.key, scope] = living.to(units.device).scatter_(1, units, True)
        index, norm = packing.pack(live, full), torch.cat(norms, dim=-1)
        if scope == "batch":
            index, norm = index[0], norm[0]
        return Partition(index, norm, lost)


_named: ContextVar[Session | None] = ContextVar("popc_session", default=None)
_by_tensor = WeakTensorKeyDictionary()
_ATTRIBUTE = "_popc_session"
_lock = threading.Lock()


class use:
    """Run compiled graphs under ``session``.

    A class, as at each token a generator is slow.
    """

    __slots__ = ("_session", "_token")

    def __init__(self, session: Session) -> None:
        self._session = session

    def __enter__(self) -> None:
        self._token = _named.set(self._session)

    def __exit__(self, *_: object) -> None:
        _named.reset(self._token)


def named() -> Session | None:
    """The session that a wrapper named around this call."""
    return _named.get()


def of_cache(cache: object) -> Session | None:
    """The session of a cache object, if it has one."""
    held = getattr(cache, _ATTRIBUTE, None)
    return held if isinstance(held, Session) else None


def bind(cache: object, session: Session) -> None:
    """Give ``cache`` its session, for as long as the cache lives; a deep copy gets a copy of it."""
    with contextlib.suppress(AttributeError):  # a class with slots: it decodes dense
        object.__setattr__(cache, _ATTRIBUTE, session)


def of_tensors(tensors: Iterable[Tensor]) -> Session | None:
    """The session that last touched one of ``tensors``; None if two sessions did."""
    with _lock:
        found = {id(s): s for s in (_by_tensor.get(t) for t in tensors) if s is not None}
    return next(iter(found.values())) if len(found) == 1 else None


def touch(tensors: Iterable[Tensor], session: Session) -> None:
    """Note that ``tensors`` belong to ``session``, for as long as each lives."""
    with _lock:
        for tensor in tensors:
            _by_tensor[tensor] = session

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
from collections.abc import Hashable, Iterable, Sequence
from contextvars import ContextVar
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from popc import compat
from popc.ops.measure import centers
from popc.passes.packing import Packing
from popc.policies.allocation import READ_ALL, Budget
from popc.runtime.partition import (
    InputGroupState,
    Partition,
    RegionState,
    ThresholdInputs,
    lost_of,
    split,
    unseen,
)

T = TypeVar("T")


class TensorSnapshot(NamedTuple):
    """A tensor as a call left it, after so many writes to it."""

    tensor: TensorWeakRef
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
        left: a tensor of the cache, as the last call left it: see :mod:`popc.runtime.caches`.
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
        self._groups: dict[Hashable, InputGroupState] = {}
        self._allocated: dict[Hashable, dict[Hashable, Tensor]] = {}
        self._limits: dict[Hashable, ThresholdInputs] = {}
        self._seen: set[Hashable] = set()
        self.told = False
        self.left: TensorWeakRef | None = None
        self.lengths: Sequence[TensorSnapshot] = ()
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
        other.left = None if left is None else TensorWeakRef(left)
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
            before = for_rows(self._sums.get((region.measure, scope)), len(piece))
            # A copy: the compiled graph may reuse the memory of its output.
            total = piece.clone() if before is None else before + piece
            self._sums[region.measure, scope] = total
            self._seen.update(region.weights)
            self.regions[region.key] = region
        self._partitions.clear()

    def has_seen(self, owners: Iterable[RegionState | InputGroupState]) -> bool:
        """Whether a prefill measured a weight of ``owners``, be it as part of others."""
        return any(not self._seen.isdisjoint(owner.weights) for owner in owners)

    def knows(self, region: RegionState, scope: str, sequences: int) -> bool:
        """Whether there are statistics for a partition of the region, or none are needed."""
        return region.one_pass or self._measured(region, scope, sequences) is not None

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
            return sums if region.experts else for_rows(sums, sequences)
        return sums.sum(0, keepdim=True).expand(sequences, -1)

    def _base_of(self, region: RegionState) -> Session | None:
        return self.base if region.policy.calibrated else None

    def moments(
        self, groups: Sequence[InputGroupState], scope: str, sequences: int, like: Tensor
    ) -> Tensor:
        """``popc_moments``, see :mod:`popc.passes.threshold_inputs`: 0 before a prefill."""
        sizes = [2 * group.demand.width + 1 for group in groups]
        total = torch.zeros((sequences, sum(sizes)), dtype=torch.float64, device=like.device)
        for group, part in zip(groups, total.split(sizes, 1), strict=True):
            known = for_rows(self._moments.get((group.key, scope)), sequences)
            if known is not None:
                part.copy_(known)
        return total

    def measure_input_groups(
        self, groups: Sequence[InputGroupState], scope: str, measured: Sequence[Tensor]
    ) -> None:
        """Add a prefill's histograms and let thresholds be renewed.

        Args:
            measured: for each group the moments ``[S, 2K + 1]`` of all prefills, this one too, and
                the histogram ``[S, BINS + 1]`` of this one.
        """
        for group, seen, counted in zip(groups, measured[::2], measured[1::2], strict=True):
            # Held as they are: what measures is no CUDA graph, which would write to them again.
            self._moments[group.key, scope] = seen
            before = for_rows(self._histograms.get((group.key, scope)), len(counted))
            if before is not None:
                counted = before + counted
            self._histograms[group.key, scope] = counted
            self._groups[group.key] = group
            self._seen.update(group.weights)
        self._limits.clear()
        self._allocated.clear()

    def histogram(self, key: Hashable, scope: str) -> Tensor | None:
        """The scores of a group of inputs so far, ``[S, BINS + 1]``; None before its prefill."""
        return self._histograms.get((key, scope))

    def limits(
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
        None if that holds for each. ``owner`` and ``batch`` as in :meth:`partition`.
        """
        held = self._limits.get(owner)
        if held is not None and (batch is None or len(held.center) == batch):
            return held
        known = self._thresholds(scope, budget, batch)
        if not any(group.key in known for group in groups):
            return None
        rows = len(next(iter(known.values())))
        unknown = torch.full((rows,), READ_ALL)
        thresholds = torch.stack([known.get(group.key, unknown) for group in groups])
        middles = [
            centers(self._moments[group.key, scope])
            if group.key in known
            else torch.zeros(1, group.demand.width, device=like.device)
            for group in groups
        ]
        center = torch.cat([middle.expand(rows, -1) for middle in middles], 1)
        missing = sum(group.key not in known for group in groups)
        limits = ThresholdInputs(tuple(groups), thresholds.to(like.device), center, missing=missing)
        self._limits[owner] = limits
        return limits

    def _thresholds(self, scope: str, budget: Budget, batch: int | None) -> dict[Hashable, Tensor]:
        """Of all measured groups, float32 ``[S]`` on the CPU by their keys."""
        asked = scope, budget, batch
        if asked not in self._allocated:
            self._allocated[asked] = self._allocate(*asked)
        return self._allocated[asked]

    def _allocate(self, scope: str, budget: Budget, batch: int | None) -> dict[Hashable, Tensor]:
        counted = {
            key: histogram if batch is None else for_rows(histogram, batch)
            for (key, of), histogram in self._histograms.items()
            if of == scope
        }
        known = {key: held for key, held in counted.items() if held is not None}
        if not known or len({len(histogram) for histogram in known.values()}) > 1:
            return {}
        found: dict[Hashable, Tensor] = {}
        for policy in dict.fromkeys(self._groups[key].policy for key in known):
            own = [key for key in known if self._groups[key].policy is policy]
            demands = [self._groups[key].demand for key in own]
            by_sequence = [
                policy.allocate(one, demands, budget).thresholds
                for one in torch.stack([known[key] for key in own], 1).cpu()
            ]
            found.update(zip(own, torch.stack(by_sequence, 1), strict=True))
        return found

    @property
    def thresholds(self) -> dict[Hashable, Tensor]:
        """Of pruned inputs, since the last prefill, float32 ``[S]`` by the key of the inputs."""
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

    def count(self, groups: Sequence[InputGroupState], read: Tensor) -> None:
        """Note how many channels ``[G]`` a decode step read."""
        for group, channels in zip(groups, read.tolist(), strict=True):
            self.reads.setdefault(group.key, []).append(channels)

    def keep(self, regions: Sequence[RegionState], scope: str, batch: int) -> Tensor:
        """``popc_keep`` of :func:`popc.passes.statistics.measure_units` for cached regions."""
        parts = []
        for region in regions:
            living = for_rows(self._living.get((region.key, scope)), batch)
            device = region.norm.device
            if living is None:
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
        if held is not None and (batch is None or len(held.index) == batch):
            return held
        held = self._new_partition(regions, packing, scope, batch)
        if held is not None and batch is not None and len(held.index) != batch:
            held = None
        if held is not None:
            self._partitions[owner] = held
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
            living = for_rows(self._living.get((region.key, scope)), sequences)
            units, norm = split(sums, region, living)
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


def for_rows(known: Tensor | None, rows: int) -> Tensor | None:
    """What was measured of sequences ``[S, ...]``, for as many ``rows`` as a call has now.

    The cache of one sequence can be repeated for several, as with a prefix that they share. None if
    nothing is known, or if the sequences differ and are of another number.
    """
    if known is None or len(known) == rows:
        return known
    if len(known) > 1 and bool((known != known[:1]).any()):
        return None
    return known[:1].expand(rows, *known.shape[1:])


_named: ContextVar[Session | None] = ContextVar("popc_session", default=None)
_offered: ContextVar[Session | None] = ContextVar("popc_offered", default=None)
_prefilling: ContextVar[bool] = ContextVar("popc_prefilling", default=False)
_by_tensor = WeakTensorKeyDictionary()
_ATTRIBUTE = "_popc_session"
_lock = threading.Lock()


class _Setting(Generic[T]):
    """A context in which a variable has a value.

    A class, as at each token a generator is slow.
    """

    __slots__ = ("_token", "_value", "_variable")

    def __init__(self, variable: ContextVar[T], value: T) -> None:
        self._variable, self._value = variable, value

    def __enter__(self) -> None:
        self._token = self._variable.set(self._value)

    def __exit__(self, *_: object) -> None:
        self._variable.reset(self._token)


def use(session: Session) -> _Setting[Session | None]:
    """Run compiled graphs under ``session``."""
    return _Setting(_named, session)


def offer(session: Session) -> _Setting[Session | None]:
    """Have graphs begin ``session``, where their tensors belong to none yet."""
    return _Setting(_offered, session)


def offered() -> Session:
    """The session to begin; a new one where none was offered."""
    return _offered.get() or Session()


def prefill() -> _Setting[bool]:
    """A context whose calls are parts of a prompt, also those of a single token.

    Anywhere else a call with one token is a decode step. transformers' ``generate`` of a compiled
    model needs no such mark; a loop of one's own does, where the last chunk of a prompt may be of
    one token::

        with popc.prefill():
            for chunk in prompt.split(512, dim=1):
                out = compiled(chunk, past_key_values=cache)
    """
    return _Setting(_prefilling, True)


def is_prefill() -> bool:
    """Whether the call under way was said to be a part of a prompt."""
    return _prefilling.get()


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

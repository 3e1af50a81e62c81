"""Sessions: the statistics and the partition that belong to one KV cache.

A session is told in one of two ways. ``popc.compile``'s wrapper sees the cache object and names the
session around the call (:func:`use`). Under ``torch.compile(backend="popc")`` only tensors are
seen: a static cache's tensors stay the same objects, and a dynamic cache's tensors of one call are
the inputs of the next, so sessions are found by the tensors they touched. Both hold weakly: a
dropped cache frees its session.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from popc.config import Counts


@dataclass(frozen=True)
class RegionState:
    """What the runtime must know of one region, in every graph that it is part of.

    ``key`` is the same in a prefill graph and in a decode graph: the identities of the region's
    weights. ``norm`` is ``‖down[:, c]‖``, float32 ``[F]``.
    """

    key: Hashable
    channels: int
    counts: Counts
    norm: Tensor


@dataclass(frozen=True)
class Partition:
    """Packed inputs of a decode graph: see :func:`popc.passes.decode.prune_regions`."""

    index: Tensor
    norm: Tensor


class Session:
    """Statistics of one KV cache, and the partitions that follow from them.

    Not shared between threads: one generation runs in one thread at a time.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[Hashable, str], Tensor] = {}
        self._partitions: dict[Hashable, Partition] = {}

    def reset(self) -> None:
        """Forget everything: the cache was emptied."""
        self._sums.clear()
        self._partitions.clear()

    def add(self, regions: Sequence[RegionState], scope: str, sums: Tensor) -> None:
        """Add a prefill's statistics ``[S, ΣF]`` float64 and let the partition be renewed."""
        pieces = sums.detach().split([region.channels for region in regions], dim=-1)
        for region, piece in zip(regions, pieces, strict=True):
            before = self._sums.get((region.key, scope))
            known = before is not None and before.shape == piece.shape
            # A copy: the compiled graph may reuse the memory of its output.
            self._sums[region.key, scope] = before + piece if known else piece.clone()
        self._partitions.clear()

    def statistics(self, key: Hashable, scope: str) -> Tensor | None:
        """The sum of squares ``[S, F]`` of a region so far, or None before its prefill."""
        return self._sums.get((key, scope))

    def partition(
        self, owner: Hashable, regions: Sequence[RegionState], scope: str, batch: int | None
    ) -> Partition | None:
        """The partition for ``regions``, packed, or None if it is not known.

        Args:
            owner: whoever asks; each owner's partition is kept until the next prefill.
            batch: with ``scope="sequence"``, the batch size; a partition of another does not fit.
        """
        held = self._partitions.get(owner)
        if held is None:
            sums = [self._sums.get((region.key, scope)) for region in regions]
            if any(total is None for total in sums):
                return None
            pairs = [
                split(total, region)  # type: ignore[arg-type]
                for total, region in zip(sums, regions, strict=True)
            ]
            index = torch.cat([pair[0] for pair in pairs], dim=-1)
            norm = torch.cat([pair[1] for pair in pairs], dim=-1)
            if scope == "batch":
                index, norm = index[0], norm[0]
            held = self._partitions[owner] = Partition(index, norm)
        if batch is not None and held.index.shape[0] != batch:
            return None
        return held


def split(sums: Tensor, region: RegionState) -> tuple[Tensor, Tensor]:
    """R and C by rank of importance ``I_c = ‖down[:, c]‖ · sqrt(Σ h²)`` (arXiv 2602.06822).

    Args:
        sums: ``Σ h²``, float64 ``[S, F]``.

    Returns:
        ``index`` int64 ``[S, |R| + |C|]``, R then C, each in ascending order of channel, and
        ``norm`` float32 of the same shape. Of equal importances the lower channel ranks first.
    """
    counts = region.counts
    importance = sums.sqrt() * region.norm.to(torch.float64)
    # NaN would rank first for good; such a channel was never usefully measured.
    importance = importance.nan_to_num(nan=0.0)
    order = importance.argsort(dim=-1, descending=True, stable=True)
    retained = order[:, : counts.retained].sort(dim=-1).values
    candidate = order[:, counts.retained : counts.live].sort(dim=-1).values
    index = torch.cat((retained, candidate), dim=-1)
    return index, region.norm[index]


_named: ContextVar[Session | None] = ContextVar("popc_session", default=None)
_by_tensor = WeakTensorKeyDictionary()
_by_cache: dict[int, tuple[weakref.ref[object], Session]] = {}
_lock = threading.Lock()


@contextmanager
def use(session: Session) -> Iterator[None]:
    """Run compiled graphs under ``session``."""
    token = _named.set(session)
    try:
        yield
    finally:
        _named.reset(token)


def named() -> Session | None:
    """The session that a wrapper named around this call."""
    return _named.get()


def of_cache(cache: object) -> Session | None:
    """The session of a cache object, if it has one."""
    held = _by_cache.get(id(cache))
    return held[1] if held is not None and held[0]() is cache else None


def bind(cache: object, session: Session) -> None:
    """Give ``cache`` its session, for as long as the cache lives."""
    key = id(cache)

    def drop(ref: weakref.ref[object]) -> None:
        with _lock:
            if key in _by_cache and _by_cache[key][0] is ref:
                del _by_cache[key]

    with _lock:
        _by_cache[key] = (weakref.ref(cache, drop), session)


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

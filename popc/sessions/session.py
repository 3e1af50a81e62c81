"""Sessions: the statistics of one KV cache, and the partitions and thresholds that follow."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.weak import TensorWeakRef

from popc import compat
from popc.sessions.inputs import InputGroupState, InputStatistics
from popc.sessions.rows import rows_differ
from popc.sessions.units import RegionState, UnitStatistics


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
    """What belongs to one KV cache: statistics of its prompts, and what follows from them.

    Not shared between threads: one generation runs in one thread at a time.

    Attributes:
        whole: whether it began with an empty cache, so that all its tokens were seen.
        units: of regions whose units are pruned.
        inputs: of linears whose input channels are.
        growth_is_marked: whether Dynamo was told which sizes grow with each token.
        first_tensor: of the cache, as the last call left it: see :mod:`popc.runtime.caches`.
        lengths: those that caches hold in a tensor, likewise.
    """

    def __init__(self, whole: bool = True, base: Session | None = None) -> None:
        """``base``: what calibrated policies take their statistics from."""
        self.whole, self.base = whole, base
        self.units: UnitStatistics = UnitStatistics(None if base is None else base.units)
        self.inputs = InputStatistics()
        self.growth_is_marked = False
        self.first_tensor: TensorWeakRef | None = None
        self.lengths: Sequence[TensorSnapshot] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        """For the copy of a cache, as of a prefix that several prompts share."""
        other = Session(self.whole, self.base)
        other.units, other.inputs = self.units.copy(), self.inputs.copy()
        other.growth_is_marked, other.lengths = self.growth_is_marked, self.lengths
        # Of a cache, attributes are copied in order, and its session was the last one.
        first = None if self.first_tensor is None else memo.get(id(self.first_tensor()))
        other.first_tensor = None if first is None else TensorWeakRef(first)
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        """A cache read from a file has no partition: what sessions hold is known by identity."""
        return Session, (False,)

    def has_seen(self, owners: Iterable[RegionState | InputGroupState]) -> bool:
        """Whether a prefill measured a weight of ``owners``, be it as part of others."""
        seen = self.units.seen, self.inputs.seen
        return any(not weights.isdisjoint(owner.weights) for owner in owners for weights in seen)

    def rows_differ(self) -> bool:
        """Whether sequences have statistics of their own, so that their order counts."""
        measured = (*self.units.all_rows(), *self.inputs.all_rows())
        return any(len(rows) > 1 and rows_differ(rows) for rows in measured)

    def __getattr__(self, name: str) -> Any:
        """Names of popc 0.1, with a warning."""
        if name not in _MOVED:
            raise AttributeError(f"a Session has no attribute {name!r}")
        warnings.warn(f"Session.{name} is Session.{_MOVED[name]} now", DeprecationWarning, 2)
        return attrgetter(_MOVED[name])(self)


_MOVED = {
    "regions": "units.regions",
    "statistics": "units.statistics",
    "_sums": "units._sums",
    "_histograms": "inputs._histograms",
    "histogram": "inputs.histogram",
    "thresholds": "inputs.thresholds",
    "centers": "inputs.centers",
    "reads": "inputs.reads",
}

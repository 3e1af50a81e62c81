"""The protocol of passes: what one takes, what it answers with, and how calls serve it later.

A pass is a function ``(captured, work) -> PassResult``. It rewrites the graph in place, and where
it added inputs or outputs to it, answers with a :class:`Binding`, which feeds and takes them at
each call of the compiled graph. The passes and their order: :mod:`popc.passes.pipeline`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor

from popc.analysis.capture import Captured
from popc.passes.region_binding import InputGroupBinding, RegionBinding
from popc.planning.rewrite_plan import RewritePlan
from popc.sessions import Session
from popc.sessions.inputs import InputGroupState
from popc.sessions.units import Partition, RegionState


@dataclass(slots=True)
class Call:
    """One call of a compiled graph.

    Attributes:
        args: what the graph is called with, parameters included.
        session: of the KV cache that the call is for.
        batch: B where ``scope="sequence"`` and it can be told; else None.
        measures: whether what the graph measures counts: not in a decode step.
        warn_dense: warns, once for the graph, that a decode step runs something dense.
        inputs: ``args``, then what passes have fed so far.
        partition: what :mod:`popc.passes.prune_units` fed, for passes after it.
    """

    args: Sequence[Any]
    session: Session
    batch: int | None
    measures: bool
    warn_dense: Callable[[str], None]
    inputs: list[Any] = field(default_factory=list)
    partition: Partition | None = None

    @property
    def sequences(self) -> int:
        """How many have statistics of their own."""
        return self.batch or 1


@dataclass(frozen=True, eq=False)
class State:
    """What a binding knows of the parameters of one layer, or of one model: its ``owners``."""

    owners: Sequence[RegionState | InputGroupState]


@dataclass(frozen=True, eq=False)
class UnitState(State):
    """Regions whose units are measured or pruned."""

    owners: Sequence[RegionState]


S = TypeVar("S", bound=State)


class Binding(ABC, Generic[S]):
    """How calls serve a pass: values for the inputs that it added, and takers of its outputs.

    Attributes:
        owners: what of the graph it is about. Dynamo runs one graph for several layers, so what
            follows from their parameters is in a :class:`State`, made once for each set of them.
        outputs: how many outputs the pass appended.
        prunes: whether it leaves something out; else it measures.
    """

    owners: Sequence[RegionBinding | InputGroupBinding] = ()
    outputs = 0
    prunes = False

    @abstractmethod
    def state(self, args: Sequence[Any]) -> S:
        """For the parameters among the graph's inputs ``args``."""

    @abstractmethod
    def feed(self, call: Call, state: S) -> Sequence[Tensor] | None:
        """Values for the inputs that the pass added, in their order; None if nothing is known."""

    def absorb(self, call: Call, state: S, outputs: Sequence[Tensor]) -> None:
        """Take the ``outputs`` that the pass appended."""
        raise NotImplementedError

    def known(self, call: Call, state: S) -> Mapping[Hashable, bool]:
        """Where :meth:`feed` gave None: which regions, by key, a variant of the graph can prune."""
        return {}


class PassResult(NamedTuple):
    """``matches``: at how many places the pass rewrote the graph; with 0 it is as it was."""

    matches: int
    binding: Binding[Any] | None = None


Pass = Callable[[Captured, RewritePlan], PassResult]
UNCHANGED = PassResult(0)

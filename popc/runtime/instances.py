"""The states of a graph's bindings for each set of parameters, that is each layer, it runs with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch.utils.weak import WeakIdRef

from popc.analysis.capture import identity
from popc.analysis.plan import InputRecord, Plan, RegionRecord
from popc.log import logger
from popc.passes.base import Binding, State
from popc.passes.region_binding import RegionBinding
from popc.runtime import weight_watch
from popc.sessions.inputs import InputGroupState
from popc.sessions.units import RegionState


@dataclass(frozen=True, eq=False)
class Instance:
    """The states of a graph's bindings for one set of parameters.

    ``sample`` and ``changes`` tell whether norms in them are still right, by
    :mod:`popc.runtime.weight_watch`.
    """

    states: Sequence[State]
    pruned: Sequence[RegionState | InputGroupState]
    measured: Sequence[RegionState | InputGroupState]
    changes: int
    sample: torch.Tensor | None


class LastInstance:
    """The instance of the last call, by the ids of its weights.

    An id is its weight's for as long as that lives: with the first that does not, ``instance`` is
    None. Threads share no more than a reference to this, which is replaced as a whole.
    """

    __slots__ = ("_alive", "ids", "instance")

    def __init__(self, parameters: Sequence[torch.Tensor], instance: Instance) -> None:
        self.ids = tuple(map(id, parameters))
        self.instance: Instance | None = instance
        self._alive = [WeakIdRef(parameter, self._forget) for parameter in parameters]

    def _forget(self, _: object) -> None:
        self.instance = None


class Instances:
    """The instances of one graph, found by the parameters among a call's inputs.

    Args:
        bindings: of the graph's passes.
        samples: whether prompts can run here, at which the weights' values are compared.
        on_plan: called with the regions and input groups of each new instance.
    """

    def __init__(
        self,
        bindings: Sequence[Binding[Any]],
        samples: bool,
        on_plan: Callable[[Plan], None] | None,
    ) -> None:
        self._bindings, self._on_plan = bindings, on_plan
        owners = [owner for binding in bindings for owner in binding.owners]
        self._weights = sorted({i for owner in owners for i in owner.weights})
        self._samples = samples and bool(self._weights)
        self._weights_of = _getter(self._weights)
        self._by_identities: dict[tuple[int, ...], Instance] = {}
        self._last: LastInstance | None = None
        self._changes = weight_watch.changes()
        self._lock = threading.Lock()

    def of(self, args: Sequence[Any]) -> Instance:
        """The instance of the parameters among ``args``."""
        if self._changes != weight_watch.changes():
            self._drop_changed()
        parameters = self._weights_of(args)
        last = self._last
        if last is not None and last.ids == tuple(map(id, parameters)):
            instance = last.instance
            if instance is not None:
                return instance
        key = tuple(identity(args[i]) for i in self._weights)
        with self._lock:
            if key not in self._by_identities:
                self._by_identities[key] = self._new(args)
            instance = self._by_identities[key]
        self._last = LastInstance(parameters, instance)
        return instance

    def renewed(self, instance: Instance, args: Sequence[Any]) -> Instance:
        """``instance``; a new one if weights are others than those whose norms it holds."""
        if instance.sample is None or torch.equal(instance.sample, self._sample(args)):
            return instance
        logger.info("weights have changed: their norms are taken anew")
        weight_watch.note_change(identity(args[i]) for i in self._weights)
        return self.of(args)

    def _drop_changed(self) -> None:
        """Forget the states of weights that have changed since they were made."""
        with self._lock:
            self._changes, self._last = weight_watch.changes(), None
            for key, instance in list(self._by_identities.items()):
                if weight_watch.have_changed(key, instance.changes):
                    del self._by_identities[key]

    def _new(self, args: Sequence[Any]) -> Instance:
        changes = weight_watch.changes()  # before norms are taken: a change meanwhile counts
        if self._on_plan is not None:
            self._on_plan(self._plan(args))
        states = [binding.state(args) for binding in self._bindings]
        pairs = list(zip(self._bindings, states, strict=True))
        return Instance(
            states=states,
            pruned=[owner for binding, state in pairs if binding.prunes for owner in state.owners],
            measured=[
                owner for binding, state in pairs if not binding.prunes for owner in state.owners
            ],
            changes=changes,
            sample=self._sample(args) if self._samples else None,
        )

    def _plan(self, args: Sequence[Any]) -> Plan:
        regions: list[RegionRecord] = []
        inputs: list[InputRecord] = []
        for owner in (owner for binding in self._bindings for owner in binding.owners):
            if isinstance(owner, RegionBinding):
                regions.append(owner.named(args))
            else:
                inputs.append(owner.named(args))
        return Plan(regions=regions, inputs=inputs)

    def _sample(self, args: Sequence[Any]) -> torch.Tensor:
        return weight_watch.sample([args[i] for i in self._weights])


def _getter(positions: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function that picks the values at ``positions``: a loop is slow at each token."""
    if not positions:
        return lambda args: ()
    # One more, as of a single position this would give no tuple.
    return itemgetter(*positions, positions[0])

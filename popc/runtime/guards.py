"""The guards that a decode step keeps where nothing changes the model since its prompt.

At each call Dynamo evaluates a guard for all that its trace has read of the model: 6,000 guards on
30 layers, 1 ms of each token. With ``guards="prompt"`` prompts keep all of them, and a decode step
leaves out those that prompts have too: what they say is known since the prompt.
"""

from __future__ import annotations

import threading
import types
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch

from popc import compat
from popc.compat import Place
from popc.log import logger
from popc.quant import QuantizedTensor

# Guards on an object's identity, not on its content.
_BY_IDENTITY = ("ID_MATCH", "CLOSURE_MATCH", "FUNCTION_MATCH", "CLASS_MATCH", "MODULE_MATCH")
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_LONG_LIVED = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)
_MAX_CHANGES = 2

# What a guard is on, its kind, its condition, and the value that it was made for.
Fact = tuple[Place, str, Hashable]


class PromptGuards:
    """A ``guard_filter_fn`` of ``torch.compile``, for one frame.

    Whoever compiles says by :meth:`expect` what graph the next guards are of; whoever calls asks
    :meth:`take_change` and says :meth:`begin_call` before. Threads may do so at the same time.

    Attributes:
        off: why all guards are kept after all; None if they are not.
    """

    def __init__(self) -> None:
        self.off: str | None = None
        self._lock = threading.RLock()
        self._call = threading.local()  # of which `graphs` are what one call has compiled
        self._changed = False
        self._changes = 0
        self._known: Counter[Fact] | None = None  # what the guards of all prompts have
        self._written: set[Place] = set()
        self._decodes = self._relied_on = False

    def take_change(self) -> bool:
        """Whether a prompt found the model changed since this was last asked.

        The frame's code for decode steps is then out of date, and a new frame must take its place.
        Each change is reported once.
        """
        with self._lock:
            changed, self._changed = self._changed, False
            return changed

    def begin_call(self) -> None:
        """This thread begins a call."""
        self._call.graphs = 0

    def expect(self, decodes: bool, written: Sequence[Place] | None) -> None:
        """The next guards are of a graph that is a decode step's or not, and writes to what is at
        these places; None if that is not known.

        What one token leaves is what the next one goes by: guards on that are never left out.
        """
        with self._lock:
            self._expect(decodes, written)

    def _expect(self, decodes: bool, written: Sequence[Place] | None) -> None:
        self._decodes = decodes
        if written is None:
            return self._keep_all("this torch does not tell what a graph writes to")
        if any(place.root == "model" for place in written):
            return self._keep_all("it changes itself as it runs")
        new = {place for place in written if place.root == "global"} - self._written
        if new:
            self._written |= new
            if self._known is not None:
                kept = {f: n for f, n in self._known.items() if not _is_within(f[0], new)}
                self._known = Counter(kept)
            self._changed, self._relied_on = self._changed or self._relied_on, False

    def __call__(self, entries: Sequence[Any]) -> list[bool]:
        """For each guard whether it is kept: Dynamo's ``guard_filter_fn``."""
        with self._lock:
            return self._filter(entries)

    def _filter(self, entries: Sequence[Any]) -> list[bool]:
        if self.off is not None:
            return [True] * len(entries)
        facts = [self._fact_of(entry) for entry in entries]
        if not self._decodes:
            self._learn(Counter(fact for fact in facts if fact is not None))
            return [True] * len(entries)
        remaining = Counter(self._known)
        kept = []
        for fact in facts:
            kept.append(fact is None or remaining[fact] == 0)
            if fact is not None and remaining[fact]:
                remaining[fact] -= 1
        self._relied_on = True
        logger.info("a decode step keeps %d of %d guards", sum(kept), len(kept))
        return kept

    def _learn(self, now: Counter[Fact]) -> None:
        """A prompt's guards have ``now``."""
        self._call.graphs = getattr(self._call, "graphs", 0) + 1
        if self._call.graphs > 1:
            # Each graph guards a part of the model, under names of its own.
            self._keep_all("its graph breaks")
        elif self._known is None:
            self._known = now
        elif self._relied_on and self._known - now:
            self._changes += 1
            if self._changes > _MAX_CHANGES:
                self._keep_all("it changes again and again, or prompts are of many kinds")
            self._changed, self._known, self._relied_on = True, now, False
        else:
            self._known &= now

    def _fact_of(self, entry: Any) -> Fact | None:
        """What a guard says of the model or of a global; None for one on a call's arguments."""
        place = compat.guard_place(entry)
        if place.root == "call" or _is_within(place, self._written):
            return None
        condition = compat.guard_condition(entry)
        if condition is None:
            return None
        observed = _observed(entry.value, entry.guard_type) if entry.has_value else None
        return place, entry.guard_type, (condition, observed)

    def _keep_all(self, reason: str) -> None:
        if self.off is None:
            self._changed, self.off = self._changed or self._relied_on, reason
            logger.warning("all guards are evaluated at each token after all: %s", reason)


def _is_within(place: Place, others: Iterable[Place]) -> bool:
    """Whether what is at ``place`` is reached through one of ``others``."""
    return any(place.within(other) for other in others)


def _observed(value: Any, kind: str) -> Hashable:
    if kind == "TYPE_MATCH":
        return (type(value),)
    if isinstance(value, torch.Tensor):
        layout = value.dtype, value.device, value.shape, value.stride(), value.requires_grad
        return type(value), layout
    if isinstance(value, _PLAIN):
        return type(value), repr(value)
    if isinstance(value, _LONG_LIVED):
        return value  # kept alive, so that nothing else can be at its address
    if isinstance(value, tuple | list | set | frozenset | dict):
        # Of a dict the keys: what it holds has guards of its own.
        return type(value), len(value), repr(list(value)) if _is_plain(value) else None
    return type(value), id(value) if kind in _BY_IDENTITY else None


def _is_plain(values: Iterable[Any]) -> bool:
    return all(isinstance(value, _PLAIN) for value in values)


class KeptGuards:
    """A ``guard_filter_fn`` of ``torch.compile``: all guards but those on what a quantised weight
    holds, after what ``then`` leaves out.

    A :class:`popc.quant.QuantizedTensor` is stored alike for as long as it lives, and three guards
    on each of them take as long as all others together.
    """

    def __init__(self, then: PromptGuards | None) -> None:
        self._then = then

    def __call__(self, entries: Sequence[Any]) -> list[bool]:
        """Which of ``entries`` are kept."""
        then = self._then
        kept: Sequence[bool] = [True] * len(entries) if then is None else then(entries)
        places = [compat.guard_place(entry) for entry in entries]
        weights = {
            place.path
            for place, entry in zip(places, entries, strict=True)
            if isinstance(entry.value, QuantizedTensor)
        }
        if not weights:
            return list(kept)
        return [
            keep
            and not (entry.guard_type == _HELD and place.path in weights)
            and not _leads_through(place.path, weights)
            for keep, place, entry in zip(kept, places, entries, strict=True)
        ]


_HELD = "TENSOR_SUBCLASS_METADATA_MATCH"


def _leads_through(path: tuple[str, ...], weights: set[tuple[str, ...]]) -> bool:
    """Whether it leads through one of ``weights`` to something that this holds."""
    return any(path[:length] in weights for length in range(1, len(path)))

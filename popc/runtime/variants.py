"""Other compilations of a graph that prunes, made when a call first needs them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import fx

CompiledFunction = Callable[..., Sequence[Any]]

_only_keys: ContextVar[frozenset[Hashable] | None] = ContextVar("popc_only", default=None)


class Variants:
    """A graph as Dynamo gave it, compiled on its own, with guards of its own.

    Args:
        backend: popc's, which takes ``only`` and ``measure_only``.
    """

    def __init__(self, gm: fx.GraphModule, backend: Callable[..., CompiledFunction]) -> None:
        self._gm, self._backend = gm, backend
        self._compiled: dict[tuple[bool, ...], CompiledFunction] = {}

    def dense(self, args: Sequence[Any]) -> Sequence[Any]:
        """Run it dense, and have it measure as a prefill does: the first token of an empty cache
        is all the prompt there is."""
        return self._of(())(*args)

    def pruning(self, known: Mapping[Hashable, bool], args: Sequence[Any]) -> Sequence[Any]:
        """Run it with those of its regions pruned that are ``known``, by their keys."""
        keys = frozenset(key for key, is_known in known.items() if is_known)
        token = _only_keys.set(keys)
        try:
            return self._of(tuple(known.values()))(*args)
        finally:
            _only_keys.reset(token)

    def _of(self, known: tuple[bool, ...]) -> CompiledFunction:
        if known not in self._compiled:

            def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> CompiledFunction:
                # Of the call that has it compiled: it may be for another layer's parameters.
                only = _only_keys.get() if known else None
                return self._backend(gm, inputs, only=only, measure_only=not known)

            self._compiled[known] = torch.compile(self._gm, backend=backend)
        return self._compiled[known]

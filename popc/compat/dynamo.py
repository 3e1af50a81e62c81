"""Dynamo: compiling a frame on its own, the graph breaks counted, dims marked dynamic.

Seen working on torch 2.11 - 2.13.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import fx

from popc.errors import PopcError

RECOMPILE_LIMIT = 64


graph_break: Callable[..., None] = torch._dynamo.graph_break  # documented, but in a private module


def compile_alone(
    function: Callable[..., Any],
    backend: Callable[..., Any],
    guard_filter: Callable[[Sequence[Any]], Sequence[bool]] | None = None,
) -> Callable[..., Any]:
    """``torch.compile(function, backend)`` with a recompile limit of its own.

    Dynamo counts recompilations by code object, which all models of a class share: a few compiled
    models would use up the limit and fall back to eager. ``isolate_recompiles=True`` does the same
    from torch 2.13 on; a frame with a copied code object does it everywhere.

    Args:
        guard_filter: says which guards of a graph are kept: Dynamo's ``guard_filter_fn``.
    """
    popc_forward = function  # by this name guards.py knows the model

    def frame(*args: Any, **kwargs: Any) -> Any:
        return popc_forward(*args, **kwargs)

    isolated = types.FunctionType(
        frame.__code__.replace(), frame.__globals__, frame.__name__, None, frame.__closure__
    )
    # The limit is for each code object, and a decorator's wrapper is one for all it decorates: in
    # a model traced in pieces it would be reached by the number of layers. From torch 2.13 on.
    parameters = inspect.signature(torch.compile).parameters
    limit: Any = {"recompile_limit": RECOMPILE_LIMIT} if "recompile_limit" in parameters else {}
    options: Any = None if guard_filter is None else {"guard_filter_fn": guard_filter}
    return torch.compile(isolated, backend=backend, options=options, **limit)


def call_compiled(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``; an error of popc's own is raised as it is, not in Dynamo's wrapping."""
    try:
        return function(*args)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if isinstance(error.inner_exception, PopcError):
            raise error.inner_exception from None
        raise


_running: ContextVar[object] = ContextVar("popc_running", default=None)


class running:
    """A context in which the frames that Dynamo traces are ``owner``'s: see :func:`traces_for`."""

    __slots__ = ("_owner", "_token")

    def __init__(self, owner: object) -> None:
        self._owner = owner

    def __enter__(self) -> None:
        self._token = _running.set(self._owner)

    def __exit__(self, *_: object) -> None:
        _running.reset(self._token)


def traces_for(owner: object) -> Callable[[], bool]:
    """A function that Dynamo calls as it traces: whether the frame that it compiles is ``owner``'s.

    Its answer is a constant of the graph, without a guard: which frame is compiled never changes.
    """

    def is_owner() -> bool:
        return _running.get() is owner

    return torch.compiler.assume_constant_result(is_owner)


def mark_dynamic(tensor: torch.Tensor, sizes: Sequence[int]) -> bool:
    """Mark the one dim of ``tensor`` with one of ``sizes`` as dynamic, if Dynamo can.

    Where several dims have such a size nothing tells which one is meant, and none is marked; 0 and
    1 are constants to Dynamo. Returns whether one was. Documented, but in a private module.
    """
    dims = [dim for dim, size in enumerate(tensor.shape) if size in sizes and size > 1]
    if len(dims) == 1:
        torch._dynamo.maybe_mark_dynamic(tensor, dims[0])
    return len(dims) == 1


def is_for_dynamo(error: Exception) -> bool:
    """Whether ``error`` is no failure but asks Dynamo to trace anew, or not at all. Private because
    Inductor and Dynamo speak to each other so, through whatever backend is between them."""
    return isinstance(error, torch._dynamo.exc.RestartAnalysis | torch._dynamo.exc.SkipFrame)


def graph_breaks() -> dict[str, int]:
    """Dynamo's count of graph breaks so far, by reason. Private because nothing public tells."""
    return dict(torch._dynamo.utils.counters["graph_break"])


def breaks_since(before: Mapping[str, int]) -> list[str]:
    """The reasons, a line each, for which Dynamo broke graphs since it had counted ``before``."""
    after = graph_breaks()
    if after == before:
        return []
    new = [reason for reason, count in after.items() if count > before.get(reason, 0)]
    return [reason.strip().splitlines()[0] for reason in new]


def breaks_off(gm: fx.GraphModule) -> bool:
    """Whether Dynamo broke the model's graph at the end of ``gm``; private as nothing public tells.

    False where this torch does not tell.
    """
    reason = getattr(gm, "compile_subgraph_reason", None)
    return bool(getattr(reason, "graph_break", False))

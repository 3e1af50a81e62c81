"""Observing a rewritten graph as it is interpreted, as with ``codegen="eager"``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import fx

Watcher = Callable[[fx.Node, Sequence[Any], Any], None]
_watcher: ContextVar[Watcher | None] = ContextVar("popc_watcher", default=None)


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Have ``watcher(node, arguments, value)`` called for each node that runs meanwhile."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


class Interpreted:
    """A graph run as it is, or node by node under :func:`watching`."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm

    def __call__(self, *args: Any) -> Sequence[Any]:
        """The graph's outputs for its inputs ``args``."""
        watcher = _watcher.get()
        return self.gm(*args) if watcher is None else _Watched(self.gm, watcher).run(*args)


class _Watched(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, watcher: Watcher) -> None:
        super().__init__(gm)
        self.watcher = watcher

    def run_node(self, n: fx.Node) -> Any:
        args, _ = self.fetch_args_kwargs_from_env(n) if n.op == "call_function" else ((), {})
        value = super().run_node(n)
        self.watcher(n, args, value)
        return value

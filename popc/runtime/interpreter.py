"""Looking on while a rewritten graph is interpreted, as with ``codegen="eager"``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import fx

Watcher = Callable[[fx.Node, Sequence[Any], Any], None]
_watcher: ContextVar[Watcher | None] = ContextVar("popc_watcher", default=None)


@contextmanager
def watching(see: Watcher) -> Iterator[None]:
    """Have ``see(node, arguments, value)`` called for each node that runs meanwhile."""
    token = _watcher.set(see)
    try:
        yield
    finally:
        _watcher.reset(token)


class Interpreted:
    """A graph run as it is, or node by node where somebody watches."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm

    def __call__(self, *args: Any) -> Sequence[Any]:
        """The graph's outputs for its inputs ``args``."""
        see = _watcher.get()
        return self.gm(*args) if see is None else _Watched(self.gm, see).run(*args)


class _Watched(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, see: Watcher) -> None:
        super().__init__(gm)
        self.see = see

    def run_node(self, n: fx.Node) -> Any:
        args, _ = self.fetch_args_kwargs_from_env(n) if n.op == "call_function" else ((), {})
        value = super().run_node(n)
        self.see(n, args, value)
        return value

"""Sessions: what belongs to one KV cache, and which of them a call is in."""

from __future__ import annotations

from popc.sessions.current import (
    bind,
    budget,
    budget_of_call,
    is_prefill,
    named,
    of_cache,
    of_tensors,
    offer,
    offered,
    prefill,
    touch,
    use,
)
from popc.sessions.session import Session, TensorSnapshot

__all__ = [
    "Session",
    "TensorSnapshot",
    "bind",
    "budget",
    "budget_of_call",
    "is_prefill",
    "named",
    "of_cache",
    "of_tensors",
    "offer",
    "offered",
    "prefill",
    "touch",
    "use",
]

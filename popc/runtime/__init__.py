"""What runs around a compiled graph: its session, partition and statistics."""

from __future__ import annotations

from popc.runtime.compiled_graph import CompiledGraph

__all__ = ["CompiledGraph"]

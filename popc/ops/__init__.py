"""The ops that popc's passes put into a graph; importing this module registers them."""

from __future__ import annotations

from popc.ops.gather import gather_linear, gather_matmul
from popc.ops.select import select_candidates

__all__ = ["gather_linear", "gather_matmul", "select_candidates"]

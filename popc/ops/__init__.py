"""The ops that popc's passes put into a graph; importing this module registers them."""

from __future__ import annotations

from popc.ops.gather import gather_experts, gather_linear
from popc.ops.select import select_units

__all__ = ["gather_experts", "gather_linear", "select_units"]

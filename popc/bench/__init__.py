"""Benchmarks: what a decode step costs, dense and pruned, and what pruning could save at best.

``popc bench`` runs them; ``demo`` uses :func:`decode_rates` alone.
"""

from __future__ import annotations

from popc.bench.rates import Decoded, Spread, decode_rates
from popc.bench.results import Result, Run
from popc.bench.settings import Settings

__all__ = ["Decoded", "Result", "Run", "Settings", "Spread", "decode_rates"]

"""popc: decode faster by pruning what a prompt does not need. arXiv 2602.06822, as a compiler pass."""

from __future__ import annotations

from popc.api import analyze, compile
from popc.analysis.plan import Plan, Region, Skipped
from popc.config import Config
from popc.errors import ConfigError, GraphError, ModelError, PopcError

__all__ = [
    "Config",
    "ConfigError",
    "GraphError",
    "ModelError",
    "Plan",
    "PopcError",
    "Region",
    "Skipped",
    "analyze",
    "compile",
]
__version__ = "0.1.0"

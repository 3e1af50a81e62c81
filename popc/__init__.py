"""popc: decode faster by pruning, per prompt and per token, what a compiler can see is prunable.

The method is POP (arXiv 2602.06822), as a pass over torch.compile's graphs.
"""

from __future__ import annotations

from popc.analysis.plan import Plan, Skipped
from popc.analysis.plan import RegionRecord as Region
from popc.analysis.rules.registry import register_rule
from popc.api import analyze, compile
from popc.config import Config
from popc.errors import ConfigError, GraphError, ModelError, PopcError, PopcWarning
from popc.policies import Counts, InputPolicy, UnitPolicy
from popc.policies import register as register_policy
from popc.report.explain import Explanation, explain
from popc.sessions import prefill
from popc.version import __version__

__all__ = [
    "Config",
    "ConfigError",
    "Counts",
    "Explanation",
    "GraphError",
    "InputPolicy",
    "ModelError",
    "Plan",
    "PopcError",
    "PopcWarning",
    "Region",
    "Skipped",
    "UnitPolicy",
    "__version__",
    "analyze",
    "compile",
    "explain",
    "prefill",
    "register_policy",
    "register_rule",
]


def __getattr__(name: str) -> object:
    """Names of earlier versions, with a warning."""
    import importlib
    import warnings

    if name == "Policy":
        now, place, attribute = "popc.UnitPolicy, or popc.policies.Pop", "popc.policies", "Pop"
    elif name == "state":
        now, place, attribute = "popc.sessions", "popc", "sessions"
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"popc.{name} is {now} now", DeprecationWarning, stacklevel=2)
    return getattr(importlib.import_module(place), attribute)

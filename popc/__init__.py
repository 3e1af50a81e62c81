"""popc: decode faster by pruning, per prompt and per token, what a compiler can see is prunable.

The method is POP (arXiv 2602.06822), as a pass over torch.compile's graphs.
"""

from __future__ import annotations

from popc.analysis.plan import Plan, Region, Skipped
from popc.api import analyze, compile
from popc.config import Config
from popc.errors import ConfigError, GraphError, ModelError, PopcError, PopcWarning
from popc.policies import Counts, InputPolicy, UnitPolicy
from popc.policies import register as register_policy
from popc.report.explain import Explanation, explain
from popc.runtime.sessions import prefill
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
]


def __getattr__(name: str) -> object:
    if name == "Policy":
        import warnings

        from popc.policies import Pop

        message = "popc.Policy is popc.UnitPolicy now, or popc.policies.Pop with the paper's counts"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return Pop
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""popc: decode faster by pruning, per prompt and per token, what a compiler can see is prunable.

The method is POP (arXiv 2602.06822), as a pass over torch.compile's graphs.
"""

from __future__ import annotations

from popc.analysis.plan import Plan, Region, Skipped
from popc.api import analyze, compile
from popc.config import Config
from popc.errors import ConfigError, GraphError, ModelError, PopcError, PopcWarning
from popc.policies import Policy
from popc.policies import register as register_policy
from popc.report.explain import Explanation, explain
from popc.runtime.sessions import prefill
from popc.version import __version__

__all__ = [
    "Config",
    "ConfigError",
    "Explanation",
    "GraphError",
    "ModelError",
    "Plan",
    "Policy",
    "PopcError",
    "PopcWarning",
    "Region",
    "Skipped",
    "__version__",
    "analyze",
    "compile",
    "explain",
    "prefill",
    "register_policy",
]

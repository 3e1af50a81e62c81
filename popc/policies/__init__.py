"""Policies: how what is pruned is chosen. Each file is one; ``registry.py`` lists them."""

from __future__ import annotations

from popc.policies.base import Counts, Dense, InputPolicy, Policy, UnitPolicy
from popc.policies.graded import Graded
from popc.policies.griffin import Griffin
from popc.policies.pop import Pop
from popc.policies.registry import current_name, get, names, register
from popc.policies.staged import Staged
from popc.policies.static import Flap, Wanda
from popc.policies.threshold import Threshold

__all__ = [
    "Counts",
    "Dense",
    "Flap",
    "Graded",
    "Griffin",
    "InputPolicy",
    "Policy",
    "Pop",
    "Staged",
    "Threshold",
    "UnitPolicy",
    "Wanda",
    "current_name",
    "get",
    "names",
    "register",
]

"""How many examples a property is tried on: few and always the same, or, thoroughly, many."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

THOROUGH = bool(os.environ.get("POPC_THOROUGH"))


def examples(few: int, many: int) -> settings:
    """``few`` as CI has it; ``many`` under ``make test-thorough``."""
    return settings(
        max_examples=many if THOROUGH else few,
        derandomize=not THOROUGH,
        database=None,
        deadline=None,
        print_blob=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )

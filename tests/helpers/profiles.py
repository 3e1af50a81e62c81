"""How many examples a property is tried on: few and always the same, or, thoroughly, many."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

from hypothesis import HealthCheck, Phase, settings

T = TypeVar("T")

THOROUGH = bool(os.environ.get("POPC_THOROUGH"))


def examples(few: int, many: int) -> settings:
    """``few`` as CI has it; ``many`` under ``make test-thorough``.

    Only the thorough run looks for a smaller example where one fails: each try compiles a model, so
    that takes minutes, and the other run is to say in seconds that something is wrong.
    """
    quick = (Phase.explicit, Phase.reuse, Phase.generate)
    return settings(
        phases=tuple(Phase) if THOROUGH else quick,
        max_examples=many if THOROUGH else few,
        derandomize=not THOROUGH,
        database=None,
        deadline=None,
        print_blob=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


def few(values: Sequence[T], count: int) -> list[T]:
    """For ``parametrize``: the first ``count``; all under ``make test-thorough``."""
    return list(values) if THOROUGH else list(values)[:count]

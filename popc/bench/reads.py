"""Channels that the threshold policy reads: each token its own, so they are counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from popc.analysis.plan import Plan
from popc.config import Config
from popc.errors import ModelError
from popc.sessions import Session


def counting(config: Config) -> Config:
    """``config`` for a model that counts; it runs a few times only, so without Inductor."""
    return dataclasses.replace(config, count=True, codegen="eager")


def channels_read(
    plan: Plan, config: Config, session: Session | None, decode: Callable[..., Any], *args: Any
) -> Mapping[Hashable, Sequence[float]]:
    """The channels that each group of inputs reads, step by step, by its key.

    Several sequences read what any of them needs. Empty where no inputs are pruned.

    Args:
        decode: called with ``args``: steps of a model of :func:`counting` in ``session``.

    Raises:
        ModelError: the steps were dense.
    """
    prunes = any(config.prunes_inputs(group.kind) for group in plan.inputs)
    if session is None or not prunes or not config.sparsity:
        return {}
    session.inputs.reads.clear()  # the session serves other sparsities too
    decode(*args)
    if not session.inputs.reads:
        raise ModelError(f"steps at r={config.sparsity:g} were dense: no channels were counted")
    return {key: list(counts) for key, counts in session.inputs.reads.items()}

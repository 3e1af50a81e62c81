"""Channels that contraction reads: each token its own, so they are counted, not computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from popc.analysis.plan import Plan
from popc.config import Config
from popc.errors import ModelError
from popc.sessions import Session


def counting(config: Config) -> Config:
    """``config`` for a twin that counts; as it is run a few times, Inductor is not asked."""
    return dataclasses.replace(config, count=True, codegen="eager")


def channels_read(
    plan: Plan, config: Config, session: Session | None, decode: Callable[..., Any], *args: Any
) -> Mapping[Hashable, Sequence[int]]:
    """The channels that each group of inputs reads, step by step, by its key.

    Several sequences read what any of them needs. Empty where nothing is contracted.

    Args:
        decode: called with ``args``: steps of a twin of :func:`counting` in ``session``.

    Raises:
        ModelError: the twin's steps were dense.
    """
    contracts = any(config.prunes_inputs(group.kind) for group in plan.inputs)
    if session is None or not contracts or not config.sparsity:
        return {}
    session.inputs.reads.clear()  # the session serves other sparsities too
    decode(*args)
    if not session.inputs.reads:
        raise ModelError(f"steps at r={config.sparsity:g} were dense: no channels were counted")
    return {key: list(counts) for key, counts in session.inputs.reads.items()}

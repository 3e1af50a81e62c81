"""Which units a prompt keeps, and how long they stay the right ones while text is generated."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

import popc
from popc import sessions
from popc.analysis.plan import Plan
from popc.compat import cache_keyword
from popc.config import Config
from popc.errors import ConfigError
from popc.sessions import Session
from popc.sessions.units import RegionState, split

PRUNED, CANDIDATE, RETAINED = 0, 1, 2


@dataclass(frozen=True)
class RegionDrift:
    """One region over a prompt and the text that was generated after it.

    Attributes:
        kind, name: as in :class:`popc.Region`.
        partition: int8 ``[U]``, or ``[E, U]``: what became of each unit after the prompt.
        overlap: for each chunk of generated text, the share of the units that it would keep alive
            that the prompt kept alive too.
        chance: the overlap of a random choice, the share of live units.
    """

    kind: str
    name: str
    partition: np.ndarray
    overlap: tuple[float, ...]
    chance: float


@dataclass(frozen=True)
class Reads:
    """Linears of one input: the share of channels that each decode step read, ``[steps]``."""

    name: str
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Drift:
    """What :func:`measure` found. ``chunk`` is in tokens."""

    regions: tuple[RegionDrift, ...]
    reads: tuple[Reads, ...]
    prompt: int
    generated: int
    chunk: int


@torch.no_grad()
def measure(model: Any, ids: Tensor, config: Config, tokens: int = 128, chunk: int = 32) -> Drift:
    """Generate after a prompt, and compare partitions.

    Args:
        model: a causal language model; it stays as it is.
        ids: the prompt, int64 ``[1, T]``.
        config: gives sparsity, candidate width and codegen. Partitions are those of ``"pop"``, if
            its policy has none; what is read token by token is that of ``"threshold"``, or of
            ``"graded"`` where weights are quantised.
        tokens: to generate. chunk: of how many each later partition is made.

    Raises:
        ConfigError: there are fewer tokens than one chunk, or a chunk is of less than two.
    """
    if not 2 <= chunk <= tokens:
        raise ConfigError("chunk", chunk, f"2 to {tokens}, the tokens to generate")
    units = config.policy
    if isinstance(units, str):
        units = config.unit_policy("mlp").name
    kinds = ("mlp", "attention", "experts")
    by_units = Config.of(config, {"policy": units, "targets": kinds, "scope": "batch"})
    compiled = popc.compile(copy.deepcopy(model), by_units)
    text = _generated(compiled, ids, tokens)
    first = _session(compiled, ids)
    later = [
        _session(compiled, part) for part in text.split(chunk, dim=1) if part.shape[1] == chunk
    ]
    inputs = "threshold" if config.weights is None else "graded"
    by_inputs = Config.of(config, {"policy": inputs, "scope": "batch", "count": True})
    reader = popc.compile(copy.deepcopy(model), by_inputs)
    session = _session(reader, ids, text)
    return Drift(
        tuple(_regions(compiled.popc_plan, first, later)),
        tuple(_reads(reader.popc_plan, session)),
        ids.shape[1],
        text.shape[1],
        chunk,
    )


def _generated(compiled: Any, ids: Tensor, tokens: int) -> Tensor:
    """``[1, tokens]``, greedy."""
    out = compiled.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return out[:, ids.shape[1] :]


def _session(compiled: Any, prompt: Tensor, text: Tensor | None = None) -> Session:
    """After ``prompt`` in a cache of its own, and after each token of ``text``."""
    cache = DynamicCache()
    options = {cache_keyword(compiled.forward): cache, "use_cache": True}
    compiled(prompt, **options)
    for token in () if text is None else text.split(1, dim=1):
        compiled(token, **options)
    session = sessions.of_cache(cache)
    assert session is not None
    return session


def _regions(plan: Plan, first: Session, later: Sequence[Session]) -> list[RegionDrift]:
    drifts = []
    for region in plan.regions:
        state = first.units.regions.get(region.key)
        if state is None:
            continue
        index = _live(first, state)
        counts, units = state.counts, len(state.columns)
        partition = np.full((len(index), units), PRUNED, dtype=np.int8)
        np.put_along_axis(partition, index[:, counts.retained :], CANDIDATE, 1)
        np.put_along_axis(partition, index[:, : counts.retained], RETAINED, 1)
        alive = partition != PRUNED
        overlap = [
            float(np.take_along_axis(alive, _live(session, state), 1).mean()) for session in later
        ]
        shaped = partition if state.experts else partition[0]
        share = counts.live / units
        drifts.append(RegionDrift(region.kind, region.name, shaped, tuple(overlap), share))
    return drifts


def _live(session: Session, region: RegionState) -> np.ndarray:
    """The units that the session's tokens keep alive, R then C, ``[1, n]`` or ``[E, n]``."""
    sums = session.units.statistics(region.key, "batch", region.policy.name)
    assert sums is not None
    index, _ = split(sums, region)
    return index.cpu().numpy()


def _reads(plan: Plan, session: Session) -> list[Reads]:
    return [
        Reads(group.name, tuple(count / group.width for count in session.inputs.reads[group.key]))
        for group in plan.inputs
        if group.key in session.inputs.reads
    ]

"""Decode of a whole model: dense, dense under ``torch.compile``, and popc, in turn."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import popc
from popc import sessions
from popc.analysis.plan import Plan
from popc.bench.rates import WARMING, Context, Progress, interleaved
from popc.bench.reads import channels_read, counting
from popc.bench.results import Run, Spread, runs_of, step_bytes
from popc.bench.settings import Settings
from popc.config import Config
from popc.errors import ModelError

EAGER, COMPILED = "dense, eager", "dense, compiled"


@dataclass(frozen=True)
class Way:
    """A way to run a model: its forward, and popc's options where it prunes."""

    forward: Callable[..., Any]
    config: Config | None = None
    plan: Plan | None = None


def name_of(config: Config) -> str:
    """What the results call a config."""
    return f"{config.policy_name} r={config.sparsity:g}"


def dense_ways(model: Any, settings: Settings) -> dict[str, Way]:
    """The two baselines."""
    return {EAGER: Way(model.forward), COMPILED: Way(settings.compiled(model.forward))}


def pruned_way(model: Any, config: Config) -> Way:
    """The model compiled by popc with ``config``, as one of the ways to decode."""
    compiled = popc.compile(model, config)
    return Way(compiled.forward, config, compiled.popc_plan)


def random_prompt(model: Any, batch: int, length: int, device: str) -> Tensor:
    """Random tokens, int64 ``[batch, length]``; the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return torch.randint(vocabulary, (batch, length), generator=generator).to(device)


def steps(settings: Settings) -> int:
    """How often :func:`decode` calls ``progress``."""
    ways = 2 + len(settings.policies) * len(settings.sparsity)
    each = len(settings.policies) + ways * (1 + settings.rounds)
    return len(settings.batch) * len(settings.context) * each


@torch.no_grad()
def decode(
    dense: Any, model: Any, settings: Settings, bandwidth: Spread, progress: Progress
) -> list[Run]:
    """Every way to run the model, at every batch size and context.

    Args:
        dense: for the baselines; ``model``, another instance of the same model, for popc, which
            changes strides of weights.
        bandwidth: of a copy, in bytes per second.
        progress: called with what comes next, :func:`steps` times.
    """
    # Each policy stores weights in its own layout.
    copies = [model, *(copy.deepcopy(model) for _ in settings.policies[1:])]
    models = dict(zip(settings.policies, copies, strict=True))
    runs = []
    for batch in settings.batch:
        for context in settings.context:
            # Else the second size would make the first one's static shapes dynamic.
            torch.compiler.reset()
            gc.collect()
            runs += _decode_at(dense, models, settings, bandwidth, progress, batch, context)
    return runs


def _decode_at(
    dense: Any,
    models: Mapping[str, Any],
    settings: Settings,
    bandwidth: Spread,
    progress: Progress,
    batch: int,
    context: int,
) -> list[Run]:
    where = f"batch {batch}, context {context}: "
    # What prunes nothing leaves weights as they are, so it shares the dense model's.
    configs = {name_of(config): config for config in settings.configs()}
    owners = {n: models[c.policy_name] if c.sparsity else dense for n, c in configs.items()}
    pruned = {name: pruned_way(owners[name], config) for name, config in configs.items()}
    ways = {**dense_ways(dense, settings), **pruned}
    contexts = _contexts(dense, pruned, settings, batch, context, lambda s: progress(where + s))
    first = next(iter(contexts.values()))

    def seconds(way: Way, tokens: int) -> float:
        filled = contexts[way.config.policy_name] if way.config else first
        return filled.decode(way.forward, tokens)[0] / tokens

    reads = {}
    for name, way in ways.items():
        progress(f"{where}compiling {name}")
        seconds(way, min(WARMING, settings.tokens))
        if way.config is not None and way.plan is not None:
            filled = contexts[way.config.policy_name]
            session = sessions.of_cache(filled.cache)
            check_pruned(way.plan, way.config, session)
            compiled = pruned_way(owners[name], counting(way.config))
            steps = filled.decode, compiled.forward, settings.tokens
            reads[name] = channels_read(way.plan, way.config, session, *steps)
    turns = {name: lambda way=way: seconds(way, settings.tokens) for name, way in ways.items()}
    rounds = interleaved(turns, settings.rounds, lambda name: progress(where + name))
    plan = next(way.plan for way in pruned.values() if way.plan is not None)
    read = {
        name: step_bytes(dense, way.plan or plan, way.config, batch, first.bytes, reads.get(name))
        for name, way in ways.items()
    }
    options = {name: way.config for name, way in ways.items()}
    return runs_of(options, rounds, read, bandwidth, batch, context)


def _contexts(
    model: Any,
    pruned: dict[str, Way],
    settings: Settings,
    batch: int,
    context: int,
    progress: Progress,
) -> dict[str, Context]:
    """One filled cache for each policy.

    Statistics belong to the cache, and are the same at every sparsity: prefill runs dense. So the
    model that prunes most fills it for all. The dense model decodes from it too: a step's time does
    not depend on the values in it.
    """
    length = min(context, settings.prefill or context)
    prompt = random_prompt(model, batch, length, settings.device)
    room = max(settings.tokens, WARMING)
    contexts = {}
    for policy in settings.policies:
        progress("compiling the prefill")
        ours = [way for way in pruned.values() if way.config and way.config.policy_name == policy]
        most = max(ours, key=lambda way: way.config.sparsity if way.config else 0)
        contexts[policy] = Context(
            model.config, prompt, room, most.forward, context, allocate=model.forward
        )
    return contexts


def check_pruned(plan: Plan, config: Config, session: sessions.Session | None) -> None:
    """That decode steps had a partition: without one popc is right, but dense.

    Raises:
        ModelError: a targeted region has no statistics in the session.
    """
    for region in plan.regions:
        wanted = config.prunes_units(region) and not region.one_pass
        if not wanted or config.counts(region.units, region.kind).active == region.units:
            continue
        policy = config.unit_policy(region.kind).name
        if session is None or session.units.statistics(region.key, config.scope, policy) is None:
            raise ModelError(f"{region.name} was not pruned: its prefill is not known at decode")
    for group in plan.inputs:
        if session is None or session.inputs.histogram(group.key, config.scope) is None:
            raise ModelError(f"{group.name} was not pruned: its prefill is not known at decode")

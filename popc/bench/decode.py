"""Decode of a whole model: dense, dense under ``torch.compile``, and popc, in turn."""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import popc
from popc import sessions
from popc.analysis.plan import Plan
from popc.bench.rates import WARMING, Context, Progress, interleaved
from popc.bench.reads import channels_read, counting
from popc.bench.results import Bytes, Run, Spread, quantized_step_bytes, runs_of, step_bytes
from popc.bench.settings import Settings
from popc.compiled_model import dense as without_popc
from popc.config import Config
from popc.errors import ModelError
from popc.planning.budget_solver import resolve

EAGER, COMPILED = "dense, eager", "dense, compiled"


@dataclass(frozen=True)
class Way:
    """A way to run a model: its forward, and popc's options where it prunes.

    ``owner`` is a model with the very weights that are read, once it has run.
    """

    forward: Callable[..., Any]
    config: Config | None = None
    plan: Plan | None = None
    owner: Any = None

    @property
    def kind(self) -> str:
        """What ways that share a cache have in common."""
        return kind_of(self.config) if self.config is not None else ""


def name_of(config: Config) -> str:
    """What the results call a config."""
    budget = f"r={config.sparsity:g}" if config.bits is None else f"{config.bits:g} bits"
    return f"{kind_of(config)} {budget}"


def kind_of(config: Config) -> str:
    """The policy, and the weights where they are quantised."""
    return " ".join(filter(None, (config.policy_name, config.weights)))


def dense_ways(model: Any, settings: Settings) -> dict[str, Way]:
    """The two baselines."""
    return {EAGER: Way(model.forward), COMPILED: Way(settings.compiled(model.forward))}


def pruned_way(model: Any, config: Config) -> Way:
    """The model compiled by popc with ``config``, as one of the ways to decode."""
    compiled = popc.compile(model, config)
    return Way(compiled.forward, config, compiled.popc_plan, model)


def quantized_ways(model: Any, configs: Sequence[Config]) -> dict[str, Way]:
    """One compiled model with quantised weights of its own, at the bits of each of ``configs``."""
    if not configs:
        return {}
    least = min(configs, key=lambda config: config.bits or 0.0)
    compiled: Any = popc.compile(model, least)
    return {
        name_of(config): Way(at_bits(compiled, config.bits), config, compiled.popc_plan, compiled)
        for config in configs
    }


def at_bits(compiled: Any, bits: float | None) -> Callable[..., Any]:
    """The forward of a compiled model at a budget of its own; None: the model's."""
    forward: Callable[..., Any] = compiled.forward
    if bits is None:
        return forward

    @functools.wraps(forward)
    def within(*args: Any, **kwargs: Any) -> Any:
        with compiled.budget(bits=bits):
            return forward(*args, **kwargs)

    return within


def random_prompt(model: Any, batch: int, length: int, device: str) -> Tensor:
    """Random tokens, int64 ``[batch, length]``; the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return torch.randint(vocabulary, (batch, length), generator=generator).to(device)


def steps(settings: Settings) -> int:
    """How often :func:`decode` calls ``progress``."""
    ways = 2 + len(settings.policies) * len(settings.sparsity) + len(settings.bits)
    each = len(settings.policies) + bool(settings.bits) + ways * (1 + settings.rounds)
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
    pruned |= quantized_ways(dense, list(settings.quantized_configs()))
    ways = {**dense_ways(dense, settings), **pruned}
    contexts = _contexts(dense, pruned, settings, batch, context, lambda s: progress(where + s))
    first = next(iter(contexts.values()))

    def seconds(way: Way, tokens: int) -> float:
        filled = contexts[way.kind] if way.config else first
        return filled.decode(way.forward, tokens)[0] / tokens

    reads = {}
    for name, way in ways.items():
        progress(f"{where}compiling {name}")
        seconds(way, min(WARMING, settings.tokens))
        if way.config is not None:
            reads[name] = _counted(way, way.config, contexts[way.kind], settings.tokens)
    turns = {name: lambda way=way: seconds(way, settings.tokens) for name, way in ways.items()}
    rounds = interleaved(turns, settings.rounds, lambda name: progress(where + name))
    plan = next(way.plan for way in pruned.values() if way.plan is not None)
    read = {
        name: step_bytes(dense, way.plan or plan, way.config, batch, first.bytes, reads.get(name))
        for name, way in ways.items()
        if way.config is None or way.config.weights is None
    }
    options = {name: way.config for name, way in ways.items()}
    for name, (amount, config) in _quantized_bytes(dense, read[EAGER], pruned, reads).items():
        read[name], options[name] = amount, config
    return runs_of(options, rounds, read, bandwidth, batch, context)


def _counted(
    way: Way, config: Config, filled: Context, tokens: int
) -> Mapping[Hashable, Sequence[float]]:
    """The channels that steps read, by the key of their group: see :func:`channels_read`."""
    assert way.plan is not None
    session = sessions.of_cache(filled.cache)
    check_pruned(way.plan, config, session)
    compiled = popc.compile(without_popc(way.owner), counting(config))
    return channels_read(way.plan, config, session, filled.decode, compiled.forward, tokens)


def _quantized_bytes(
    dense: Any, read: Bytes, ways: Mapping[str, Way], reads: Mapping[str, Any]
) -> dict[str, tuple[Bytes, Config]]:
    """What a step reads in the ways with quantised weights, and their options with a sparsity.

    ``read`` is what a dense step reads.
    """
    found, plans = {}, None
    for name, way in ways.items():
        if way.config is None or way.config.weights is None:
            continue
        if plans is None:
            plans = popc.analyze(dense), popc.analyze(way.owner)
        config = resolve(way.config, 0, plans[1])
        found[name] = quantized_step_bytes(read, *plans, config, reads[name]), config
    return found


def _contexts(
    model: Any,
    pruned: dict[str, Way],
    settings: Settings,
    batch: int,
    context: int,
    progress: Progress,
) -> dict[str, Context]:
    """One filled cache for each policy, and one for quantised weights.

    Statistics belong to the cache, and are the same at every sparsity: prefill runs dense. So the
    model that prunes most fills it for all. The dense model decodes from it too: a step's time does
    not depend on the values in it.
    """
    length = min(context, settings.prefill or context)
    prompt = random_prompt(model, batch, length, settings.device)
    room = max(settings.tokens, WARMING)
    contexts = {}
    for kind in dict.fromkeys(way.kind for way in pruned.values()):
        progress("compiling the prefill")
        ours = [way for way in pruned.values() if way.kind == kind]
        most = max(ours, key=lambda way: way.config.sparsity if way.config else 0)
        contexts[kind] = Context(
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

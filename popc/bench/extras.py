"""The overhead of pruning outside the decode step: compilation, memory, prefill, host time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from transformers import DynamicCache

from popc import backend, compat, compiled_model
from popc.backend import popc_backend
from popc.bench.cold import WAYS, cold_start
from popc.bench.decode import COMPILED, Way, dense_ways, pruned_way, random_prompt
from popc.bench.rates import WARMING, Context, Progress, Spread, Stopwatch, interleaved, wait
from popc.bench.results import Extras, Start
from popc.bench.settings import Settings
from popc.compat import cache_keyword
from popc.config import Config
from popc.runtime import compiled_graph

PREFILL = 512  # tokens
PROMPTS = 40
SHORTEST, STRIDE = 8, 3  # lengths of those prompts


def extra_steps(settings: Settings) -> int:
    """How often :func:`cold_starts` and :func:`extras` call ``progress``."""
    return len(WAYS) + 2 * (1 + settings.rounds) + 1 + len(WAYS)


def cold_starts(settings: Settings, progress: Progress) -> dict[str, Start]:
    """Both, one after the other; best before this process has a model in memory."""
    starts = {}
    for way in WAYS:
        progress(f"a cold start of {way}")
        starts[way] = cold_start(way, settings)
    return starts


@torch.no_grad()
def extras(
    dense: Any, model: Any, settings: Settings, cold: Mapping[str, Start], progress: Progress
) -> Extras:
    """See :class:`Extras`; ``dense`` and ``model`` as in :func:`popc.bench.decode.decode`."""
    config = settings.most_pruned
    torch.compiler.reset()
    ways = {"dense": dense_ways(dense, settings)[COMPILED], "popc": pruned_way(model, config)}
    contexts = _compiled_prefills(ways, dense, settings, progress)
    prefill = _prefill_seconds(ways, contexts, settings, progress)
    progress("time in popc's Python")
    host = host_seconds(ways["popc"], contexts["popc"], settings)
    compiled = {}
    for way in WAYS:
        progress(f"compiling {way} for {PROMPTS} lengths of prompts")
        compiled[way] = compilations(way, dense if way == "dense" else model, config, settings)
    first, second = cold["dense"], cold["popc"]
    running = None
    if first.running_peak_bytes and second.running_peak_bytes:
        running = second.running_peak_bytes / first.running_peak_bytes
    return Extras(
        cold=dict(cold),
        compile_ratio=second.compile_s / first.compile_s,
        memory_ratio=second.peak_bytes / first.peak_bytes,
        running_memory_ratio=running,
        prefill_tokens=PREFILL,
        dense_prefill=prefill["dense"],
        popc_prefill=prefill["popc"],
        prefill_overhead=prefill["popc"].median / prefill["dense"].median - 1,
        host=host,
        prompts=PROMPTS,
        dense_compilations=compiled["dense"],
        popc_compilations=compiled["popc"],
    )


def _compiled_prefills(
    ways: Mapping[str, Way], dense: Any, settings: Settings, progress: Progress
) -> dict[str, Context]:
    """A static cache for each way, that its compiled prefill of :data:`PREFILL` tokens filled."""
    prompt = random_prompt(dense, 1, PREFILL, settings.device)
    room = max(settings.tokens, WARMING)
    contexts = {}
    for name, way in ways.items():
        progress(f"compiling the prefill of {name}")
        contexts[name] = Context(dense.config, prompt, room, way.forward, allocate=dense.forward)
    return contexts


def _prefill_seconds(
    ways: Mapping[str, Way],
    contexts: Mapping[str, Context],
    settings: Settings,
    progress: Progress,
) -> dict[str, Spread]:
    """Seconds of that prefill, into an emptied cache."""

    def seconds(name: str) -> float:
        context = contexts[name]
        context.cache.reset()
        wait(context.device)
        start = time.perf_counter()
        context.prefill(ways[name].forward)
        wait(context.device)
        return time.perf_counter() - start

    for name in ways:
        seconds(name)
    turns = {name: lambda name=name: seconds(name) for name in ways}
    rounds = interleaved(turns, settings.rounds, lambda name: progress(f"prefill, {name}"))
    return {name: Spread.of(values) for name, values in rounds.items()}


def host_seconds(way: Way, context: Context, settings: Settings) -> Spread:
    """Seconds per decoded token that popc's own Python takes, in each round.

    They are of two parts. The wrapper of :func:`popc.compile` finds the session, around the call
    that Dynamo compiled; the graph's own runner finds the partition, around what Inductor compiled.
    Dynamo's guards, between the two, are no part of it: a dense model has them too.
    """
    context.decode(way.forward, WARMING)
    rounds = []
    for _ in range(settings.rounds):
        with _watched() as watch:
            context.decode(watch.timed(way.forward), settings.tokens)
        rounds.append(watch.seconds / settings.tokens)
    return Spread.of(rounds)


@contextlib.contextmanager
def _watched() -> Iterator[Stopwatch]:
    """Times popc's runner of graphs, without what it and the session wrap."""
    watch = Stopwatch()
    in_session, call_graph = compiled_model.in_session, compiled_graph.CompiledGraph.__call__

    def session(call: Callable[..., Any], *rest: Any) -> Any:
        return in_session(watch.untimed(call), *rest)

    def graph(self: Any, *args: Any) -> Sequence[Any]:
        run = self.run
        self.run = watch.untimed(run)
        try:
            return watch.timed(call_graph)(self, *args)
        finally:
            self.run = run

    with mock.patch.object(compiled_model, "in_session", session):
        with mock.patch.object(compiled_graph.CompiledGraph, "__call__", graph):
            yield watch


def compilations(way: str, model: Any, config: Config, settings: Settings) -> int:
    """Graphs compiled over :data:`PROMPTS` prompts of different lengths, three tokens after each.

    The cache is a dynamic one, as ``generate`` has it by default.
    """
    torch.compiler.reset()
    with _counting(settings) as count:
        if way == "popc":
            forward = pruned_way(model, config).forward
        else:
            forward = compat.compile_alone(model.forward, count.dense)
        for number in range(PROMPTS):
            length = SHORTEST + STRIDE * number
            ids: Tensor = random_prompt(model, 1, length, settings.device)
            cache = {cache_keyword(model.forward): DynamicCache(config=model.config)}
            for _ in range(4):
                logits = forward(ids, **cache, use_cache=True).logits
                ids = logits[:, -1:].argmax(-1)
    return count.graphs


@dataclass
class _Counter:
    """Backends of Dynamo that count the graphs that they get."""

    settings: Settings
    graphs: int = 0

    def dense(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        eager = self.settings.codegen == "eager"
        compiled = gm if eager else compat.inductor(gm, inputs, {})
        self.graphs += 1
        return compiled

    def popc(self, *args: Any, **options: Any) -> Callable[..., Any]:
        compiled = popc_backend(*args, **options)
        self.graphs += 1  # not where popc has Dynamo trace again
        return compiled


@contextlib.contextmanager
def _counting(settings: Settings) -> Iterator[_Counter]:
    """popc's backend counts, called by Dynamo, and by popc for a graph's dense variant."""
    counter = _Counter(settings)
    with mock.patch.object(compiled_model, "popc_backend", counter.popc):
        with mock.patch.object(backend, "popc_backend", counter.popc):
            yield counter

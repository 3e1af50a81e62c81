"""Generations interleaved on one compiled model, each compared with its oracle."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, rule
from torch import Tensor, nn
from transformers import DynamicCache

import popc
from popc import sessions
from popc.analysis.plan import Plan
from popc.compat import cache_keyword
from popc.config import Config
from popc.testing.equivalence import ROUNDING, TOLERANCE, relative
from popc.testing.masked_inputs import MaskedInputs
from popc.testing.oracle import MaskedAnywhere

_SEEDS = st.integers(0, 2**16)
LONGEST = 40  # tokens; a generation that is longer is left alone
MOST = 6  # sequences, likewise


@dataclass
class Generation:
    """One cache of the compiled model, and what the oracle knows of the same generation."""

    cache: Any
    dense_cache: Any
    units: MaskedAnywhere
    batch: int

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return int(self.dense_cache.get_seq_length())


class _Sessions(RuleBasedStateMachine):
    """The machine of :func:`session_machine`, whose subclass sets what is under test.

    Attributes:
        model, compiled: dense, and compiled with ``config``.
        plan: of ``model``.
        keyword: the argument of ``forward`` that takes a cache.
        tolerance: relative to an output's largest value.
    """

    model: nn.Module
    compiled: Any
    config: Config
    plan: Plan
    keyword: str
    vocabulary: int
    tolerance: float
    generations = Bundle("generations")

    @rule(target=generations, batch=st.integers(1, 3), length=st.integers(2, 6), seed=_SEEDS)
    def start(self, batch: int, length: int, seed: int) -> Generation:
        """A prompt in a new cache."""
        units = MaskedAnywhere(self.model, self.plan, self.config)
        begun = Generation(DynamicCache(), DynamicCache(), units, batch)
        self.call(begun, length, seed)
        return begun

    @rule(generation=generations, seed=_SEEDS)
    def decode(self, generation: Generation, seed: int) -> None:
        """One token more."""
        self.call(generation, 1, seed)

    @rule(generation=generations, length=st.integers(2, 4), seed=_SEEDS)
    def turn(self, generation: Generation, length: int, seed: int) -> None:
        """Several tokens more, as of a next turn."""
        self.call(generation, length, seed)

    @rule(target=generations, generation=generations)
    def fork(self, generation: Generation) -> Generation:
        """A copy of the cache, which goes its own way."""
        return Generation(
            copy.deepcopy(generation.cache),
            copy.deepcopy(generation.dense_cache),
            generation.units.forked(),
            generation.batch,
        )

    @rule(target=generations, generation=consumes(generations), times=st.integers(1, 3))
    def repeat(self, generation: Generation, times: int) -> Generation:
        """A prefix that several tails share."""
        if self.movable(generation) and generation.batch * times <= MOST:
            for cache in (generation.cache, generation.dense_cache):
                cache.batch_repeat_interleave(times)
            generation.units.repeat(times)
            generation.batch *= times
        return generation

    @rule(generation=generations, seed=_SEEDS)
    def reorder(self, generation: Generation, seed: int) -> None:
        """The rows of the cache in another order, as beams do."""
        if not self.movable(generation):
            return
        order = torch.randperm(generation.batch, generator=torch.Generator().manual_seed(seed))
        for cache in (generation.cache, generation.dense_cache):
            cache.reorder_cache(order)

    @rule(generation=generations, left=st.integers(1, LONGEST))
    def crop(self, generation: Generation, left: int) -> None:
        """The cache cut to its first ``left`` tokens."""
        if left < generation.length and self.movable(generation):
            for cache in (generation.cache, generation.dense_cache):
                cache.crop(left - generation.length)

    @rule(generation=consumes(generations))
    def drop(self, generation: Generation) -> None:
        """The cache is freed."""
        del generation

    def movable(self, generation: Generation) -> bool:
        """Whether rows may move: it is known which sequence each belongs to."""
        return self.config.scope == "batch" or generation.batch == 1

    def call(self, generation: Generation, length: int, seed: int) -> None:
        """The next tokens, random, by both models; their outputs compared."""
        if generation.length + length > LONGEST:
            return
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, self.vocabulary, (generation.batch, length), generator=generator)
        got = self.run(self.compiled, generation.cache, ids)
        session = sessions.of_cache(generation.cache) or sessions.Session()
        limits, config = session.inputs.thresholds, self.config
        # A prompt came before, so what is decoded is pruned.
        assert length > 1 or limits or not (config.prunes_inputs("mlp") and config.sparsity > 0)
        inputs = MaskedInputs(self.model, self.plan, limits, session.inputs.centers, config)
        inputs.decoding = length == 1
        generation.units.begin(length > 1, batch=generation.batch)
        with generation.units, inputs:
            expected = self.run(self.model, generation.dense_cache, ids)
        near = generation.units.margin < ROUNDING
        assert near or relative(got, expected) <= self.tolerance

    @torch.no_grad()
    def run(self, call: Any, cache: Any, ids: Tensor) -> Tensor:
        """Logits ``[B, T, V]`` of one call."""
        return call(input_ids=ids, use_cache=True, **{self.keyword: cache}).logits


def session_machine(
    model: nn.Module, vocabulary: int, config: Config, tolerance: float | None = None
) -> type[RuleBasedStateMachine]:
    """A hypothesis state machine: ``TestMine = session_machine(...).TestCase``.

    It prefills, decodes, continues, copies, repeats, reorders, crops and drops caches in any order,
    and compares every output with the masked dense model's.

    Args:
        model: causal, with ``forward(input_ids, <cache>, use_cache)``, in float64 for clear-cut
            choices. It is compiled once, and shares its weights with the compiled model.
        config: ``policy`` ``"pop"`` or ``"threshold"``. Under ``scope="sequence"`` only caches of
            one sequence are repeated, reordered and cropped: rows of others can't be traced to
            sequences.
        tolerance: relative to an output's largest value.
    """
    dtype = next(model.parameters()).dtype
    example = {"input_ids": torch.ones(1, 4, dtype=torch.int64)}
    under_test = {
        "model": model,
        "compiled": popc.compile(model, config),
        "config": config,
        "plan": popc.analyze(model, (), example),
        "keyword": cache_keyword(model.forward),
        "vocabulary": vocabulary,
        "tolerance": tolerance or TOLERANCE.get(dtype, TOLERANCE[torch.float32]),
    }
    return type("Sessions", (_Sessions,), under_test)

"""Generations interleaved on one compiled model, each compared with its oracle."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
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
from popc.testing.dequantized import Dequantized, Readings
from popc.testing.equivalence import (
    TOLERANCE,
    is_quantized,
    relative,
    rounding,
    tolerance_of,
)
from popc.testing.masked_inputs import MaskedInputs
from popc.testing.oracle import MaskedAnywhere

_SEEDS = st.integers(0, 2**16)
_BUDGETS = st.sampled_from([None, 0.0, 0.3, 0.8])
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
        own: what the compiled model reads, as a dense one; ``compiled`` with ``config``.
        plan: of ``own``; ``readings`` of its groups of inputs that are read by grade.
        keyword: the argument of ``forward`` that takes a cache.
        tolerance: relative to an output's largest value; choices nearer than ``rounding`` are open.
    """

    own: Dequantized
    compiled: Any
    config: Config
    plan: Plan
    readings: dict[Hashable, Sequence[Readings]]
    keyword: str
    vocabulary: int
    tolerance: float
    rounding: float
    generations = Bundle("generations")

    @rule(target=generations, batch=st.integers(1, 3), length=st.integers(2, 6), seed=_SEEDS)
    def start(self, batch: int, length: int, seed: int) -> Generation:
        """A prompt in a new cache."""
        units = MaskedAnywhere(self.own.model, self.plan, self.config)
        begun = Generation(DynamicCache(), DynamicCache(), units, batch)
        self.call(begun, length, seed)
        return begun

    @rule(generation=generations, seed=_SEEDS, sparsity=_BUDGETS)
    def decode(self, generation: Generation, seed: int, sparsity: float | None = None) -> None:
        """One token more; by thresholds, at a sparsity of its own."""
        self.call(generation, 1, seed, sparsity)

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

    def call(
        self, generation: Generation, length: int, seed: int, sparsity: float | None = None
    ) -> None:
        """The next tokens, random, by both models; their outputs compared."""
        if generation.length + length > LONGEST:
            return
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, self.vocabulary, (generation.batch, length), generator=generator)
        config = self.config
        by_thresholds = config.prunes_inputs("mlp")
        own_budget = sparsity is not None and by_thresholds
        with self.compiled.budget(sparsity=sparsity) if own_budget else nullcontext():
            got = self.run(self.compiled, generation.cache, ids)
        session = sessions.of_cache(generation.cache) or sessions.Session()
        limits = self.own.by_key(session.inputs.thresholds)
        # A prompt came before, so what is decoded is pruned.
        assert length > 1 or limits or not (by_thresholds and config.sparsity > 0)
        centers = self.own.by_key(session.inputs.centers)
        model = self.own.model
        inputs = MaskedInputs(model, self.plan, limits, centers, config, readings=self.readings)
        inputs.decoding = length == 1
        generation.units.begin(length > 1, batch=generation.batch)
        with generation.units, inputs:
            expected = self.run(model, generation.dense_cache, ids)
        near = min(generation.units.margin, inputs.margin) < self.rounding
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
            choices. It is compiled once, and shares its weights with the compiled model, where
            ``config.weights`` is None.
        config: ``policy`` ``"pop"``, ``"threshold"`` or ``"graded"``. Under ``scope="sequence"``
            only caches of one sequence are repeated, reordered and cropped: rows of others can't be
            traced to sequences.
        tolerance: relative to an output's largest value.
    """
    dtype, quantized = next(model.parameters()).dtype, is_quantized(model, config)
    held_to = dtype if dtype in TOLERANCE else torch.float32
    example = {"input_ids": torch.ones(1, 4, dtype=torch.int64)}
    compiled = popc.compile(model, config)
    if config.weights is not None:
        with torch.no_grad():
            compiled(**example)  # its weights are quantised now
    own = Dequantized(model, compiled)
    plan = popc.analyze(own.model, (), example)
    by_grade = {group.key: own.read_by_grade(group) for group in plan.inputs}
    under_test = {
        "own": own,
        "compiled": compiled,
        "config": config,
        "plan": plan,
        "readings": {key: readings for key, readings in by_grade.items() if readings},
        "keyword": cache_keyword(model.forward),
        "vocabulary": vocabulary,
        "tolerance": tolerance or tolerance_of(held_to, quantized),
        "rounding": rounding(held_to, quantized),
    }
    return type("Sessions", (_Sessions,), under_test)

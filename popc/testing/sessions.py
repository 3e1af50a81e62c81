"""Generations interleaved on one compiled model, each compared with an oracle of its own."""

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
from popc.testing.oracle import MaskedAnywhere, MaskedInputs

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
        """A prompt in a cache of its own."""
        units = MaskedAnywhere(self.model, self.plan, self.config)
        begun = Generation(DynamicCache(), DynamicCache(), units, batch)
        self.call(begun, length, seed)
        return begun

    @rule(held=generations, seed=_SEEDS)
    def decode(self, held: Generation, seed: int) -> None:
        """One token more."""
        self.call(held, 1, seed)

    @rule(held=generations, length=st.integers(2, 4), seed=_SEEDS)
    def turn(self, held: Generation, length: int, seed: int) -> None:
        """Several tokens more, as of a next turn."""
        self.call(held, length, seed)

    @rule(target=generations, held=generations)
    def fork(self, held: Generation) -> Generation:
        """A copy of the cache, which goes its own way."""
        return Generation(
            copy.deepcopy(held.cache),
            copy.deepcopy(held.dense_cache),
            held.units.forked(),
            held.batch,
        )

    @rule(target=generations, held=consumes(generations), times=st.integers(1, 3))
    def repeat(self, held: Generation, times: int) -> Generation:
        """A prefix that several tails share."""
        if self.movable(held) and held.batch * times <= MOST:
            for cache in (held.cache, held.dense_cache):
                cache.batch_repeat_interleave(times)
            held.units.repeat(times)
            held.batch *= times
        return held

    @rule(held=generations, seed=_SEEDS)
    def reorder(self, held: Generation, seed: int) -> None:
        """The rows of the cache in another order, as beams do."""
        if not self.movable(held):
            return
        order = torch.randperm(held.batch, generator=torch.Generator().manual_seed(seed))
        for cache in (held.cache, held.dense_cache):
            cache.reorder_cache(order)

    @rule(held=generations, left=st.integers(1, LONGEST))
    def crop(self, held: Generation, left: int) -> None:
        """The cache cut to its first ``left`` tokens."""
        if left < held.length and self.movable(held):
            for cache in (held.cache, held.dense_cache):
                cache.crop(left - held.length)

    @rule(held=consumes(generations))
    def drop(self, held: Generation) -> None:
        """The cache let go of."""
        del held

    def movable(self, held: Generation) -> bool:
        """Whether rows may move: whose row is whose can be told."""
        return self.config.scope == "batch" or held.batch == 1

    def call(self, held: Generation, length: int, seed: int) -> None:
        """The next tokens, random, by both models; their outputs compared."""
        if held.length + length > LONGEST:
            return
        made = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, self.vocabulary, (held.batch, length), generator=made)
        got = self.run(self.compiled, held.cache, ids)
        session = sessions.of_cache(held.cache) or sessions.Session()
        limits, config = session.inputs.thresholds, self.config
        # A prompt came before, so what is decoded is pruned.
        assert length > 1 or limits or not (config.prunes_inputs("mlp") and config.sparsity > 0)
        inputs = MaskedInputs(self.model, self.plan, limits, session.inputs.centers, config)
        inputs.decoding = length == 1
        held.units.begin(length > 1, batch=held.batch)
        with held.units, inputs:
            expected = self.run(self.model, held.dense_cache, ids)
        near = held.units.margin < ROUNDING
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
            one sequence are repeated, reordered and cropped: whose row is whose can't be told of
            others.
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

"""Rates are of what they say: a shared prefill, steps that prune, time in popc."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from transformers import LlamaForCausalLM

import popc
from popc import sessions
from popc.bench import Settings, decode, extras
from popc.bench.rates import WARMING, Context, Spread, Stopwatch, decode_rates, interleaved
from popc.errors import ModelError
from popc.sessions.units import UnitStatistics
from tests.helpers.models import tiny_llama

KV, HEAD, ROOM = 2, 16, 12  # of tiny_llama, and tokens that a cache has room for


@dataclass
class OneLayer:
    """A model of one layer, and popc's way to run it."""

    model: LlamaForCausalLM
    way: decode.Way

    def context(self, fill: Callable[..., object]) -> Context:
        prompt = decode.random_prompt(self.model, 1, 16, "cpu")
        return Context(self.model.config, prompt, ROOM, fill, allocate=self.model.forward)


@pytest.fixture(scope="module")
def one_layer() -> OneLayer:
    torch.compiler.reset()
    model = tiny_llama(num_hidden_layers=1)
    return OneLayer(
        model, decode.pruned_way(model, popc.Config(policy="pop", sparsity=0.4, codegen="eager"))
    )


@torch.no_grad()
def test_compiled_models_share_a_prefill(one_layer: OneLayer) -> None:
    """After another compiled model's prefill, decoding gives what it gives after its own."""
    most = popc.compile(one_layer.model, policy="pop", sparsity=0.7, codegen="eager").forward
    dense, less = one_layer.model.forward, one_layer.way.forward

    def decoded(fill: object, forward: object) -> list[int]:
        context = one_layer.context(fill)
        first = context.decode(forward, ROOM)[1]
        assert torch.equal(context.decode(forward, ROOM)[1], first)  # from the same place again
        return first[0].tolist()

    from_its_own = decoded(less, less)
    assert decoded(most, less) == from_its_own
    assert decoded(dense, dense) != from_its_own
    assert decoded(most, most) != from_its_own


@torch.no_grad()
def test_a_step_without_partition_is_no_result(one_layer: OneLayer) -> None:
    context = one_layer.context(one_layer.model.forward)  # popc never saw it
    context.decode(one_layer.way.forward, 2)
    with pytest.raises(ModelError, match="was not pruned"):
        decode.check_pruned(
            one_layer.way.plan, one_layer.way.config, sessions.of_cache(context.cache)
        )


@torch.no_grad()
def test_host_time_is_popcs_own(one_layer: OneLayer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow work of popc counts, in the runner of a graph and around the call."""
    settings = Settings(tokens=3, rounds=3)
    steps = WARMING + settings.rounds * settings.tokens
    slept = 0

    def slow(call: object) -> object:
        def slower(*args: object, **kwargs: object) -> object:
            nonlocal slept
            slept += 1
            time.sleep(0.03)
            return call(*args, **kwargs)

        return slower

    context = one_layer.context(one_layer.way.forward)
    usual = extras.host_seconds(one_layer.way, context, settings).low
    assert 0 < usual < min(0.01, context.decode(one_layer.way.forward, 1)[0])
    for owner, name in ((UnitStatistics, "partition"), (sessions, "of_cache")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, slow(getattr(owner, name)))
            slept = 0
            taken = extras.host_seconds(one_layer.way, context, settings).low
            assert slept >= steps
            assert 0 <= taken - 0.03 * slept / steps < 0.03


def test_a_long_context_is_filled() -> None:
    model = tiny_llama()
    prompt = decode.random_prompt(model, 2, 16, "cpu")
    with torch.no_grad():
        context = Context(model.config, prompt, 4, model.forward, length=40)
    assert int(context.cache.get_seq_length()) == 40
    for layer in context.cache.layers:
        for tensor in (layer.keys, layer.values):
            assert tensor.shape == (2, KV, 44, HEAD)
            assert (tensor[:, :, 16:40] != 0).all()
            assert (tensor[:, :, 40:] == 0).all()
    assert context.bytes == 4 * 2 * 2 * 2 * KV * HEAD * 44


def test_decode_rates_gives_the_greedy_tokens() -> None:
    model = tiny_llama()
    prompt = decode.random_prompt(model, 2, 8, "cpu")
    measured = decode_rates({"dense": model}, model.config, prompt, tokens=6, rounds=2)["dense"]
    expected = model.generate(prompt, max_new_tokens=6, do_sample=False)[:, 8:]
    assert torch.equal(measured.tokens, expected)
    assert len(measured.rate.rounds) == 2
    assert measured.rate.low > 0


def test_rounds_go_both_ways() -> None:
    order: list[str] = []
    turns = {name: lambda name=name: float(len(order)) for name in "abc"}
    results = interleaved(turns, 2, order.append)
    assert order == list("abccba")
    assert results == {"a": [1, 6], "b": [2, 5], "c": [3, 4]}
    assert Spread.of([3, 1, 2]) == Spread(2, 1, 3, (3, 1, 2))
    assert Spread.of([4, 1]).rate(10) == Spread(4, 2.5, 10, (2.5, 10))


def test_stopwatch_leaves_inner_calls_out() -> None:
    watch = Stopwatch()
    inner = watch.untimed(lambda: time.sleep(0.05))
    watch.timed(lambda: (time.sleep(0.02), inner()))()
    assert 0.02 <= watch.seconds < 0.05

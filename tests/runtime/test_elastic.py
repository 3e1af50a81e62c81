"""Budgets of single calls: other thresholds, and nothing compiled or measured anew."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import popc
from popc import sessions
from popc.testing.dequantized import Dequantized
from tests.helpers.generation import prompt, step
from tests.helpers.models import tiny_llama
from tests.helpers.oracle import relative

pytestmark = pytest.mark.usefixtures("fresh_compiler")

OPTIONS = {"sparsity": 0.2, "codegen": "eager", "count": True}
TOKEN = torch.tensor([[7]])


def elastic(**options: object) -> tuple[torch.nn.Module, DynamicCache]:
    """A compiled model, and a cache with a prompt."""
    compiled, cache = popc.compile(tiny_llama(), **{**OPTIONS, **options}), DynamicCache()
    step(compiled, cache, prompt(0))
    return compiled, cache


def next_step(compiled: torch.nn.Module, cache: DynamicCache) -> Tensor:
    """The logits of one more token, which the cache then forgets."""
    logits = step(compiled, cache, TOKEN)
    cache.crop(-1)
    return logits


def share_read(compiled: torch.nn.Module, cache: DynamicCache) -> float:
    """The share of channels, by their weights, that the last step read."""
    reads = sessions.of_cache(cache).inputs.reads
    groups = compiled.popc_plan.inputs
    read = sum(reads[g.key][-1] / g.width * g.weight_bytes for g in groups)
    return read / sum(g.weight_bytes for g in groups)


def test_a_call_has_its_own_budget() -> None:
    compiled, cache = elastic()
    own = next_step(compiled, cache)
    shares = {}
    budgets = ({"sparsity": 0.5}, {"bits": 16}, {"bytes": 0.5}, {"bits": 3.2}, {"mass": 0.999})
    for budget in (*budgets, {"sparsity": 0}):
        with compiled.budget(**budget):
            logits = next_step(compiled, cache)
        shares[next(iter(budget.items()))] = share_read(compiled, cache)
        assert relative(logits, own) > 1e-3
    halves = [shares[half] for half in (("sparsity", 0.5), ("bits", 16), ("bytes", 0.5))]
    assert halves == [halves[0]] * 3 and 0.3 < halves[0] < 0.7
    assert shares["bits", 3.2] < 0.2 < shares["sparsity", 0.5] < shares["mass", 0.999]
    assert shares["sparsity", 0] == 1
    assert torch.equal(next_step(compiled, cache), own)


def test_everything_read_is_dense() -> None:
    compiled, cache = elastic()
    dense, plain = tiny_llama(), DynamicCache()
    step(dense, plain, prompt(0))
    with compiled.budget(sparsity=0.0):
        assert relative(next_step(compiled, cache), next_step(dense, plain)) < 1e-5


def test_the_budget_is_that_of_a_model_compiled_for_it() -> None:
    compiled, cache = elastic()
    with compiled.budget(sparsity=0.6):
        got = next_step(compiled, cache)
    assert relative(got, next_step(*elastic(sparsity=0.6))) < 1e-5


def test_contexts_are_nested_and_left_on_errors() -> None:
    compiled, cache = elastic()
    own = next_step(compiled, cache)
    with compiled.budget(sparsity=0.6):
        outer = next_step(compiled, cache)
        with pytest.raises(ZeroDivisionError), compiled.budget(sparsity=0.4):
            assert relative(next_step(compiled, cache), outer) > 1e-3
            raise ZeroDivisionError
        assert torch.equal(next_step(compiled, cache), outer)
    assert torch.equal(next_step(compiled, cache), own)
    with pytest.raises(ValueError, match="no_such_option"):
        compiled.generate(prompt(0), max_new_tokens=2, sparsity=0.6, no_such_option=3)
    assert torch.equal(next_step(compiled, cache), own)


def test_threads_have_budgets_of_their_own() -> None:
    compiled, cache = elastic()
    own = next_step(compiled, cache)
    got: dict[float, list[Tensor]] = {}

    def run(sparsity: float) -> None:
        other = DynamicCache()
        step(compiled, other, prompt(0))
        with compiled.budget(sparsity=sparsity):
            got[sparsity] = [next_step(compiled, other) for _ in range(5)]

    threads = [threading.Thread(target=run, args=(r,)) for r in (0.3, 0.6)]
    for thread in threads:
        thread.start()
    with compiled.budget(sparsity=0.45):
        for thread in threads:
            thread.join()
    for sparsity, steps in got.items():
        with compiled.budget(sparsity=sparsity):
            expected = next_step(compiled, cache)
        assert all(torch.equal(one, expected) for one in steps)
    assert relative(got[0.3][0], got[0.6][0]) > 1e-3
    assert torch.equal(next_step(compiled, cache), own)


def test_generate_takes_a_budget() -> None:
    compiled, options = popc.compile(tiny_llama(), **OPTIONS), {"max_new_tokens": 8}
    ids = prompt(0)
    usual = compiled.generate(ids, **options)
    pruned = compiled.generate(ids, **options, bits=6.0)
    with compiled.budget(bits=6.0):
        assert torch.equal(compiled.generate(ids, **options), pruned)
    assert not torch.equal(pruned, usual)
    assert torch.equal(compiled.generate(ids, **options), usual)
    dense = tiny_llama().generate(ids, **options)
    assert torch.equal(compiled.generate(ids, **options, sparsity=0), dense)


def test_nothing_is_compiled_or_measured_anew() -> None:
    compiled, cache = elastic(scope="sequence")
    for _ in range(2):
        next_step(compiled, cache)
    session = sessions.of_cache(cache)
    before, histograms = dict(session.inputs._fed), dict(session.inputs._histograms)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with compiled.budget(sparsity=0.7):
        next_step(compiled, cache)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0
    fed_now = session.inputs._fed
    assert fed_now.keys() == before.keys()
    changed = [(fed_now[key], own) for key, own in before.items() if fed_now[key] is not own]
    for fed, own in changed:
        assert fed.base is own.base and fed.center is own.center
        assert bool((fed.thresholds > own.thresholds).any())
    assert changed
    assert all(session.inputs._histograms[key] is value for key, value in histograms.items())


@pytest.mark.parametrize(
    ("options", "budget", "reason"),
    [
        ({}, {"bits": 0}, "0 < bits"),
        ({}, {"sparsity": 1}, "0 <= sparsity < 1"),
        ({}, {}, "one of bits, sparsity, bytes, mass"),
        ({}, {"bits": 4, "sparsity": 0.5}, "one of bits, sparsity, bytes, mass"),
        ({"policy": "pop"}, {"sparsity": 0.5}, "policy='pop'.*one of inputs"),
        ({"policy": {"attention": "threshold", "mlp": "pop"}}, {"bits": 4}, "policy='pop'"),
        ({"policy": "dense"}, {"bits": 4}, "one of inputs"),
        ({"sparsity": 0}, {"sparsity": 0.5}, "sparsity=0 .*nothing out is compiled as it is"),
        ({"bytes": 1}, {"sparsity": 0.5}, "nothing out is compiled as it is"),
    ],
)
def test_what_can_not_be_is_an_error(options, budget, reason: str) -> None:
    compiled = popc.compile(tiny_llama(), **{"codegen": "eager", **options})
    with pytest.raises(popc.ConfigError, match=reason):
        compiled.budget(**budget)


def test_too_little_to_read_is_an_error_of_the_call() -> None:
    compiled, cache = elastic(targets=("mlp",))
    with compiled.budget(bytes=0.1), pytest.raises(popc.ConfigError, match=r"bytes=0\.1.*targets"):
        step(compiled, cache, TOKEN)


def test_graphs_that_leave_nothing_out_have_no_budget() -> None:
    compiled, _ = elastic(bits=32)
    with pytest.raises(popc.ConfigError, match="nothing does"):
        compiled.budget(bits=10)


def bits_read(compiled: torch.nn.Module, cache: DynamicCache) -> float:
    """Of each weight, by the last step."""
    reads = sessions.of_cache(cache).inputs.reads
    plan = popc.analyze(compiled)
    return plan.read_bits(
        compiled.popc_config, {key: steps[-1:] for key, steps in reads.items()}, compiled.popc_plan
    )


def test_one_set_of_quantised_weights_serves_all_budgets() -> None:
    """From everything down to a few bits, though it was compiled to leave nothing out."""
    compiled, cache = elastic(weights="int8", sparsity=0)
    dense, plain = Dequantized(tiny_llama(), compiled).model, DynamicCache()
    step(dense, plain, prompt(0))
    expected = next_step(dense, plain)
    assert relative(next_step(compiled, cache), expected) < 1e-3
    assert bits_read(compiled, cache) == pytest.approx(8.5)
    errors = []
    for bits in (7.0, 5.0, 3.0):
        with compiled.budget(bits=bits):
            errors.append(relative(next_step(compiled, cache), expected))
        assert bits_read(compiled, cache) == pytest.approx(bits, abs=0.3)
    assert 1e-3 < errors[0] < errors[1] < errors[2]
    with compiled.budget(bits=8.5):
        assert relative(next_step(compiled, cache), expected) < 1e-3

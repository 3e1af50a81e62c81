"""Many generations, threads, turns and modes on one compiled model: each as if it were alone."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from popc import sessions
from popc.sessions import current
from tests.helpers.generation import POLICIES, compiled_of, generated, prompt, step
from tests.helpers.models import tiny_llama
from tests.helpers.oracle import relative

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.mark.parametrize("policy", POLICIES)
def test_threads_get_what_each_gets_alone(policy: str) -> None:
    compiled = compiled_of(tiny_llama(), policy)
    alone = [generated(compiled, prompt(seed, 6 + seed)) for seed in range(4)]
    got: dict[int, Tensor] = {}

    def run(seed: int) -> None:
        for _ in range(3):
            got[seed] = generated(compiled, prompt(seed, 6 + seed))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, expected in enumerate(alone):
        assert torch.equal(got[seed], expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_dropped_caches_leave_nothing(policy: str) -> None:
    """200 generations in any order, most of them dropped half way."""
    compiled = compiled_of(tiny_llama(), policy)
    expected = generated(compiled, prompt(0))
    seen: list[weakref.ref[sessions.Session]] = []
    caches: dict[int, DynamicCache] = {}
    make = torch.Generator().manual_seed(0)
    for number in range(200):
        cache = DynamicCache()
        step(compiled, cache, prompt(number))
        session = sessions.of_cache(cache)
        assert session is not None
        seen.append(weakref.ref(session))
        caches[number] = cache
        del session, cache
        other = list(caches)[int(torch.randint(len(caches), (), generator=make))]
        step(compiled, caches[other], prompt(other, 1))
        if len(caches) > 10:
            del caches[other]
    assert torch.equal(generated(compiled, prompt(0)), expected)
    caches.clear()
    gc.collect()
    assert [ref for ref in seen if ref() is not None] == []


def test_tensors_that_are_gone_leave_nothing() -> None:
    """Under the backend string, sessions are held by the cache's tensors alone."""
    model = tiny_llama()
    model.compile(backend="popc", options={"sparsity": 0.5, "codegen": "eager"})
    generated(model, prompt(0))
    gc.collect()
    before = len(current._by_tensor)
    for seed in range(20):
        generated(model, prompt(seed))
    gc.collect()
    assert len(current._by_tensor) <= before


@pytest.mark.parametrize("policy", POLICIES)
def test_a_prefix_is_shared_by_copies_of_its_cache(policy: str) -> None:
    compiled, prefix = compiled_of(tiny_llama(), policy), DynamicCache()
    step(compiled, prefix, prompt(0))
    for seed in (1, 2):
        whole = DynamicCache()
        step(compiled, whole, prompt(0))
        expected = generated(compiled, prompt(seed, 4), cache=whole)
        got = generated(compiled, prompt(seed, 4), cache=copy.deepcopy(prefix))
        assert torch.equal(got, expected)
    dense = DynamicCache()
    step(tiny_llama(), dense, prompt(0))
    assert relative(got, generated(tiny_llama(), prompt(2, 4), cache=dense)) > 1e-2


@pytest.mark.parametrize("policy", POLICIES)
def test_a_cropped_cache_goes_on_as_before(policy: str) -> None:
    """As assisted generation does: tokens that were refused are taken back."""
    compiled, cache = compiled_of(tiny_llama(), policy), DynamicCache()
    first = step(compiled, cache, prompt(0))
    token = first.argmax(-1, keepdim=True)
    expected = step(compiled, cache, token)
    step(compiled, cache, prompt(3, 1))
    cache.crop(-2)
    assert torch.equal(step(compiled, cache, token), expected)


def test_beams_are_reordered_with_their_cache() -> None:
    """Beam search gives sequences that greedy steps over them would score the same."""
    compiled = compiled_of(tiny_llama())
    ids = prompt(0)
    result = compiled.generate(
        ids,
        max_new_tokens=5,
        num_beams=3,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    cache, total = DynamicCache(), 0.0
    logits = step(compiled, cache, ids.expand(3, -1))
    for at in range(ids.shape[1], result.sequences.shape[1]):
        token = result.sequences[:, at]
        total += float(logits[0].log_softmax(-1)[token])
        logits = step(compiled, cache, token[None].expand(3, 1))
    assert total / 5 == pytest.approx(float(result.sequences_scores[0]), rel=1e-3)


def test_turns_go_on() -> None:
    compiled, cache = compiled_of(tiny_llama(), "pop"), DynamicCache()
    generated(compiled, prompt(0), cache=cache)
    session = sessions.of_cache(cache)
    assert session is not None
    (key, *_) = session.units.regions
    before = session.units.statistics(key, "batch")
    generated(compiled, prompt(1, 5), cache=cache)
    after = session.units.statistics(key, "batch")
    assert sessions.of_cache(cache) is session
    assert bool((after >= before).all()) and bool((after > before).any())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_give_the_same(mode) -> None:
    compiled = compiled_of(tiny_llama())
    expected = generated(compiled, prompt(0))
    with mode():
        assert torch.equal(generated(compiled, prompt(0)), expected)


def test_autocast_is_autocast() -> None:
    """In bfloat16 as the dense model is, near the pruned one."""
    compiled = compiled_of(tiny_llama())
    expected = generated(compiled, prompt(0), 0)
    with torch.autocast("cpu", torch.bfloat16):
        got, dense = generated(compiled, prompt(0), 2), generated(tiny_llama(), prompt(0), 2)
    assert got.dtype == dense.dtype
    assert relative(got[:, :1], expected) < 0.05
    assert got.isfinite().all()


def test_training_is_dense_with_a_warning() -> None:
    """Gradients are the dense model's, never those of a pruned one."""
    model, dense = tiny_llama(), tiny_llama()
    compiled = compiled_of(model)
    compiled.train()
    dense.train()
    ids = prompt(0)
    with pytest.warns(UserWarning, match="runs dense"):
        compiled(ids, labels=ids).loss.backward()
    dense(ids, labels=ids).loss.backward()
    for ours, theirs in zip(model.parameters(), dense.parameters(), strict=True):
        assert relative(ours.grad, theirs.grad) < 1e-4

"""A compiled model is used like the original: generate, caches, batches, sessions."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import popc
from popc import sessions
from tests.helpers.generation import prompt
from tests.helpers.models import CACHE, tiny_llama
from tests.helpers.oracle import relative
from tests.helpers.profiles import few

pytestmark = pytest.mark.usefixtures("fresh_compiler")

OPTIONS = {"policy": "pop", "sparsity": 0.5, "candidate": 0.2, "codegen": "eager"}


def index_of(cache: object) -> Tensor:
    """The packed channel lists of a cache's partition, after a decoded token."""
    (partition,) = sessions.of_cache(cache).units._partitions.values()
    return partition.index


class Stepper:
    """One greedy generation, token by token, so that two can be interleaved."""

    def __init__(self, model, ids: Tensor) -> None:
        self.model, self.cache, self.tokens = model, DynamicCache(), []
        self.feed(ids)

    def feed(self, ids: Tensor) -> None:
        out = self.model(ids, **{CACHE: self.cache}, use_cache=True)
        self.logits = out.logits[:, -1]

    def step(self) -> None:
        token = self.logits.argmax(-1, keepdim=True)
        self.tokens.append(int(token[0, 0]))
        self.feed(token)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"cache_implementation": "static"},
        {"num_beams": 3},
        {"num_beams": 3, "cache_implementation": "static"},
        {"do_sample": True, "top_k": 20},
        {"num_return_sequences": 2, "do_sample": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("batch", few([3, 1], 1))
def test_generate_runs_pruned_and_at_sparsity_zero_as_dense(how: dict, batch: int) -> None:
    model, ids = tiny_llama(), prompt(batch=batch)
    how = {"max_new_tokens": 8, "attention_mask": torch.ones_like(ids), **how}

    def tokens(m) -> Tensor:
        torch.manual_seed(0)
        return m.generate(ids, **{"do_sample": False, **how})

    dense = tokens(model)
    exact = tokens(popc.compile(model, sparsity=0, codegen="eager"))
    pruned = tokens(popc.compile(model, **OPTIONS))
    assert torch.equal(exact, dense)
    assert pruned.shape == dense.shape
    assert not torch.equal(pruned, dense)  # half the channels are gone: it must show


def test_static_and_dynamic_cache_agree() -> None:
    compiled, ids = popc.compile(tiny_llama(), **OPTIONS), prompt()
    dynamic = compiled.generate(ids, max_new_tokens=12, do_sample=False)
    static = compiled.generate(
        ids, max_new_tokens=12, do_sample=False, cache_implementation="static"
    )
    assert torch.equal(dynamic, static)


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_a_prompt_and_one_decode_step_are_all_that_is_compiled(codegen: str) -> None:
    """Dense, the second step compiles again, as only that shows that the past grows."""
    compiled = popc.compile(tiny_llama(), policy="pop", sparsity=0.4, codegen=codegen)
    with torch.no_grad():
        run = Stepper(compiled, prompt())
        for _ in range(12):
            run.step()
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    compiled.generate(prompt(batch=2), max_new_tokens=8, do_sample=False)  # brings masks of its own
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
    assert compiled.popc_plan.breaks == []


def test_interleaved_generations_keep_their_partitions() -> None:
    compiled = popc.compile(tiny_llama(), **OPTIONS)
    prompts = [prompt(seed=1), prompt(2, 11)]
    with torch.no_grad():
        alone = []
        for ids in prompts:
            run = Stepper(compiled, ids)
            for _ in range(10):
                run.step()
            alone.append(run.tokens)
        runs = [Stepper(compiled, ids) for ids in prompts]
        for _ in range(10):
            for run in runs:
                run.step()
    assert [run.tokens for run in runs] == alone
    assert not torch.equal(index_of(runs[0].cache), index_of(runs[1].cache))


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("cuts", few([(3, 8), (4,), (2, 4, 6, 8)], 1))
def test_chunked_prefill_gives_the_whole_prefills_partition(scope: str, cuts: tuple) -> None:
    compiled, ids = popc.compile(tiny_llama(), scope=scope, **OPTIONS), prompt(length=12, batch=2)
    with torch.no_grad():
        whole = Stepper(compiled, ids)
        whole.step()
        chunked = Stepper(compiled, ids[:, : cuts[0]])
        for start, stop in zip(cuts, (*cuts[1:], 12), strict=True):
            chunked.feed(ids[:, start:stop])
        chunked.step()
    assert torch.equal(index_of(whole.cache), index_of(chunked.cache))


def test_a_later_turn_adds_to_the_statistics() -> None:
    """Prompt, two tokens, then a second prompt: the partition is that of both prompts."""
    compiled, ids = popc.compile(tiny_llama(), **OPTIONS), prompt(length=12)
    with torch.no_grad():
        run = Stepper(compiled, ids[:, :8])
        run.step()
        session = sessions.of_cache(run.cache)
        key = next(r.key for r in compiled.popc_plan.regions if r.kind == "mlp")
        first, before = index_of(run.cache), session.units.statistics(key, "batch").clone()
        run.feed(ids[:, 8:])
        run.step()
    after = session.units.statistics(key, "batch")
    assert sessions.of_cache(run.cache) is session
    assert (after >= before).all()
    assert (after > before).any()
    assert not torch.equal(first, index_of(run.cache))


def test_padding_counts_in_no_statistic() -> None:
    """Each padded row's partition is that of the same prompt alone."""
    compiled = popc.compile(tiny_llama(), scope="sequence", **OPTIONS)
    rows = [prompt(1, 6), prompt(2, 9)]
    ids = torch.full((2, 9), 95)
    mask = torch.zeros(2, 9, dtype=torch.long)
    for b, row in enumerate(rows):
        ids[b, 9 - row.shape[1] :] = row
        mask[b, 9 - row.shape[1] :] = 1
    with torch.no_grad():
        cache = DynamicCache()
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        compiled(ids, attention_mask=mask, position_ids=position, **{CACHE: cache})
        step = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), 1)
        last = position[:, -1:] + 1
        compiled(ids[:, :1], attention_mask=step, position_ids=last, **{CACHE: cache})
        padded = index_of(cache)
        for b, row in enumerate(rows):
            alone = DynamicCache()
            compiled(row, **{CACHE: alone})
            compiled(row[:, :1], **{CACHE: alone})
            assert torch.equal(index_of(alone)[0], padded[b])


def test_one_token_without_a_partition_is_dense() -> None:
    model = tiny_llama()
    compiled = popc.compile(model, **OPTIONS)
    with torch.no_grad():
        assert relative(compiled(prompt(length=1)).logits, model(prompt(length=1)).logits) < 1e-5


def test_a_cache_that_others_filled_stays_dense() -> None:
    """Its tokens were never measured, and one token after another tells nothing of them."""
    model, ids = tiny_llama(), prompt()
    compiled = popc.compile(model, **OPTIONS)
    with torch.no_grad():
        dense, run = Stepper(model, ids), Stepper(model, ids)
        run.model = compiled
        for _ in range(4):
            dense.step()
            run.step()
            assert relative(run.logits, dense.logits) < 1e-5


def test_an_emptied_cache_starts_anew() -> None:
    compiled = popc.compile(tiny_llama(), **OPTIONS)
    with torch.no_grad():
        run = Stepper(compiled, prompt())
        first = sessions.of_cache(run.cache)
        run.cache.crop(-prompt().shape[1])
        run.feed(prompt(seed=5))
    assert sessions.of_cache(run.cache) is not first


def test_a_dropped_cache_frees_its_session() -> None:
    compiled = popc.compile(tiny_llama(), **OPTIONS)
    with torch.no_grad():
        run = Stepper(compiled, prompt())
        run.step()
    session = weakref.ref(sessions.of_cache(run.cache))
    del run
    gc.collect()
    assert session() is None

"""Attention heads pruned in decode: caches of either kind, later turns, sequences on their own."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

import popc
from popc.testing.oracle import MaskedAnywhere
from tests.helpers.generation import run, tokens
from tests.helpers.models import CACHE, tiny_llama
from tests.helpers.oracle import relative
from tests.helpers.profiles import few

ALL = ("mlp", "attention")


def heads_llama():
    """Four KV groups of two query heads."""
    return tiny_llama(num_attention_heads=8, num_key_value_heads=4)


def config(**fields: object) -> popc.Config:
    return popc.Config(
        **{"policy": "pop", "sparsity": 0.5, "candidate": 0.25, "targets": ALL, **fields}
    )


def turns(call, pieces, begin=lambda measuring: None, cache=None):
    """Logits of each piece's last token, fed one after the other into one cache."""
    cache = DynamicCache() if cache is None else cache
    out = []
    with torch.no_grad():
        for piece in pieces:
            begin(piece.shape[1] > 1)
            logits = call(piece, **{CACHE: cache}, use_cache=True).logits
            out.append(logits[:, -1].clone())
    return torch.stack(out)


def oracle_turns(model, plan: popc.Plan, options: popc.Config, pieces):
    oracle = MaskedAnywhere(model, plan, options)
    with oracle:
        return turns(model, pieces, oracle.begin)


@pytest.mark.parametrize("static", few([True, False], 1))
@pytest.mark.parametrize(("batch", "codegen"), [(1, "eager"), (3, "eager"), (1, "inductor")])
def test_is_the_oracle(batch: int, codegen: str, static: bool) -> None:
    torch._dynamo.reset()
    model, ids, options = heads_llama(), tokens(batch), config(codegen=codegen)
    pieces = ids.split([10, 1, 1, 1, 1, 1, 1], 1)
    compiled = popc.compile(model, options)
    cache = StaticCache(config=model.config, max_cache_len=20) if static else None
    logits = turns(compiled, pieces, cache=cache)
    assert [r.units for r in compiled.popc_plan.regions] == [4, 160, 4, 160]
    assert all(r.cached for r in compiled.popc_plan.regions if r.kind == "attention")
    expected = oracle_turns(model, compiled.popc_plan, options, pieces)
    assert relative(logits, expected) < 1e-4
    assert relative(turns(model, pieces), expected) > 0.05


def test_a_head_left_out_once_stays_out() -> None:
    """A second prompt finds holes in the cache where a decode step left heads out."""
    torch._dynamo.reset()
    model, ids, options = heads_llama(), tokens(1, 24), config(codegen="eager")
    pieces = ids.split([8, 1, 1, 6, 1, 1, 4, 1, 1], 1)
    compiled = popc.compile(model, options)
    logits = turns(compiled, pieces)
    expected = oracle_turns(model, compiled.popc_plan, options, pieces)
    assert relative(logits, expected) < 1e-4
    forgetful = MaskedAnywhere(model, compiled.popc_plan, options)
    forgetful.remembers = False
    with forgetful:
        assert relative(turns(model, pieces, forgetful.begin), expected) > 1e-3


def test_sequences_have_heads_of_their_own() -> None:
    torch._dynamo.reset()
    model, ids, options = heads_llama(), tokens(2), config(codegen="eager", scope="sequence")
    compiled = popc.compile(model, options)
    both = run(compiled, ids, 10)
    alone = [run(compiled, ids[b : b + 1], 10) for b in range(2)]
    assert relative(both, torch.cat(alone, 1)) < 1e-4
    shared = run(popc.compile(model, config(codegen="eager")), ids, 10)
    assert relative(shared, both) > 1e-3


def test_sparsity_of_the_whole_model() -> None:
    torch._dynamo.reset()
    model, ids = tiny_llama(), tokens()
    total = sum(p.numel() for p in model.parameters())
    mlp = sum(p.numel() for layer in model.model.layers for p in layer.mlp.parameters())
    options = popc.Config(policy="pop", model_sparsity=0.2, candidate=0.0, codegen="eager")
    r = 0.2 * total / mlp
    compiled = popc.compile(model, options)
    logits = run(compiled, ids, 10)
    same = popc.compile(model, policy="pop", sparsity=r, candidate=0.0, codegen="eager")
    assert torch.equal(logits, run(same, ids, 10))
    units = sum(round(r * 160) * 3 * 64 for _ in range(2))
    assert units / total == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("call", ["compile", "explain"])
def test_a_target_that_cannot_be_met_is_an_error(call: str) -> None:
    torch._dynamo.reset()
    options = popc.Config(policy="pop", model_sparsity=0.9, codegen="eager")
    with pytest.raises(popc.ConfigError, match=r"hold 6.*% of the parameters"), torch.no_grad():
        if call == "compile":
            popc.compile(tiny_llama(), options)(tokens())
        else:
            popc.explain(tiny_llama(), config=options, input_ids=tokens())


def test_sequences_of_a_reordered_cache_run_dense(caplog) -> None:
    """Each sequence has its own partition; whose is whose can't be told after a reordering."""
    torch._dynamo.reset()
    model, ids = heads_llama(), tokens(3)
    options = config(codegen="eager", scope="sequence", targets=("mlp",))
    compiled, order = popc.compile(model, options), torch.tensor([2, 0, 1])

    def decode(call, reorder: bool, beams: bool = False) -> torch.Tensor:
        cache = DynamicCache()
        rows = ids[:1].expand(3, -1) if beams else ids
        with torch.no_grad():
            call(rows[:, :10], **{CACHE: cache}, use_cache=True)
            call(rows[:, 10:11], **{CACHE: cache}, use_cache=True)
            if reorder:
                cache.reorder_cache(order)
            return call(rows[:, 11:12], **{CACHE: cache}, use_cache=True).logits

    assert relative(decode(compiled, False), decode(model, False)) > 0.05
    assert "reordered" not in caplog.text
    mixed, dense = decode(compiled, True), decode(model, True)
    assert "reordered" in caplog.text
    assert relative(mixed, dense) < 0.5 * relative(decode(compiled, False), decode(model, False))
    # Beams of one prompt are alike: any order of them is right.
    caplog.clear()
    beams = decode(compiled, True, beams=True)
    assert "reordered" not in caplog.text
    assert relative(beams, decode(compiled, False, beams=True)) < 1e-5

"""The pruned model is the masked dense one: logits, token after token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    StaticCache,
)

import popc
from tests.helpers.generation import TOLERANCE, oracle_run, run, tokens
from tests.helpers.models import tiny_llama
from tests.helpers.oracle import relative
from tests.helpers.profiles import few


def left_padding(ids: Tensor, prompt: int) -> Tensor:
    """Row b has its first ``2 b`` prompt tokens padded."""
    pads = torch.arange(ids.shape[0])[:, None] * 2
    return (torch.arange(ids.shape[1])[None] >= pads).long()


@pytest.mark.parametrize("sparsity", few([0.4, 0.15, 0.75], 1))
@pytest.mark.parametrize("candidate", [0.0, 0.1, 0.5])
def test_eager_is_the_oracle(sparsity: float, candidate: float) -> None:
    torch._dynamo.reset()
    model, ids = tiny_llama(), tokens()
    config = popc.Config(policy="pop", sparsity=sparsity, candidate=candidate, codegen="eager")
    expected = oracle_run(model, config, ids, 10)
    assert relative(run(model, ids, 10), expected) > 100 * TOLERANCE  # pruning must show
    assert relative(run(popc.compile(model, config), ids, 10), expected) < TOLERANCE


@pytest.mark.parametrize(
    ("scope", "codegen"),
    few(
        [
            ("sequence", "eager"),
            ("batch", "eager"),
            ("batch", "inductor"),
            ("sequence", "inductor"),
        ],
        2,
    ),
)
def test_left_padded_batch_is_the_oracle(scope: str, codegen: str) -> None:
    torch._dynamo.reset()
    model, ids = tiny_llama(), tokens(3)
    mask = left_padding(ids, 10)
    config = popc.Config(policy="pop", sparsity=0.4, candidate=0.2, scope=scope, codegen=codegen)
    expected = oracle_run(model, config, ids, 10, mask)
    assert relative(run(popc.compile(model, config), ids, 10, mask), expected) < TOLERANCE


@pytest.mark.parametrize("sparsity", few([0.6, 0.3], 1))
def test_inductor_is_the_oracle(sparsity: float) -> None:
    torch._dynamo.reset()
    model, ids = tiny_llama(mlp_bias=True), tokens()
    for layer in model.model.layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            nn.init.normal_(linear.bias)
    config = popc.Config(policy="pop", sparsity=sparsity)
    expected = oracle_run(model, config, ids, 10)
    assert relative(run(popc.compile(model, config), ids, 10), expected) < TOLERANCE


def test_static_cache_is_the_oracle() -> None:
    torch._dynamo.reset()
    model, ids = tiny_llama(), tokens()
    config = popc.Config(policy="pop", sparsity=0.4)
    expected = oracle_run(model, config, ids, 10)
    cache = StaticCache(config=model.config, max_cache_len=20)
    assert relative(run(popc.compile(model, config), ids, 10, cache=cache), expected) < TOLERANCE


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_prompt_as_long_as_a_head_is_wide_is_the_oracle(static: bool) -> None:
    """Which size of the cache grows cannot be told from such a prompt, or is told wrongly."""
    torch._dynamo.reset()
    model, ids = tiny_llama(), tokens(2, 20)
    prompt = model.config.head_dim
    config = popc.Config(policy="pop", sparsity=0.4, codegen="eager")
    expected = oracle_run(model, config, ids, prompt)
    cache = StaticCache(config=model.config, max_cache_len=24) if static else None
    got = run(popc.compile(model, config), ids, prompt, cache=cache)
    assert relative(got, expected) < TOLERANCE


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_sparsity_zero_is_dense(codegen: str) -> None:
    torch._dynamo.reset()
    model, ids = tiny_llama(), tokens()
    compiled = popc.compile(model, sparsity=0, codegen=codegen)
    assert relative(run(compiled, ids, 10), run(model, ids, 10)) < TOLERANCE


def test_bfloat16_stays_near_the_oracle() -> None:
    """Same active channels; the values differ by bfloat16's rounding alone."""
    torch._dynamo.reset()
    model, ids = tiny_llama().bfloat16(), tokens()
    config = popc.Config(policy="pop", sparsity=0.4, candidate=0.0, codegen="eager")
    expected = oracle_run(model, config, ids, 10)
    assert relative(run(popc.compile(model, config), ids, 10), expected) < 0.03


def gpt2() -> tuple[nn.Module, object]:
    """Conv1D weights, biases, tokens flattened before every linear."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=96, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval(), lambda m: [block.mlp.c_proj for block in m.transformer.h]


def opt() -> tuple[nn.Module, object]:
    """A plain ReLU MLP with biases."""
    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=64,
        ffn_dim=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=96,
        word_embed_proj_dim=64,
        init_std=0.2,
    )
    return OPTForCausalLM(config).eval(), lambda m: [b.fc2 for b in m.model.decoder.layers]


@pytest.mark.parametrize("make", [gpt2, opt])
@pytest.mark.parametrize("batch", few([3, 1], 1))
def test_other_architectures_are_the_oracle(make, batch: int) -> None:
    torch._dynamo.reset()
    model, downs = make()
    ids = tokens(batch)
    mask = left_padding(ids, 10)
    config = popc.Config(policy="pop", sparsity=0.4, candidate=0.2, codegen="eager")
    expected = oracle_run(model, config, ids, 10, mask, downs)
    compiled = popc.compile(model, config)
    assert relative(run(compiled, ids, 10, mask), expected) < TOLERANCE
    assert relative(run(model, ids, 10, mask), expected) > 100 * TOLERANCE
    assert compiled.popc_plan.count("mlp") == 2

"""Compiled models with quantised weights, beside what they stand for."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import fx, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from popc.quant import QuantizedTensor
from popc.runtime import interpreter

_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
_SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": 96,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_MOE = {**_SIZES, **_HEADS, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}


def tiny_gpt2() -> nn.Module:
    """Weights ``[K, N]``, and q, k and v of one linear."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_head=4, n_layer=2, n_positions=64, vocab_size=96)
    config.initializer_range = 0.2
    return GPT2LMHeadModel(config).eval()


def tiny_mixtral(experts: int = 4, **options: object) -> nn.Module:
    """Stacks of experts ``[E, N, K]``."""
    torch.manual_seed(0)
    config = MixtralConfig(**_MOE, intermediate_size=96, num_local_experts=experts, **options)
    return MixtralForCausalLM(config).eval()


def tiny_qwen_moe(experts: int = 8, **options: object) -> nn.Module:
    """More experts, of fewer channels."""
    torch.manual_seed(0)
    sizes = {"intermediate_size": 96, "moe_intermediate_size": 48, "num_experts": experts}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_MOE, **sizes, **options)).eval()


def tiny_gpt_oss(**options: object) -> nn.Module:
    """Stacks of experts ``[E, K, N]``, with biases."""
    torch.manual_seed(0)
    config = GptOssConfig(**_MOE, intermediate_size=64, num_local_experts=4, **options)
    return GptOssForCausalLM(config).eval()


def quantized_names(compiled: nn.Module) -> set[str]:
    """The names of the parameters that are quantised."""
    named = compiled.named_parameters()
    return {name for name, value in named if isinstance(value, QuantizedTensor)}


def with_values_of(compiled: nn.Module, model: nn.Module) -> nn.Module:
    """``model``, with the values that the weights of ``compiled`` have."""
    copied = copy.deepcopy(model)
    values = dict(compiled.named_parameters())
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            value = values[name]
            plain = value.dequantize() if isinstance(value, QuantizedTensor) else value
            parameter.copy_(plain)
    return copied


@contextmanager
def counted_ops() -> Iterator[Counter[str]]:
    """How often each op of popc's runs, in code of ``codegen="eager"``."""
    counts: Counter[str] = Counter()

    def see(node: fx.Node, args: object, value: object) -> None:
        if getattr(node.target, "namespace", "") == "popc":
            counts[node.target._opname] += 1

    with interpreter.watching(see):
        yield counts

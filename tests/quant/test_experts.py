"""Stacks of experts in planes: routed ones are read, as the values that their weights have."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import popc
from popc.quant import QuantizedTensor
from popc.testing import assert_equivalent
from tests.helpers.generation import generated, prompt, run
from tests.helpers.oracle import PLANES, relative
from tests.helpers.quantized import (
    counted_ops,
    quantized_names,
    tiny_gpt_oss,
    tiny_mixtral,
    tiny_qwen_moe,
    with_values_of,
)

pytestmark = pytest.mark.usefixtures("fresh_compiler")

OPTIONS = {"sparsity": 0.4, "codegen": "eager"}
MODELS = [tiny_mixtral, tiny_qwen_moe, tiny_gpt_oss]


@pytest.mark.parametrize("form", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("make", MODELS)
def test_dense(make: Callable[..., nn.Module], form: str) -> None:
    model = make(experts_implementation=form)
    compiled = popc.compile(model, weights="int8", policy="dense", codegen="eager")
    with counted_ops() as counts:
        ours = generated(compiled, prompt(batch=2), 2)
    stacks = [p for p in compiled.parameters() if isinstance(p, QuantizedTensor) and p.dim() == 3]
    assert len(stacks) == 4
    # 2 linears of 2 layers in 3 calls; nothing is dequantised but the rows of the embedding
    assert counts["quantized_experts"] == 12 and counts["dequantize"] == 3
    plain = with_values_of(compiled, model)
    assert relative(ours, generated(plain, prompt(batch=2), 2)) < PLANES


@pytest.mark.parametrize("make", MODELS)
def test_pruned_by_units(make: Callable[..., nn.Module]) -> None:
    # After 9 of its tokens one more has two scores that are equal within a kernel's rounding.
    model, ids = make(), prompt(length=16)
    config = popc.Config(policy="pop", targets=("experts",), **OPTIONS)
    compiled = popc.compile(model, config, weights="int8")
    ours = run(compiled, ids, 12)
    values = with_values_of(compiled, model)
    torch.compiler.reset()
    plain = popc.compile(values, config)
    assert relative(ours, run(plain, ids, 12)) < PLANES
    assert relative(ours, run(values, ids, 12)) > 1e-2
    (name,) = (name for name in quantized_names(compiled) if "0.mlp.experts.gate" in name)
    weight = dict(compiled.named_parameters())[name]
    assert weight.stored.row_dim == 0  # of its outputs, rows of live units are read


# Not of the third, whose experts in this form the oracle does not mask.
@pytest.mark.parametrize("make", MODELS[:2])
def test_equivalent_to_the_oracle(make: Callable[..., nn.Module]) -> None:
    """Of the values that quantised weights have, popc's choices are the oracle's."""
    model = make(experts_implementation="batched_mm")  # the oracle is in float64, as not all are
    compiled = popc.compile(model, weights="int8", policy="dense", codegen="eager")
    generated(compiled, prompt(), 1)
    values = with_values_of(compiled, model)
    assert_equivalent(values, prompt(), policy="pop", targets=("experts",), **OPTIONS)

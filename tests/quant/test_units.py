"""Units of quantised weights are pruned as those of the values that the weights have."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import popc
from tests.helpers.generation import generated, oracle_run, prompt, run
from tests.helpers.models import tiny_llama
from tests.helpers.oracle import PLANES, relative
from tests.helpers.quantized import counted_ops, quantized_names, tiny_gpt2, with_values_of

pytestmark = pytest.mark.usefixtures("fresh_compiler")

OPTIONS = {"sparsity": 0.4, "codegen": "eager"}
TEXT = [{"input_ids": prompt(5, 24, 2)}]


def calibration(policy: str) -> dict[str, object]:
    return {"calibration": TEXT} if policy in ("flap", "wanda_sp") else {}


def both(
    model: nn.Module, policy: str, call: Callable[[nn.Module], Tensor], **options: object
) -> tuple[Tensor, Tensor, nn.Module]:
    """What the compiled model gives with quantised weights, and with plain ones of the same values;
    and the former."""
    arguments = {**OPTIONS, **options, "policy": policy, **calibration(policy)}
    quantized = popc.compile(model, weights="int8", **arguments)
    ours = call(quantized)
    torch.compiler.reset()
    plain = popc.compile(with_values_of(quantized, model), **arguments)
    return ours, call(plain), quantized


@pytest.mark.parametrize("policy", ["pop", "griffin", "staged", "flap", "wanda_sp"])
def test_units_of_an_mlp(policy: str) -> None:
    model = tiny_llama()
    ours, plain, _ = both(model, policy, lambda call: generated(call, prompt()))
    assert relative(ours, plain) < PLANES


def test_as_the_oracle_has_it() -> None:
    model, ids = tiny_llama(), prompt(length=14)
    config = popc.Config(policy="pop", **OPTIONS)
    compiled = popc.compile(model, config, weights="int8")
    ours = run(compiled, ids, 9)
    plain = with_values_of(compiled, model)
    assert relative(ours, oracle_run(plain, config, ids, 9)) < PLANES
    assert relative(ours, run(plain, ids, 9)) > 1e-2  # something was pruned


def test_no_more_is_dequantised_than_is_read() -> None:
    compiled, ids = popc.compile(tiny_llama(), weights="int8", policy="pop", **OPTIONS), prompt()
    run(compiled, torch.cat((ids, ids[:, :2]), 1), 9)
    with counted_ops() as counts:
        run(compiled, torch.cat((ids, ids[:, :2]), 1), 9)
    layers, calls, steps = 2, 3, 2
    assert counts["gather_quantized"] == 3 * layers * steps  # gate, up and down
    # q, k, v and o, and the last linear; of a prompt, gate, up and down too
    assert counts["quantized_linear"] == (4 * layers + 1) * calls + 3 * layers
    assert counts["dequantize"] == calls  # rows of the embedding


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_heads_and_batches(scope: str) -> None:
    options = {"targets": ("mlp", "attention"), "scope": scope}
    ids = prompt(batch=3)
    ours, plain, _ = both(tiny_llama(), "pop", lambda call: generated(call, ids), **options)
    assert relative(ours, plain) < PLANES


def test_transposed_weights() -> None:
    options = {"targets": ("mlp", "attention")}
    model = tiny_gpt2()
    ours, plain, compiled = both(model, "pop", lambda call: generated(call, prompt()), **options)
    assert relative(ours, plain) < PLANES
    of_layers = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    names = {name for name in quantized_names(compiled) if ".h.0." in name}
    assert names == {f"transformer.h.0.{name}.weight" for name in of_layers}


class Fused(nn.Module):
    """Gate and up are parts of one weight, each read by a linear of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Parameter(torch.randn(256, 64) / 8)
        self.down = nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both[:128], self.both[128:]
        h = nn.functional.silu(nn.functional.linear(x, gate)) * nn.functional.linear(x, up)
        return self.down(h)


@torch.no_grad()
def test_parts_of_weights_stay_as_they_are() -> None:
    torch.manual_seed(0)
    model, x, token = Fused(), torch.randn(1, 9, 64), torch.randn(1, 1, 64)
    ours, plain, compiled = both(model, "pop", lambda call: torch.cat((call(x), call(token)), 1))
    assert relative(ours, plain) < PLANES
    assert quantized_names(compiled) == {"down.weight"}
    reasons = [skip.reason for skip in compiled.popc_plan.skipped if skip.kind == "float"]
    assert "it reads a part of its weight, or a view of it" in reasons


@torch.no_grad()
def test_an_encoder_in_one_pass() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "vocab_size": 96}
    config = BertConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2)
    model, ids = BertModel(config).eval(), prompt(batch=2)
    ours, plain, compiled = both(model, "pop", lambda call: call(ids).last_hidden_state)
    assert relative(ours, plain) < PLANES
    assert relative(ours, with_values_of(compiled, model)(ids).last_hidden_state) > 1e-2
    assert "encoder.layer.0.output.dense.weight" in quantized_names(compiled)

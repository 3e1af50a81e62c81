"""Quantise pass: which weights become planes, and that the compiled model computes with these."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import popc
from popc.quant import QuantizedTensor
from tests.helpers.models import tiny_llama
from tests.helpers.oracle import PLANES, relative

IDS = torch.arange(3, 24)[None]
DENSE = {"policy": "dense", "codegen": "eager"}
WIDE = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 128}


def quantised(model: nn.Module, **options: object) -> nn.Module:
    torch._dynamo.reset()
    return popc.compile(model, weights="int8", **{**DENSE, **options})


def dequantised(compiled: nn.Module, model: nn.Module) -> nn.Module:
    """``model`` with the values that the compiled model's weights have."""
    plain = copy.deepcopy(model)
    for name, parameter in compiled.named_parameters():
        if isinstance(parameter, QuantizedTensor):
            plain.get_parameter(name).data.copy_(parameter.dequantize())
    return plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_computes_with_the_values_of_its_planes(tied: bool, dtype: torch.dtype) -> None:
    model = tiny_llama(tie_word_embeddings=tied, **WIDE).to(dtype)
    compiled = quantised(model)
    with torch.no_grad():
        actual = compiled(IDS).logits
        kinds = {type(p) for p in compiled.parameters() if p.dim() == 2}
        assert kinds == {QuantizedTensor}
        assert (compiled.lm_head.weight is compiled.model.embed_tokens.weight) == tied
        expected = dequantised(compiled, model)(IDS).logits
        error = (actual - expected).float().norm() / expected.float().norm()
        assert error < (PLANES if dtype is torch.float32 else 2e-2)
        assert not torch.equal(expected, model(IDS).logits)


def test_decodes_as_the_values_of_its_planes() -> None:
    model = tiny_llama(**WIDE)
    compiled = quantised(model)
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True, "pad_token_id": 0}
    actual = compiled.generate(IDS, **options)
    expected = dequantised(compiled, model).generate(IDS, **options)
    assert torch.equal(actual.sequences, expected.sequences)
    assert relative(torch.stack(actual.logits), torch.stack(expected.logits)) < PLANES


class Conv1D(nn.Module):
    """A linear whose weight is ``[K, N]``, as GPT-2 has it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.flatten(0, -2), self.weight)
        return flat.unflatten(0, x.shape[:-1])


def test_weights_that_the_model_holds_transposed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(64, 96), nn.GELU(), Conv1D(96, 64)).eval()
    compiled = quantised(model)
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        actual = compiled(x)
        assert compiled[0].weight.stored.transposed and compiled[0].weight.shape == (64, 96)
        assert relative(actual, dequantised(compiled, model)(x)) < PLANES


class Left(nn.Module):
    """Weights that stay as they are: each of ``kept`` for another reason."""

    kept = ("small", "halved", "added", "table")

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64, bias=False)
        self.small = nn.Linear(64, 8, bias=False)
        self.halved = nn.Linear(64, 128, bias=False)
        self.added = nn.Linear(64, 64, bias=False)
        self.table = nn.Parameter(torch.randn(64, 64))
        self.last = nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x) + self.small(x).sum(-1, keepdim=True)
        x = x + nn.functional.linear(x, self.halved.weight[:64])
        x = self.added(x) + self.added.weight.sum() + self.table[: x.shape[-2]]
        return self.last(x)


def test_what_is_more_than_a_linear_s_weight_stays_as_it_is() -> None:
    torch.manual_seed(0)
    model = Left().eval()
    compiled = quantised(model)
    x = torch.randn(1, 5, 64)
    with torch.no_grad():
        actual = compiled(x)
        left = {n for n, p in compiled.named_parameters() if not isinstance(p, QuantizedTensor)}
        assert {name.split(".")[0] for name in left} == set(Left.kept)
        assert relative(actual, dequantised(compiled, model)(x)) < PLANES
    reasons = {skipped.reason for skipped in compiled.popc_plan.skipped}
    assert "its weight has a side of less than 32" in reasons
    assert "it reads a part of its weight, or a view of it" in reasons
    assert any("shared with aten.sum" in reason for reason in reasons)


def test_the_model_itself_keeps_its_weights() -> None:
    model = tiny_llama(**WIDE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compiled = quantised(model)
    with torch.no_grad():
        compiled(IDS)
        assert not any(isinstance(p, QuantizedTensor) for p in model.parameters())
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name])
        model.config.marked = True
        compiled(IDS)  # what was set on the model is followed, its weights are not
    assert isinstance(compiled.lm_head.weight, QuantizedTensor)


def test_inplace_frees_the_model_s_weights() -> None:
    model = tiny_llama(**WIDE)
    expected = quantised(copy.deepcopy(model))
    compiled = popc.compile(model, weights="int8", inplace=True, **DENSE)
    held = model.model.layers[0].mlp.down_proj.weight
    with torch.no_grad():
        actual = compiled(IDS).logits
        assert held.numel() == 0, "whoever else holds a weight keeps its memory"
        assert relative(actual, expected(IDS).logits) < PLANES
        torch.testing.assert_close(compiled(IDS).logits, actual)
        with pytest.raises(popc.ModelError, match=r"freed by popc\.compile"):
            model(IDS)
    assert model.lm_head.weight.shape == (128, 64)
    with pytest.raises(popc.ConfigError, match="inplace"):
        popc.compile(model, inplace=True)


def test_what_fails_after_quantising_runs_dense(monkeypatch) -> None:
    monkeypatch.delenv("POPC_RAISE")

    def fail(captured: object, work: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr("popc.passes.pipeline.PASSES", (fail,))
    model = tiny_llama(**WIDE)
    compiled = quantised(model)
    with torch.no_grad(), pytest.warns(popc.PopcWarning, match="runs dense"):
        actual = compiled(IDS).logits
        assert relative(actual, dequantised(compiled, model)(IDS).logits) < PLANES
        torch.testing.assert_close(compiled(IDS).logits, actual)


def test_copies_keep_their_planes() -> None:
    model = tiny_llama(**WIDE)
    compiled = quantised(model)
    with torch.no_grad():
        expected = compiled(IDS).logits
        copied = copy.deepcopy(compiled)
        assert copied.lm_head.weight.packed is not compiled.lm_head.weight.packed
        torch.testing.assert_close(copied(IDS).logits, expected)


def test_torch_compile_has_no_model_to_give_weights_to() -> None:
    failed = pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="weights='int8'")
    with failed, torch.no_grad():
        torch.compile(tiny_llama(), backend="popc", options={"weights": "int8"})(IDS)

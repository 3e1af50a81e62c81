"""popc.compile on models that are not plain: pieces, nothing prunable, gradients."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import popc
from tests.helpers.generation import oracle_run, prompt, run, tokens
from tests.helpers.models import CACHE, InnerNorm, Plain, tiny_llama
from tests.helpers.oracle import MaskedDense, llama_downs, relative
from tests.test_generate import OPTIONS

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Broken(nn.Module):
    """Breaks the graph before the module it holds."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: object, **kwargs: object) -> object:
        torch._dynamo.graph_break()
        return self.inner(*args, **kwargs)


def test_the_original_is_unchanged() -> None:
    model, ids = tiny_llama(), prompt()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dense = model.generate(ids, max_new_tokens=6, do_sample=False)
    compiled = popc.compile(model, **OPTIONS)
    compiled.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), dense)
    assert "forward" not in vars(model)
    assert type(compiled) is type(model)
    assert compiled.config is model.config
    assert compiled.device == model.device
    after = model.state_dict()
    assert before.keys() == after.keys() == compiled.state_dict().keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert next(compiled.parameters()) is next(model.parameters())


def test_a_model_in_pieces_is_pruned_and_says_so() -> None:
    model, ids = tiny_llama(), tokens()
    config = popc.Config(**OPTIONS)
    expected = oracle_run(model, config, ids, 10)
    model.model.layers[1].mlp = Broken(model.model.layers[1].mlp)
    compiled = popc.compile(model, config)
    assert relative(run(compiled, ids, 10), expected) < 1e-4
    assert compiled.popc_plan.count("mlp") == 2
    assert compiled.popc_plan.breaks
    assert "traced in pieces" in str(compiled.popc_plan)


def test_nothing_prunable_warns_once_and_is_dense() -> None:
    model = InnerNorm().eval()
    compiled, x = popc.compile(model, policy="pop", sparsity=0.5), torch.randn(1, 4, 16)
    with torch.no_grad():
        with pytest.warns(UserWarning, match="found nothing to prune"):
            y = compiled(x)
        assert torch.allclose(y, model(x), atol=1e-5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            compiled(x)


def test_inputs_that_require_grad_run_dense_with_a_warning() -> None:
    model = Plain().eval()
    compiled = popc.compile(model, policy="pop", sparsity=0.5, codegen="eager")
    x = torch.randn(1, 4, 16, requires_grad=True)
    with pytest.warns(UserWarning, match="needs gradients and runs dense"):
        y = compiled(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    assert torch.allclose(grad, expected, atol=1e-6)


def test_a_model_is_compiled_twice_with_different_options() -> None:
    model, ids = tiny_llama(), tokens()
    for sparsity in (0.3, 0.6):
        config = popc.Config(policy="pop", sparsity=sparsity, codegen="eager")
        expected = oracle_run(model, config, ids, 10)
        assert relative(run(popc.compile(model, config), ids, 10), expected) < 1e-4


def test_what_is_no_module_is_an_error() -> None:
    with pytest.raises(popc.ModelError, match=r"takes an nn\.Module, not str"):
        popc.compile("llama")  # type: ignore[type-var]


def test_exactly_k_channels_are_active() -> None:
    """The oracle's own count, so that the comparison with it means what the paper says."""
    model, ids = tiny_llama(), tokens()
    oracle = MaskedDense(model, llama_downs(model), 0.4, 0.1)
    run(oracle, ids, 10)
    oracle.remove()
    assert [int(mask.sum()) for mask in oracle.active.values()] == [96, 96]


class Counter(nn.Module):
    """Reads a Python value out of a tensor: cannot be traced whole."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Plain()

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            x = x * 2
        return self.mlp(x)


def test_data_dependent_control_flow_still_runs() -> None:
    model, x = Counter().eval(), torch.randn(1, 4, 16)
    compiled = popc.compile(model, policy="pop", sparsity=0.5, codegen="eager")
    with torch.no_grad():
        assert torch.allclose(compiled(x), model(x), atol=1e-6)
    assert compiled.popc_plan.breaks
    assert [region.units for region in compiled.popc_plan.regions] == [40]
    assert popc.analyze(model, (x,)).breaks


def test_cache_made_by_the_model_is_known_too() -> None:
    """No cache passed: the one that the model returns carries the session."""
    model, ids = tiny_llama(), prompt()
    compiled = popc.compile(model, **OPTIONS)
    with torch.no_grad():
        cache = DynamicCache()
        compiled(ids, **{CACHE: cache}, use_cache=True)
        expected = compiled(ids[:, :1], **{CACHE: cache}, use_cache=True).logits
        made = compiled(ids, use_cache=True)[CACHE]
        logits = compiled(ids[:, :1], **{CACHE: made}, use_cache=True).logits
        dense_cache = model(ids, use_cache=True)[CACHE]
        dense = model(ids[:, :1], **{CACHE: dense_cache}, use_cache=True).logits
    assert torch.equal(logits, expected)
    assert relative(logits, dense) > 0.01

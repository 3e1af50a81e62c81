"""Analysis: what is a region, and what is refused with which reason."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import popc
from tests.helpers import models


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def relu_squared(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x) ** 2


def tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.044715 * torch.pow(x, 3.0))))


ACTIVATIONS = [F.silu, F.gelu, F.relu, F.elu, torch.tanh, F.mish, quick_gelu, relu_squared]
ACTIVATIONS += [tanh_gelu, F.hardswish, nn.ReLU(inplace=True)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize(("mlp", "producers"), [(models.Gated, 2), (models.Plain, 1)])
def test_mlp_is_found(mlp: type, producers: int, act: object, bias: bool) -> None:
    plan = popc.analyze(mlp(act, bias), (torch.randn(2, 3, 16),))
    (region,) = plan.regions
    assert (region.kind, region.units) == ("mlp", 40)
    assert (len(region.producers), len(region.consumers)) == (producers, 1)


@pytest.mark.parametrize("mlp", [models.AddmmMLP, models.Scaled])
def test_other_forms_are_found(mlp: type) -> None:
    plan = popc.analyze(mlp(), (torch.randn(2, 3, 16),))
    assert [region.units for region in plan.regions] == [40]


@pytest.mark.parametrize(
    ("mlp", "reason"),
    [
        (models.InnerNorm, "aten.layer_norm.default mixes"),
        (models.Softmaxed, "aten.softmax.int mixes"),
        (models.Leaks, "leave the graph"),
        (models.TwoValues, "different values of the channels"),
        (models.Square, "aten.matmul.default mixes"),
    ],
)
def test_refused_with_the_reason(mlp: type, reason: str) -> None:
    plan = popc.analyze(mlp(), (torch.randn(2, 3, 16),))
    assert plan.regions == []
    assert any(reason in skipped.reason for skipped in plan.skipped), plan.skipped
    assert all(skipped.name and skipped.reason for skipped in plan.skipped)


def test_training_dropout_is_refused_and_eval_dropout_is_not() -> None:
    mlp = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Dropout(0.5), nn.Linear(24, 8))
    x = torch.randn(1, 4, 8)
    assert popc.analyze(mlp.train(), (x,)).regions == []
    assert len(popc.analyze(mlp.eval(), (x,)).regions) == 1


def test_same_regions_from_every_front_end() -> None:
    mlp, x = models.Gated(), torch.randn(2, 3, 16)
    exported = torch.export.export(mlp, (x,))
    for graph in (mlp, fx.symbolic_trace(mlp), exported, exported.module()):
        plan = popc.analyze(graph, (x,))
        assert [(r.kind, r.units) for r in plan.regions] == [("mlp", 40)]


def test_llama_plan_reads_as_a_table() -> None:
    plan = popc.analyze(models.tiny_llama())
    assert [(r.kind, r.units) for r in plan.regions] == [("attention", 2), ("mlp", 160)] * 2
    text = str(plan)
    assert "model.layers.1.mlp" in text
    assert "lm_head" in text


def test_shared_weights_are_two_regions() -> None:
    mlp = models.Plain()
    plan = popc.analyze(nn.Sequential(mlp, mlp), (torch.randn(1, 3, 16),))
    keys = [region.key for region in plan.regions if region.units == 40]
    assert len(set(keys)) == len(keys) == 2


def test_what_is_no_model_is_an_error() -> None:
    with pytest.raises(popc.ModelError, match="takes an nn"):
        popc.analyze("llama")  # type: ignore[arg-type]
    with pytest.raises(popc.ModelError, match="fails on these inputs"):
        popc.analyze(models.Plain(), (torch.randn(2, 3, 17),))

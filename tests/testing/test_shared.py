"""Parameters that several layers share: to the oracle each use is a use of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import popc
from popc import testing
from popc.testing import MLP, Attention, Layer, Prompt, Transformer
from tests.helpers.profiles import few

LAYER = Layer(attention=Attention(kv_heads=3), block=MLP(channels=12))
SPEC = Transformer(layers=(LAYER, LAYER))
INPUTS = Prompt((5, 5)).inputs(SPEC.vocabulary)
EAGER = {"sparsity": 0.5, "candidate": 0.3, "codegen": "eager", "steps": 2}


def whole_mlp(model: Any) -> None:
    model.layers[1].block = model.layers[0].block


def down_alone(model: Any) -> None:
    model.layers[1].block.down.weight = model.layers[0].block.down.weight


def up_alone(model: Any) -> None:
    """Beside gates of their own."""
    model.layers[1].block.up.weight = model.layers[0].block.up.weight


def queries_and_keys(model: Any) -> None:
    for layer in model.layers:
        layer.attention.k.weight = layer.attention.q.weight


def whole_layer(model: Any) -> None:
    """As ALBERT."""
    model.layers[1] = model.layers[0]


def everything(model: Any) -> None:
    whole_layer(model)
    queries_and_keys(model)
    model.layers[0].block.gate.weight = model.layers[0].block.up.weight


def one_storage(model: Any) -> None:
    """Two parameters of the same values in memory."""
    model.layers[1].block.down.weight.data = model.layers[0].block.down.weight.data


SHARINGS = [up_alone, queries_and_keys, everything, whole_layer, down_alone, whole_mlp, one_storage]


@pytest.mark.parametrize("policy", ["threshold", "pop"])
@pytest.mark.parametrize("share", few(SHARINGS, 4))
def test_each_use_is_distinguished(share, policy: str) -> None:
    model = SPEC.make()
    share(model)
    result = testing.assert_equivalent(model, INPUTS, policy=policy, **EAGER)
    assert result.decided and result.masked > 0


class Broken(nn.Module):
    """Layers that are traced one by one, and so may be served by one graph."""

    def __init__(self, share) -> None:
        super().__init__()
        self.model = SPEC.make()
        share(self.model)

    def forward(self, input_ids: Tensor, cache: Any = None, use_cache: bool = False) -> Tensor:
        x = self.model.embedding(input_ids)
        for number, layer in enumerate(self.model.layers):
            torch._dynamo.graph_break()
            x = layer(x, cache, number, None)
        torch._dynamo.graph_break()
        return self.model.head(x)


@pytest.mark.parametrize("policy", ["threshold", "pop"])
@pytest.mark.parametrize("share", few([up_alone, down_alone, queries_and_keys], 1))
def test_also_where_layers_are_traced_one_by_one(share, policy: str) -> None:
    model = Broken(share)
    result = testing.assert_equivalent(model, INPUTS["input_ids"], policy=policy, **EAGER)
    assert result.decided and result.masked > 0


class Parts(nn.Module):
    """Linears whose weights are parts of one, and one that is read the other way round, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.both = nn.Parameter(torch.randn(24, 8) / 4)
        self.back = nn.Parameter(torch.randn(8, 12) / 4)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.linear(x, weight=self.both[:12])
        x = x + F.linear(F.silu(gate) * F.linear(x, self.both[12:]), self.back)
        h = F.relu(x @ self.back)  # 12 channels again
        return x + torch.matmul(h, self.back.t())


def test_parts_of_a_weight_are_distinguished() -> None:
    model, x = Parts().double(), torch.randn(1, 1, 8, dtype=torch.float64)
    plan = popc.analyze(model, (x,))
    assert [region.units for region in plan.regions] == [12, 12]
    first = {plan.regions[0].key: torch.arange(12) % 2 == 0}
    second = {plan.regions[1].key: torch.arange(12) % 3 == 0}
    with torch.no_grad():
        for chosen in (first, second, {**first, **second}):
            got = testing.masked_dense(model, plan, chosen)(x)
            h = F.silu(x @ model.both[:12].t()) * (x @ model.both[12:].t())
            h = h * chosen.get(plan.regions[0].key, torch.ones(12))
            middle = x + h @ model.back.t()
            h = F.relu(middle @ model.back)
            h = h * chosen.get(plan.regions[1].key, torch.ones(12))
            assert testing.relative(got, middle + h @ model.back.t()) < 1e-12

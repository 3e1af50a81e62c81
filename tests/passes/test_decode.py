"""The decode pass alone: the graph equals the masked dense module, and touches nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import popc
from popc.analysis.capture import capture_module
from popc.analysis.regions import find_regions
from popc.passes.decode import prune_regions
from tests import models
from tests.passes.checks import assert_meta_is_true

aten = torch.ops.aten


def captured_mlp(module: nn.Module, x: torch.Tensor):
    captured = capture_module(module, (x,))
    return captured, find_regions(captured).regions


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("mlp", [models.Gated, models.Plain, models.Scaled, models.AddmmMLP])
def test_is_the_masked_module(mlp: type, scope: str) -> None:
    torch.manual_seed(0)
    module, x = mlp().eval(), torch.randn(2, 1, 16)
    captured, regions = captured_mlp(module, x)
    if scope == "sequence" and regions[0].hidden.meta["val"].dim() != 3:
        pytest.skip("tokens and batch are one axis: the backend leaves it dense")
    config = popc.Config(sparsity=0.5, candidate=0.0, scope=scope)
    live = config.counts(40).live
    rows = [torch.randperm(40)[:live].sort().values for _ in range(2)]
    index = rows[0] if scope == "batch" else torch.stack(rows)
    prune_regions(captured, regions, config)
    (y, *_) = assert_meta_is_true(captured.gm, module, x, index, torch.ones(index.shape))

    def mask(_: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        keep = torch.zeros(2, 1, 40).scatter_(-1, index.expand(2, live)[:, None], 1.0)
        return (args[0] * keep,)

    if isinstance(module, models.AddmmMLP):
        gone = torch.ones(40).index_fill_(0, index, 0).bool()
        module.w2.data[gone] = 0
    else:
        module.c.register_forward_pre_hook(mask)
    torch.testing.assert_close(y, module(x).detach())


def test_reads_only_what_it_needs_and_leaves_the_rest() -> None:
    module = nn.Sequential(models.Gated(), nn.LayerNorm(16), nn.Linear(16, 3)).eval()
    captured, regions = captured_mlp(module, torch.randn(1, 1, 16))
    untouched = [n.name for n in captured.gm.graph.nodes if n.target is aten.layer_norm.default]
    prune_regions(captured, regions, popc.Config(sparsity=0.5))
    targets = [n.target for n in captured.gm.graph.nodes]
    assert targets.count(torch.ops.popc.gather_linear.default) == 2
    assert targets.count(torch.ops.popc.gather_matmul.default) == 1
    assert targets.count(torch.ops.popc.select_candidates.default) == 1
    assert targets.count(aten.linear.default) == 1  # the last, which is no region
    after = [n.name for n in captured.gm.graph.nodes if n.target is aten.layer_norm.default]
    assert after == untouched

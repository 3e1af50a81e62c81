"""The decode pass alone: the graph equals the masked dense module, and touches nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import popc
from popc.analysis.capture import capture_module
from popc.analysis.regions import find_regions
from popc.passes.prune_units import gather_units
from popc.planning.packing import Slot
from tests.helpers import models
from tests.helpers.checks import assert_meta_is_true

aten = torch.ops.aten


def captured_mlp(module: nn.Module, x: torch.Tensor):
    captured = capture_module(module, (x,))
    return captured, find_regions(captured).regions


def slots(regions, config: popc.Config) -> list[Slot]:
    return [Slot(region, config.counts(region.units), rows=True) for region in regions]


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize(
    "mlp", [models.Gated, models.Plain, models.Scaled, models.AddmmMLP, models.Interleaved]
)
def test_is_the_masked_module(mlp: type, scope: str) -> None:
    torch.manual_seed(0)
    module, x = mlp().eval(), torch.randn(2, 1, 16)
    captured, regions = captured_mlp(module, x)
    config = popc.Config(policy="pop", sparsity=0.5, candidate=0.0, scope=scope)
    packing = gather_units(captured, slots(regions, config), scope)
    count = config.counts(40).live
    live = torch.stack([torch.randperm(40)[:count].sort().values for _ in range(2)])
    if scope == "batch":
        live = live[:1]
    index, norm = packing.pack([live], [None]), torch.ones(len(live), count)
    if scope == "batch":
        index, norm = index[0], norm[0]
    (y, *_) = assert_meta_is_true(captured.gm, module, x, index, norm)
    if isinstance(module, models.AddmmMLP):
        keep = torch.zeros(2, 40).scatter_(-1, live.expand(2, count), 1.0)
        rows = [module.masked(x[b : b + 1], keep[b]) for b in range(2)]
        torch.testing.assert_close(y, torch.cat(rows).detach())
        return

    def mask(_: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        keep = torch.zeros(2, 1, 40).scatter_(-1, live.expand(2, count)[:, None], 1.0)
        return (args[0] * keep,)

    module.c.register_forward_pre_hook(mask)
    torch.testing.assert_close(y, module(x).detach())


def test_reads_only_what_it_needs_and_leaves_the_rest() -> None:
    module = nn.Sequential(models.Gated(), nn.LayerNorm(16), nn.Linear(16, 3)).eval()
    captured, regions = captured_mlp(module, torch.randn(1, 1, 16))

    def others() -> list[str]:
        kept = (aten.layer_norm.default, aten.silu.default, aten.mul.Tensor)
        return [n.name for n in captured.gm.graph.nodes if n.target in kept]

    before = others()
    gather_units(captured, slots(regions, popc.Config(policy="pop", sparsity=0.5)), "batch")
    targets = [n.target for n in captured.gm.graph.nodes]
    assert targets.count(torch.ops.popc.gather_linear.default) == 3
    assert targets.count(torch.ops.popc.select_units.default) == 1
    assert targets.count(aten.linear.default) == 1  # the last, which is no region
    assert others() == before


def test_a_linear_of_two_regions_keeps_what_is_in_none() -> None:
    """One linear in front of two MLPs and a part that is no region, one behind both."""
    torch.manual_seed(0)
    module, x = models.Parallel().eval(), torch.randn(1, 1, 16)
    captured, regions = captured_mlp(module, x)
    assert sorted(region.units for region in regions) == [24, 40]
    config = popc.Config(policy="pop", sparsity=0.5, candidate=0.0)
    packing = gather_units(captured, slots(regions, config), "batch")
    live = [torch.arange(config.counts(r.units).live)[None] for r in regions]
    norm = torch.ones(packing.norm_total)
    index = packing.pack(live, [None, None])[0]
    (y, *_) = assert_meta_is_true(captured.gm, module, x, index, norm)
    torch.testing.assert_close(y, module(x, keep=(12, 20)).detach())

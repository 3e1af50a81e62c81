"""The prefill pass alone: outputs unchanged, one more, which is the statistic."""

from __future__ import annotations

import pytest
import torch

from popc.analysis.capture import capture_module
from popc.analysis.regions import find_regions
from popc.passes.measure_units import append_statistics
from popc.policies import get
from tests.helpers import models
from tests.helpers.checks import assert_meta_is_true


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("mlp", [models.Gated, models.Plain, models.Scaled, models.Interleaved])
def test_adds_the_sum_of_squares(mlp: type, scope: str) -> None:
    torch.manual_seed(0)
    module, x = mlp().eval(), torch.randn(2, 5, 16)
    captured = capture_module(module, (x,))
    regions = find_regions(captured).regions
    append_statistics(captured, regions, [get("pop")] * len(regions), scope)
    captured.gm.graph.lint()
    hidden = []
    module.c.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    expected = module(x)
    y, sums = assert_meta_is_true(captured.gm, module, x)
    torch.testing.assert_close(y, expected)
    dims = (0, 1) if scope == "batch" else (1,)
    total = hidden[0].detach().double().square().sum(dims).view(-1, 40)
    assert sums.dtype == torch.float64
    torch.testing.assert_close(sums, total)


def test_heads_that_left_the_cache_count_for_nothing() -> None:
    """``popc_keep`` zeroes a cached region's h before it is read, and before it is summed."""
    torch.manual_seed(0)
    module, x = models.CachedAttention().eval(), torch.randn(1, 5, 16)
    captured = capture_module(module, (x,))
    (region,) = find_regions(captured).regions
    assert (region.kind, region.units, region.cached) == ("attention", 4, True)
    append_statistics(captured, [region], [get("pop")], "batch")
    keep = torch.ones(1, 16)
    keep[:, region.columns[1]] = 0
    y, k, v, sums = assert_meta_is_true(captured.gm, module, x, keep)
    torch.testing.assert_close(y, module(x, keep)[0].detach())
    torch.testing.assert_close((k, v), module(x)[1:])
    assert (sums[0, region.columns[1]] == 0).all()
    assert (sums[0, region.columns[0]] > 0).all()

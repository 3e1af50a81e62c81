"""The prefill pass alone: outputs unchanged, one more, which is the statistic."""

from __future__ import annotations

import pytest
import torch

from popc.analysis.capture import capture_module
from popc.analysis.regions import find_regions
from popc.passes.prefill import add_statistics
from tests import models
from tests.passes.checks import assert_meta_is_true


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("mlp", [models.Gated, models.Plain, models.Scaled])
def test_adds_the_sum_of_squares(mlp: type, scope: str) -> None:
    torch.manual_seed(0)
    module, x = mlp().eval(), torch.randn(2, 5, 16)
    captured = capture_module(module, (x,))
    regions = find_regions(captured).regions
    add_statistics(captured, regions, scope)
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

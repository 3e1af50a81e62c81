"""What is measured of linears' inputs, and the thresholds that a budget makes of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from popc.budget import LEAST, Budget, Demand, allocate
from popc.ops import centers, measure_inputs, sum_squares
from popc.ops.measure import BINS, SAMPLE, _centers, _histogram, _measure_inputs, _sum_squares


def measured(x: Tensor, norm: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Moments and histogram of all tokens of x ``[S, T, K]``."""
    known = torch.zeros(len(x), 2 * x.shape[-1] + 1, dtype=torch.float64)
    return measure_inputs(x, torch.ones(x.shape[-1]) if norm is None else norm, None, known)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokens", [37, 3 * SAMPLE + 5])
def test_measuring_is_the_reference(dtype: torch.dtype, tokens: int) -> None:
    x, norm = torch.randn(2, tokens, 50).to(dtype), torch.rand(50)
    x[0, 3], x[1, 4, 7] = 0.0, float("inf")
    valid = torch.rand(2, tokens) > 0.3
    valid[1, 4] = True
    x[0, 5], valid[0, 5] = float("nan"), False
    known = torch.zeros(2, 101, dtype=torch.float64)
    known[1] = measured(torch.randn(1, 9, 50) + 1)[0]
    for mask in (None, valid):
        moments, got = measure_inputs(x, norm, mask, known)
        expected, _ = _measure_inputs(x, norm, mask, known)
        torch.testing.assert_close(moments, expected, rtol=1e-5, atol=1e-4, equal_nan=True)
        torch.testing.assert_close(centers(moments), _centers(moments), equal_nan=True)
        counts = torch.ones(2, tokens, dtype=torch.bool) if mask is None else mask
        counted = _histogram(x, norm, centers(moments), counts)
        assert torch.equal(got[:, :BINS], counted[:, :BINS])
        torch.testing.assert_close(got[:, BINS], counted[:, BINS], rtol=1e-5, atol=1e-4)
        sums = sum_squares(x, mask)
        torch.testing.assert_close(sums, _sum_squares(x, mask), equal_nan=True)
    assert sum_squares(x, valid)[0].isfinite().all()
    found = valid.sum(1)
    every = (found // SAMPLE).clamp(min=1)
    assert got[:, :BINS].sum(1).tolist() == (found // every * every * 50).tolist()


def test_of_a_long_prompt_each_nth_token_is_counted() -> None:
    x = torch.randn(1, 4 * SAMPLE + 2, 8)
    x[:, 3::4] = 0.0
    moments, histogram = measured(x)
    assert histogram[0, 0] == 4 * SAMPLE * 8  # all that is counted is 0
    assert moments[0, -1] == len(x[0])
    torch.testing.assert_close(moments[0, :8], x[0].double().sum(0), rtol=1e-5, atol=1e-4)
    assert measured(x[:, : 2 * SAMPLE - 1])[1][0, 1:BINS].sum() > 0  # of fewer, each


def test_centers_are_means_of_what_is_steady() -> None:
    x = torch.randn(1, 400, 3)
    x[..., 1] += 2.0
    x[:, 7, 2] = 1e3  # one outsized token lifts a mean to 2.5
    found = centers(measured(x)[0])
    assert found[0, [0, 2]].tolist() == [0.0, 0.0]
    assert float(found[0, 1]) == pytest.approx(float(x[..., 1].mean()), rel=1e-5)
    for token in x[0]:  # one has no variance
        assert centers(measured(token[None, None])[0]).tolist() == [[0.0] * 3]
    x[0, 0, 1] = float("nan")
    assert centers(measured(x)[0])[0, 1] == 0.0


def test_thresholds_are_quantiles() -> None:
    make = torch.Generator().manual_seed(0)
    x = [torch.randn(1, 300, 64, generator=make), torch.randn(1, 300, 128, generator=make) ** 3]
    norms = [torch.rand(value.shape[-1], generator=make) for value in x]
    histograms = torch.cat([measured(value, norm)[1] for value, norm in zip(x, norms, strict=True)])
    demands = [Demand(64, 1000, "a"), Demand(128, 3000, "b")]
    for share in (0.2, 0.5, 0.8):
        found = allocate(histograms, demands, Budget(share))
        assert float(found.shares @ torch.tensor([0.25, 0.75]).double()) == pytest.approx(share)
        assert found.shares[0] > found.shares[1]  # whose input is the more concentrated
        lost = []
        for value, norm, limit, own in zip(x, norms, found.thresholds, found.shares, strict=True):
            scores = (value * norm).abs()
            assert float((scores > limit).float().mean()) == pytest.approx(float(own), abs=0.01)
            squared = scores.double().square()
            typical = squared.sum(-1).log().mean().exp()
            lost.append(float(squared[scores <= limit].sum() / 300 / typical))
        assert lost == pytest.approx([found.error] * 2, rel=0.1)
    tight = allocate(histograms, demands, Budget(0.9, error=0.9, least=0.4))
    assert float(tight.shares @ torch.tensor([0.25, 0.75]).double()) == pytest.approx(0.4)
    unseen = allocate(torch.zeros_like(histograms), demands, Budget(0.5))
    assert unseen.thresholds.isfinite().all() and unseen.shares.min() >= LEAST
    assert not math.isnan(unseen.error)

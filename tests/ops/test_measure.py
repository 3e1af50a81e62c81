"""What is measured of linears' inputs, and the thresholds that a budget makes of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from popc.ops import centers, measure_inputs, sum_squares
from popc.ops.measure import BINS, SAMPLE, _centers, _measure_inputs, _sum_squares, _times
from popc.policies.allocation import MIN_SHARE, Budget, GroupSpec, allocate


def nothing_known(sequences: int, width: int) -> Tensor:
    """Moments before a prompt."""
    return torch.zeros(sequences, 2 * width + 1, dtype=torch.float64)


def measured(x: Tensor, norm: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Moments and histogram of all tokens of x ``[B, T, K]``, each sequence for itself."""
    known = nothing_known(len(x), x.shape[-1])
    return measure_inputs(x, torch.ones(x.shape[-1]) if norm is None else norm, None, known)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokens", [37, 6 * SAMPLE + 5])
@pytest.mark.parametrize("together", [True, False])
def test_measuring_is_the_reference(dtype: torch.dtype, tokens: int, together: bool) -> None:
    x, norm = (torch.randn(2, tokens, 50) + torch.randn(50)).to(dtype), torch.rand(50)
    x[0, 3], x[1, 30, 7] = 0.0, float("inf")
    valid = torch.rand(2, tokens) > 0.3
    valid[1, 30] = True
    x[0, 5], valid[0, 5] = float("nan"), False
    known = nothing_known(2, 50)
    known[1] = measured(torch.randn(1, 9, 50) + 1)[0]
    known = known.sum(0, keepdim=True) if together else known
    for mask in (None, valid):
        moments, got = measure_inputs(x, norm, mask, known)
        expected, counted = _measure_inputs(x, norm, mask, known)
        torch.testing.assert_close(moments, expected, rtol=1e-5, atol=1e-4, equal_nan=True)
        torch.testing.assert_close(centers(moments), _centers(moments), equal_nan=True)
        assert moved(got, counted) <= 6  # rounding may put a score into the next bin
        torch.testing.assert_close(got[:, BINS], counted[:, BINS], rtol=1e-5, atol=1e-4)
        sums = sum_squares(x, mask)
        torch.testing.assert_close(sums, _sum_squares(x, mask), equal_nan=True)
    assert sum_squares(x, valid)[0].isfinite().all()


def moved(histogram: Tensor, other: Tensor) -> float:
    """How many scores fell into another bin, at most, if into the next."""
    return float((histogram[:, :BINS].cumsum(1) - other[:, :BINS].cumsum(1)).abs().max())


@pytest.mark.parametrize("together", [True, False])
def test_a_token_is_scored_by_those_before_it(together: bool) -> None:
    """Token by token, with the public ops alone."""
    x, norm = torch.randn(3, 40, 8) + torch.randn(8), torch.rand(8)
    known = nothing_known(1 if together else 3, 8)
    _, got = measure_inputs(x, norm, None, known)
    expected = torch.zeros_like(got)
    for t in range(40):
        scores = ((x[:, t] - centers(known)) * norm).square()  # [B, K]
        for at, row in zip([0] * 3 if together else range(3), scores, strict=True):
            bits = (row.view(torch.int32) >> 21).long()
            expected[at].index_add_(0, bits, torch.ones(8, dtype=torch.float64))
            expected[at, BINS] += row.sum().double().log()
        known, _ = measure_inputs(x[:, t : t + 1], norm, None, known)
    assert moved(got, expected) <= 2
    torch.testing.assert_close(got[:, BINS], expected[:, BINS], rtol=1e-5, atol=1e-4)


def test_of_many_tokens_some_count_for_others() -> None:
    """Each of the first, then half as many each time that their number doubles."""
    times = _times(torch.arange(64 * SAMPLE))
    assert times[:SAMPLE].tolist() == [1] * SAMPLE
    for doubling in range(6):
        sampled = times[SAMPLE << doubling : 2 * SAMPLE << doubling]
        assert sampled.unique().tolist() == [0, 2 << doubling]
        assert int(sampled.sum()) == len(sampled)
    for batch in (2, 3, 4, 8):  # no sequence of a batch is left out, none is preferred
        whole = times[: len(times) // batch * batch].view(-1, batch)
        shares = whole.sum(0) / whole.sum()
        assert (shares - 1 / batch).abs().max() < 0.2 / batch
    x = torch.randn(1, 6 * SAMPLE, 8)
    x[:, times[: 6 * SAMPLE] == 0] = 3e38
    _, histogram = measured(x)
    assert histogram[0, :BINS].sum() == 6 * SAMPLE * 8
    assert histogram[0, BINS].isfinite()


def test_centers_are_means_of_what_is_steady() -> None:
    x = torch.randn(1, 400, 3)
    x[..., 1] += 2.0
    x[:, 7, 2] = 1e3  # one outsized token lifts a mean to 2.5
    means = centers(measured(x)[0])
    assert means[0, [0, 2]].tolist() == [0.0, 0.0]
    assert float(means[0, 1]) == pytest.approx(float(x[..., 1].mean()), rel=1e-5)
    for token in x[0]:  # one has no variance
        assert centers(measured(token[None, None])[0]).tolist() == [[0.0] * 3]
    few = torch.tensor([1.0, 4.0, 1.0, 4.0])[None, :, None]
    assert centers(measured(few[:, :2])[0]).tolist() == [[0.0]]  # of two, a mean may be chance
    assert centers(measured(few)[0]).tolist() == [[2.5]]
    x[0, 0, 1] = float("nan")
    assert centers(measured(x)[0])[0, 1] == 0.0


def test_thresholds_are_quantiles() -> None:
    make = torch.Generator().manual_seed(0)
    x = [torch.randn(1, 300, 64, generator=make), torch.randn(1, 300, 128, generator=make) ** 3]
    norms = [torch.rand(value.shape[-1], generator=make) for value in x]
    histograms = torch.cat([measured(value, norm)[1] for value, norm in zip(x, norms, strict=True)])
    demands = [GroupSpec(64, 1000, "a"), GroupSpec(128, 3000, "b")]
    for share in (0.2, 0.5, 0.8):
        result = allocate(histograms, demands, Budget(share))
        assert float(result.shares @ torch.tensor([0.25, 0.75]).double()) == pytest.approx(share)
        assert result.shares[0] > result.shares[1]  # whose input is the more concentrated
        lost = []
        for value, norm, limit, active in zip(
            x, norms, result.thresholds, result.shares, strict=True
        ):
            scores = (value * norm).abs()
            assert float((scores > limit).float().mean()) == pytest.approx(float(active), abs=0.01)
            squared = scores.double().square()
            typical = squared.sum(-1).log().mean().exp()
            lost.append(float(squared[scores <= limit].sum() / 300 / typical))
        assert lost == pytest.approx([result.error] * 2, rel=0.1)
    tight = allocate(histograms, demands, Budget(0.9, error=0.9, least=0.4))
    assert float(tight.shares @ torch.tensor([0.25, 0.75]).double()) == pytest.approx(0.4)
    unseen = allocate(torch.zeros_like(histograms), demands, Budget(0.5))
    assert unseen.thresholds.isfinite().all() and unseen.shares.min() >= MIN_SHARE
    assert not math.isnan(unseen.error)

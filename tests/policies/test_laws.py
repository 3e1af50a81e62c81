"""What partitions, choices and statistics must always be, on tensors alone."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import popc
from popc import ops
from popc.ops.measure import BINS, SAMPLE
from popc.policies import Counts
from popc.sessions.units import RegionState, split
from tests.helpers.profiles import examples

SHARES = st.floats(0, 0.95)
VALUES = st.floats(0, 4, width=16) | st.sampled_from([0.0, 1.0, math.nan, math.inf])


@st.composite
def measured(draw: st.DrawFn) -> tuple[RegionState, Tensor]:
    """A region of 2 to 12 units, and sums of squares with ties, NaN and infinities."""
    units, each = draw(st.integers(2, 12)), draw(st.integers(1, 3))
    sequences = draw(st.integers(1, 3))
    width = units * each
    config = popc.Config(policy="pop", sparsity=draw(SHARES), candidate=draw(st.floats(0, 1)))
    rows = st.lists(VALUES, min_size=width, max_size=width)
    sums = draw(st.lists(rows, min_size=sequences, max_size=sequences))
    norm = draw(st.lists(st.floats(0, 2, width=16), min_size=units, max_size=units))
    order = draw(st.permutations(range(width)))
    region = RegionState(
        key=("a region",),
        columns=torch.tensor(order).view(units, each),
        width=width,
        experts=0,
        counts=config.counts(units),
        norm=torch.tensor(norm, dtype=torch.float32),
        cached=False,
        one_pass=False,
        policy=config.unit_policy("mlp"),
    )
    return region, torch.tensor(sums, dtype=torch.float64)


@given(st.integers(1, 4096), SHARES, st.floats(0, 1), st.floats(0, 1))
@examples(300, 3000)
def test_counts_are_a_partition(units: int, sparsity: float, first: float, second: float) -> None:
    narrow, wide = sorted((first, second))

    def counts(candidate: float) -> Counts:
        return popc.Config(policy="pop", sparsity=sparsity, candidate=candidate).counts(units)

    small, large = counts(narrow), counts(wide)
    for cut in (small, large):
        assert 0 <= cut.retained <= cut.active <= cut.live <= units
        assert cut.active == max(1, round((1 - sparsity) * units))
    assert large.retained <= small.retained and large.live >= small.live


@given(measured())
@examples(300, 4000)
def test_partition_has_each_unit_once(case: tuple[RegionState, Tensor]) -> None:
    region, sums = case
    index, norm = split(sums, region)
    counts = region.counts
    assert index.shape == norm.shape == (len(sums), counts.live)
    for row in index.tolist():
        assert len(set(row)) == len(row) and set(row) <= set(range(len(region.columns)))
        retained, candidate = row[: counts.retained], row[counts.retained :]
        assert retained == sorted(retained) and candidate == sorted(candidate)


@given(measured())
@examples(300, 4000)
def test_partition_goes_by_rank(case: tuple[RegionState, Tensor]) -> None:
    """Of equal units the lower one ranks first, and NaN ranks as nothing."""
    region, sums = case
    index, _ = split(sums, region)
    for row, total in zip(index.tolist(), sums, strict=True):
        score = [
            math.sqrt(float(total[columns].sum())) * float(weight)
            for columns, weight in zip(region.columns, region.norm, strict=True)
        ]
        score = [0.0 if math.isnan(value) else value for value in score]
        expected = sorted(range(len(score)), key=lambda unit: (-score[unit], unit))
        retained, live = region.counts.retained, region.counts.live
        assert set(row[:retained]) == set(expected[:retained])
        assert set(row[retained:]) == set(expected[retained:live])


@given(measured(), st.randoms(use_true_random=False))
@examples(200, 3000)
def test_a_permutation_of_units_permutes_the_partition(
    case: tuple[RegionState, Tensor], shuffle
) -> None:
    region, sums = case
    sums = sums.nan_to_num(nan=0.0, posinf=9.0) + torch.rand(sums.shape[1]).double()  # no ties
    order = list(range(len(region.columns)))
    shuffle.shuffle(order)
    turned = replace(region, columns=region.columns[order], norm=region.norm[order] + 0.0)
    index, _ = split(sums, replace(region, norm=region.norm + 0.5))
    again, _ = split(sums, replace(turned, norm=turned.norm + 0.5))
    place = torch.tensor(order)
    for row, other in zip(index, again, strict=True):
        retained = region.counts.retained
        assert set(row[:retained].tolist()) == set(place[other[:retained]].tolist())
        assert set(row.tolist()) == set(place[other].tolist())


@st.composite
def chosen(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """One token's h of 3 to 24 units, norms, and how many are active; seeded, so rarely equal."""
    units = draw(st.integers(3, 24))
    made = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    h = torch.randn(1, 1, units, generator=made)
    h *= 10 ** draw(st.floats(-3, 3))
    if draw(st.booleans()):
        h[..., draw(st.integers(0, units - 1))] = 0.0
    return h, torch.rand(units, generator=made), draw(st.integers(1, units))


@given(chosen(), st.data())
@examples(300, 4000)
def test_active_is_always_k(case: tuple[Tensor, Tensor, int], data: st.DataObject) -> None:
    """R stays, exactly k units are active, and none of the others scores more."""
    h, norm, active = case
    units = len(norm)
    retained = data.draw(st.integers(0, active), label="retained")
    live = data.draw(st.integers(active, units), label="live")
    listed = torch.randperm(units, generator=torch.Generator().manual_seed(units))[:live]
    columns = ops.select_units(h, norm[listed], listed[:, None], retained, active)
    assert columns.shape == (active,) and len(set(columns.tolist())) == active
    assert set(listed[:retained].tolist()) <= set(columns.tolist()) <= set(listed.tolist())
    score = (h[0, 0].abs() * norm).tolist()
    kept = [score[c] for c in columns.tolist() if c not in listed[:retained].tolist()]
    left = [score[c] for c in listed.tolist() if c not in columns.tolist()]
    assert not kept or not left or min(kept) >= max(left)


@given(chosen(), SHARES, st.floats(0, 1), st.floats(0, 1))
@examples(300, 3000)
def test_more_candidates_never_keep_less(
    case: tuple[Tensor, Tensor, int], sparsity: float, first: float, second: float
) -> None:
    h, norm, _ = case
    units = len(norm)
    rank = torch.randperm(units, generator=torch.Generator().manual_seed(units))

    def mass(candidate: float) -> float:
        counts = popc.Config(policy="pop", sparsity=sparsity, candidate=candidate).counts(units)
        listed = rank[: counts.live]
        lists = listed[:, None]
        kept = ops.select_units(h, norm[listed], lists, counts.retained, counts.active)
        return float((h[0, 0].abs() * norm)[kept].double().sum())

    narrow, wide = sorted((first, second))
    assert mass(wide) >= mass(narrow) * (1 - 1e-6)


@st.composite
def chunked(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[int]]:
    """x ``[B, T, K]`` with means of its own, a mask of padding, and where to cut its tokens."""
    batch, width = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    length = draw(st.integers(1, 40) | st.integers(SAMPLE, 3 * SAMPLE))
    made = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    x = torch.randn(batch, length, width, generator=made) + torch.randn(width, generator=made)
    x = x.double() if draw(st.booleans()) else x
    valid = torch.rand(batch, length, generator=made) > 0.4
    x[~valid] = math.nan  # padding may hold anything
    cuts = draw(st.lists(st.integers(0, length), max_size=6))
    return x, valid, [*sorted(cuts), length]


@given(chunked(), st.booleans())
@examples(200, 3000)
def test_statistics_are_the_same_in_any_chunks(
    case: tuple[Tensor, Tensor, list[int]], together: bool
) -> None:
    """And leave padding out. A score may be rounded into the next bin."""
    x, valid, cuts = case
    batch, length, width = x.shape
    norm = torch.rand(width, generator=torch.Generator().manual_seed(width))
    known = torch.zeros(1 if together else batch, 2 * width + 1, dtype=torch.float64)
    squares, (moments, histogram) = (
        ops.sum_squares(x, valid),
        ops.measure_inputs(x, norm, valid, known),
    )
    sums, counted, at = torch.zeros_like(squares), torch.zeros_like(histogram), 0
    for cut in cuts:
        part, marks = x[:, at:cut].contiguous(), valid[:, at:cut].contiguous()
        sums += ops.sum_squares(part, marks)
        known, measured = ops.measure_inputs(part, norm, marks, known)
        counted, at = counted + measured, cut
    torch.testing.assert_close(sums, squares, rtol=1e-9, atol=1e-5)
    torch.testing.assert_close(known, moments, rtol=1e-6, atol=1e-4)
    moved = (counted[:, :BINS].cumsum(1) - histogram[:, :BINS].cumsum(1)).abs().max()
    assert moved <= 2 * max(1, batch * length // SAMPLE)
    torch.testing.assert_close(counted[:, BINS], histogram[:, BINS], rtol=1e-4, atol=1e-3)
    real = x.where(valid[..., None], 0.0).double()
    torch.testing.assert_close(squares, real.square().sum(1), rtol=1e-6, atol=1e-6)
    total = real.sum(1).sum(0, keepdim=True) if together else real.sum(1)
    torch.testing.assert_close(moments[:, :width], total, rtol=1e-6, atol=1e-4)
    assert moments[:, -1].tolist() == ([int(valid.sum())] if together else valid.sum(1).tolist())


@given(st.integers(1, 4), st.integers(1, 24), st.integers(1, 9), st.integers(0, 2**16))
@examples(200, 2000)
def test_a_threshold_reads_what_exceeds_it(batch: int, width: int, outputs: int, seed: int) -> None:
    """Each token by itself, and a NaN or an infinity as the dense linear has it."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 1, width, generator=made)
    weight, norm = torch.randn(outputs, width, generator=made), torch.rand(width, generator=made)
    limit = torch.rand(1, generator=made)
    y = ops.threshold_linear(x, weight, None, norm, limit, 0)
    kept = x * (x.abs() * norm > limit)
    torch.testing.assert_close(y, kept @ weight.T, rtol=1e-4, atol=1e-5)
    alone = [ops.threshold_linear(row[None], weight, None, norm, limit, 0) for row in x]
    torch.testing.assert_close(torch.cat(alone), y, rtol=1e-5, atol=1e-6)
    x[0, 0, seed % width] = math.nan
    assert ops.threshold_linear(x, weight, None, norm, limit, 0)[0].isnan().all()

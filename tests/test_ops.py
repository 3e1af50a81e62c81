"""The ops against what they mean, written out in dense algebra."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from popc.ops import gather_linear, gather_matmul, select_candidates

CHECKS = ("test_schema", "test_faketensor")


def lists(batch: int | None, size: int = 20, n: int = 7) -> torch.Tensor:
    rows = [torch.randperm(size)[:n] for _ in range(batch or 1)]
    return torch.stack(rows) if batch else rows[0]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("channel_dim", [0, 1])
@pytest.mark.parametrize("batch", [None, 3])
def test_gather_linear(batch: int | None, channel_dim: int, bias: bool) -> None:
    torch.manual_seed(0)
    x, weight, index = torch.randn(3, 1, 5), torch.randn(20, 5), lists(batch)
    b = torch.randn(20) if bias else None
    dense = torch.nn.functional.linear(x, weight, b)
    expected = torch.stack(
        [dense[i][:, index if batch is None else index[i]] for i in range(len(x))]
    )
    held = weight if channel_dim == 0 else weight.t().contiguous()
    args = (x, held, b, index, channel_dim)
    torch.testing.assert_close(gather_linear(*args), expected)
    opcheck(gather_linear, args, test_utils=CHECKS)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("channel_dim", [0, 1])
@pytest.mark.parametrize("batch", [None, 3])
def test_gather_matmul(batch: int | None, channel_dim: int, bias: bool) -> None:
    torch.manual_seed(0)
    h, weight, index = torch.randn(3, 1, 7), torch.randn(5, 20), lists(batch)
    b = torch.randn(5) if bias else None
    full = torch.zeros(3, 1, 20)
    for i in range(3):
        full[i][:, index if batch is None else index[i]] = h[i]
    expected = torch.nn.functional.linear(full, weight, b)
    held = weight if channel_dim == 1 else weight.t().contiguous()
    args = (h, held, b, index, channel_dim)
    torch.testing.assert_close(gather_matmul(*args), expected)
    opcheck(gather_matmul, args, test_utils=CHECKS)


@given(st.integers(1, 12), st.data())
def test_select_keeps_the_retained_and_the_best(n: int, data: st.DataObject) -> None:
    retained = data.draw(st.integers(0, n))
    active = data.draw(st.integers(retained, n))
    # Small integers: many ties.
    values = data.draw(st.lists(st.integers(-3, 3), min_size=n, max_size=n))
    h, norm = torch.tensor(values).float().view(1, 1, n), torch.ones(n)
    index = torch.arange(n) * 2
    kept, channels = select_candidates(h, norm, index, retained, active)
    place = (channels // 2).tolist()
    assert place[:retained] == list(range(retained))
    assert place == sorted(set(place))
    assert len(place) == active
    assert kept.flatten().tolist() == [values[p] for p in place]
    scores = {p: (abs(values[p]), -p) for p in range(retained, n)}
    chosen, left = set(place[retained:]), set(scores) - set(place)
    assert all(scores[a] > scores[b] for a in chosen for b in left)


@pytest.mark.parametrize("batch", [None, 2])
def test_select_scores_the_batch_or_each_sequence(batch: int | None) -> None:
    h = torch.tensor([[[1.0, 5, 0, 3]], [[1.0, 0, 4, 3]]])
    index, norm = torch.tensor([10, 11, 12, 13]), torch.tensor([1.0, 1, 1, 2])
    if batch:
        index, norm = index.expand(2, 4), norm.expand(2, 4)
    args = (h, norm, index, 1, 2)
    kept, channels = select_candidates(*args)
    expected = [10, 13] if batch is None else [[10, 13], [10, 13]]
    assert channels.tolist() == expected
    assert kept.flatten().tolist() == [1, 3, 1, 3]
    args = (h, torch.ones_like(norm), index, 1, 2)
    kept, channels = select_candidates(*args)
    assert channels.tolist() == ([10, 11] if batch is None else [[10, 11], [10, 12]])
    opcheck(select_candidates, args, test_utils=CHECKS)


def test_select_does_not_hide_nan() -> None:
    h = torch.tensor([[[1.0, 9.0, float("nan")]]])
    kept, channels = select_candidates(h, torch.ones(3), torch.arange(3), 1, 2)
    assert channels.tolist() == [0, 2]
    assert kept.isnan().any()

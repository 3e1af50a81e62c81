"""The ops against what they mean, written out in dense algebra."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck
from torch.nn.functional import linear

from popc.ops import gather_experts, gather_linear, select_units

CHECKS = ("test_schema", "test_faketensor")


def lists(batch: int | None, size: int, n: int) -> torch.Tensor:
    rows = [torch.randperm(size)[:n] for _ in range(batch or 1)]
    return torch.stack(rows) if batch else rows[0]


def kept(index: torch.Tensor | None, size: int, batch: int) -> torch.Tensor:
    """1 for each listed channel, ``[B, size]``; all 1 without a list."""
    if index is None:
        return torch.ones(batch, size)
    return torch.zeros(batch, size).scatter_(1, index.expand(batch, index.shape[-1]), 1.0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("out_dim", [0, 1])
@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize(("rows", "columns"), [(7, None), (None, 3), (7, 3)])
def test_gather_linear_is_the_masked_linear(rows, columns, batch, out_dim, bias) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 1, 5), torch.randn(20, 5)
    b = torch.randn(20) if bias else None
    r = None if rows is None else lists(batch, 20, rows)
    c = None if columns is None else lists(batch, 5, columns)
    expected = linear(x * kept(c, 5, 3)[:, None], weight, b) * kept(r, 20, 3)[:, None]
    weights = weight if out_dim == 0 else weight.t().contiguous()
    args = (x, weights, b, r, c, out_dim)
    torch.testing.assert_close(gather_linear(*args), expected)
    opcheck(gather_linear, args, test_utils=CHECKS)


@pytest.mark.parametrize("out_dim", [0, 1])
@pytest.mark.parametrize(("rows", "columns"), [(7, None), (None, 3), (7, 3)])
def test_gather_experts_is_the_masked_linear_of_each_row(rows, columns, out_dim) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(6, 5), torch.randn(4, 20, 5)
    expert, full = torch.tensor([0, 3, 3, 1, 0, 2]), torch.tensor([0, 1, 0, 0])
    r = None if rows is None else lists(4, 20, rows)
    c = None if columns is None else lists(6, 5, columns)
    expected = []
    for s, e in enumerate(expert.tolist()):
        keep_rows = torch.ones(20) if r is None or full[e] else kept(r[e], 20, 1)[0]
        keep_columns = torch.ones(5) if c is None or full[e] else kept(c[s], 5, 1)[0]
        expected.append(linear(x[s] * keep_columns, weight[e]) * keep_rows)
    weights = weight if out_dim == 0 else weight.mT.contiguous()
    args = (x, weights, expert, full, r, c, out_dim)
    torch.testing.assert_close(gather_experts(*args), torch.stack(expected))
    opcheck(gather_experts, args, test_utils=CHECKS)


def test_no_row_for_any_expert() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    args = (torch.randn(0, 5), torch.randn(4, 20, 5), none, torch.zeros(4), None, None, 0)
    assert gather_experts(*args).shape == (0, 20)


@given(st.integers(1, 12), st.data())
def test_select_keeps_the_retained_and_the_best(n: int, data: st.DataObject) -> None:
    retained = data.draw(st.integers(0, n))
    active = data.draw(st.integers(retained, n))
    # Small integers: many ties.
    values = data.draw(st.lists(st.integers(-3, 3), min_size=2 * n, max_size=2 * n))
    h, norm = torch.tensor(values).float().view(1, 1, 2 * n), torch.ones(n)
    columns = torch.arange(n)[:, None]
    place = (select_units(h, norm, columns * 2, retained, active) // 2).tolist()
    assert place[:retained] == list(range(retained))
    assert place == sorted(set(place))
    assert len(place) == active
    scores = {p: (abs(values[2 * p]), -p) for p in range(retained, n)}
    chosen, left = set(place[retained:]), set(scores) - set(place)
    assert all(scores[a] > scores[b] for a in chosen for b in left)


def test_a_unit_is_scored_on_all_its_columns() -> None:
    h = torch.tensor([[[3.0, 0, 2, 2, 1, 4]]])  # norms 3, sqrt(8), sqrt(17)
    columns = torch.tensor([[0, 1], [2, 3], [4, 5]])
    chosen = select_units(h, torch.tensor([1.0, 2.0, 1.0]), columns, 0, 1)
    assert chosen.tolist() == [2, 3]
    chosen = select_units(h, torch.ones(3), columns, 0, 2)
    assert chosen.tolist() == [0, 1, 4, 5]


@pytest.mark.parametrize("batch", [None, 2])
def test_select_scores_the_batch_or_each_sequence(batch: int | None) -> None:
    h = torch.tensor([[[1.0, 5, 0, 3]], [[1.0, 0, 4, 3]]])
    columns, norm = torch.arange(4)[:, None], torch.tensor([1.0, 1, 1, 2])
    if batch:
        columns, norm = columns.expand(2, 4, 1), norm.expand(2, 4)
    chosen = select_units(h, norm, columns, 1, 2)
    assert chosen.tolist() == ([0, 3] if batch is None else [[0, 3], [0, 3]])
    args = (h, torch.ones_like(norm), columns, 1, 2)
    assert select_units(*args).tolist() == ([0, 1] if batch is None else [[0, 1], [0, 2]])
    opcheck(select_units, args, test_utils=CHECKS)


def test_select_does_not_hide_nan() -> None:
    h = torch.tensor([[[1.0, 9.0, float("nan")]]])
    assert select_units(h, torch.ones(3), torch.arange(3)[:, None], 1, 2).tolist() == [0, 2]

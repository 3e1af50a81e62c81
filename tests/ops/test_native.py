"""The C++ kernels against the reference in float64: every list, layout, dtype and batch."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from popc import compat
from popc.ops import gather_experts, gather_linear, native, select_units

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# Widths: of whole vectors, with a rest, and less than one; large enough for several threads.
SIZES = [(257, 521), (64, 128), (5, 3), (1, 40), (40, 1)]


pytestmark = pytest.mark.usefixtures("kernels_in_threads")


def reference(x, weight, bias, rows, columns, out_dim) -> Tensor:
    wide = (None if t is None else t.double() for t in (x, weight, bias))
    return torch.ops.popc.gather_linear_reference(*wide, rows, columns, out_dim)


def listed(kind: str, size: int, batch: int) -> Tensor | None:
    n = (size + 1) // 2
    if kind == "none":
        return None
    if kind == "one":
        return torch.randperm(size)[:n]
    return torch.stack([torch.randperm(size)[:n] for _ in range(batch)])


def stored(weight: Tensor, turned: bool) -> Tensor:
    return weight.mT.contiguous().mT if turned else weight


def close(y: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    scale = float(expected.abs().max()) + 1e-6
    torch.testing.assert_close(y.double(), expected, atol=DTYPES[dtype] * scale, rtol=0)


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8, 11])
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_linear(dtype, turned, tokens, batch) -> None:
    torch.manual_seed(0)
    for outputs, inputs in SIZES if tokens == 1 else SIZES[:2]:
        x = torch.randn(batch, tokens, inputs).to(dtype)
        weight = stored(torch.randn(outputs, inputs).to(dtype), turned)
        for bias in (None, torch.randn(outputs).to(dtype)):
            for row_kind in ("none", "one", "each"):
                for column_kind in ("none", "one", "each"):
                    rows = listed(row_kind, outputs, batch)
                    columns = listed(column_kind, inputs, batch)
                    args = (x, weight, bias, rows, columns, 0)
                    y, expected = gather_linear(*args), reference(*args)
                    assert y.shape == expected.shape and y.dtype == dtype
                    close(y, expected, dtype)
                    if rows is not None:
                        out = torch.ones(batch, outputs, dtype=torch.bool)
                        out = out.scatter_(1, rows.expand(batch, -1), False)
                        assert not y.masked_select(out[:, None]).any()
                    close(gather_linear(x, weight.t(), bias, rows, columns, 1), expected, dtype)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_experts(dtype, turned) -> None:
    torch.manual_seed(0)
    x = torch.randn(13, 70).to(dtype)
    weight = stored(torch.randn(4, 90, 70).to(dtype), turned)
    expert = torch.tensor([0] * 10 + [3, 1, 3])  # more neighbours than one reading serves
    full = torch.tensor([0, 1, 0, 0])
    for rows in (None, listed("each", 90, 4)):
        for columns in (None, listed("each", 70, 13)):
            y = gather_experts(x, weight, expert, full, rows, columns, 0)
            for s, e in enumerate(expert.tolist()):
                r = None if rows is None or full[e] else rows[e]
                c = None if columns is None or full[e] else columns[s]
                close(y[s], reference(x[s], weight[e], None, r, c, 0), dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_select_units_is_the_reference(dtype) -> None:
    torch.manual_seed(0)
    for batch, tokens, m in ((1, 1, 1), (4, 1, 1), (2, 3, 2)):
        units = 50
        h = torch.randint(-4, 5, (batch, tokens, units * m)).to(dtype)  # many ties
        columns = torch.randperm(units * m).view(units, m)
        norm = torch.randint(1, 3, (units,)).float()
        for active in (20, 33, 50):
            asked = (h, norm, columns, 20, active)
            expected = torch.ops.popc.select_units_reference(*asked)
            assert torch.equal(select_units(*asked), expected)
            each = (h, norm.expand(batch, -1), columns.expand(batch, -1, -1), 20, active)
            expected = torch.ops.popc.select_units_reference(*each)
            assert torch.equal(select_units(*each), expected)


def test_nan_is_chosen_first_and_shown() -> None:
    h, norm, columns = torch.arange(10.0)[None, None], torch.ones(10), torch.arange(10)[:, None]
    h[..., 4] = torch.nan
    chosen = select_units(h, norm, columns, 0, 2)
    assert chosen.tolist() == [4, 9]
    assert gather_linear(h, torch.ones(3, 10), None, None, chosen, 0).isnan().all()
    weight = stored(torch.ones(3, 10), True)
    assert not gather_linear(h, weight, None, None, chosen[1:], 0).isnan().any()


def test_bfloat16_sums_are_float32() -> None:
    """4096 ones and small parts: in bfloat16 the sum would stop at 256."""
    x, weight = torch.ones(1, 4096).bfloat16(), torch.ones(2, 4096).bfloat16()
    for strided in (weight, stored(weight, True)):
        columns = torch.arange(4096)
        assert gather_linear(x, strided, None, None, columns, 0).tolist() == [[4096.0, 4096.0]]


def test_the_answer_is_the_same_every_time() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 1, 512), stored(torch.randn(300, 512), True)
    columns = torch.randperm(512)[:300]
    first = gather_linear(x, weight, None, None, columns, 0)
    assert all(torch.equal(first, gather_linear(x, weight, None, None, columns, 0)) for _ in "abc")


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_channel_that_is_listed_twice(dtype, turned, tokens) -> None:
    """Rows count once, whichever threads they fall to; columns twice, as the reference has it."""
    torch.manual_seed(0)
    x = torch.randn(2, tokens, 521).to(dtype)
    weight, bias = stored(torch.randn(257, 521).to(dtype), turned), torch.randn(257).to(dtype)
    rows, columns = torch.randint(257, (700,)), torch.randint(521, (300,))
    y = gather_linear(x, weight, bias, rows, None, 0)
    close(y, reference(x, weight, bias, rows, None, 0), dtype)
    torch.testing.assert_close(y, gather_linear(x, weight, bias, rows.unique(), None, 0))
    close(
        gather_linear(x, weight, bias, rows, columns, 0),
        reference(x, weight, bias, rows, columns, 0),
        dtype,
    )


WEIGHT, X = torch.randn(6, 4), torch.randn(1, 1, 4)
BAD = {
    "rows out of range": (IndexError, (X, WEIGHT, None, torch.tensor([6]), None, 0), "6 of 6"),
    "rows negative": (IndexError, (X, WEIGHT, None, torch.tensor([-1]), None, 0), "-1 of 6"),
    "columns out of range": (IndexError, (X, WEIGHT, None, None, torch.tensor([4]), 0), "4 of 4"),
    "index dtype": (TypeError, (X, WEIGHT, None, torch.tensor([1.0]), None, 0), "int64"),
    "index rank": (ValueError, (X, WEIGHT, None, torch.zeros(1, 1, 1).long(), None, 0), "rows"),
    "lists of another batch": (
        ValueError,
        (X, WEIGHT, None, torch.zeros(2, 1).long(), None, 0),
        "2 sequences",
    ),
    "width": (ValueError, (X[..., :3], WEIGHT, None, None, None, 0), "3 channels"),
    "bias": (ValueError, (X, WEIGHT, torch.ones(5), None, None, 0), "bias"),
    "weight rank": (ValueError, (X, WEIGHT[0], None, None, None, 0), "two dims"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_raise(case) -> None:
    error, args, said = BAD[case]
    with pytest.raises(error, match=said):
        gather_linear(*args)


def test_bad_experts_raise() -> None:
    x, weight, full = torch.randn(2, 4), torch.randn(3, 6, 4), torch.zeros(3)
    with pytest.raises(IndexError, match="expert 3 of 3"):
        gather_experts(x, weight, torch.tensor([0, 3]), full, None, None, 0)
    with pytest.raises(ValueError, match=r"rows must be \[E, n\]"):
        gather_experts(x, weight, torch.tensor([0, 1]), full, torch.zeros(2, 1).long(), None, 0)
    with pytest.raises(ValueError, match="expert must be"):
        gather_experts(x, weight, torch.tensor([0]), full, None, None, 0)


def test_bad_selection_raises() -> None:
    h, norm, columns = torch.randn(1, 1, 4), torch.ones(4), torch.arange(4)[:, None]
    with pytest.raises(ValueError, match="5 active of 4"):
        select_units(h, norm, columns, 1, 5)
    with pytest.raises(IndexError, match="channel 4 of 4"):
        select_units(h, norm, columns + 1, 1, 2)


def test_empty_inputs() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert gather_linear(torch.randn(0, 1, 4), WEIGHT, None, None, None, 0).shape == (0, 1, 6)
    assert not gather_linear(X, WEIGHT, None, none, None, 0).any()
    assert not gather_linear(X, stored(WEIGHT, True), None, None, none, 0).any()


def test_a_build_that_fails_is_a_warning_and_the_reference_serves(monkeypatch) -> None:
    def fail(source: str) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(compat, "load_cpp", fail)
    with pytest.warns(UserWarning, match="plain ATen.*no compiler here"):
        assert not native.load.__wrapped__()


QUICK = Path(__file__).parents[1] / "helpers/quick-c++"
PORTABLE = """
import pytest, sys
sys.exit(pytest.main(["-q", "-n0", "-p", "no:cacheprovider", "tests/ops/test_native.py",
                      "tests/ops/test_attend.py", "-k",
                      "gather_experts or answer or sums or empty or attention"]))
"""


@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="this is the run within")
def test_the_portable_path() -> None:
    """The same source without vector instructions."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "CXX": str(QUICK)}
    ran = subprocess.run(
        [sys.executable, "-c", PORTABLE], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout[-3000:]  # 5 where none was collected


def test_loading_again_is_free() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.load()

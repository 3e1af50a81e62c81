"""``popc::threshold_linear`` and its like against their reference, and what they refuse."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from popc.ops import native, threshold_linear, threshold_linears
from popc.ops.threshold import _threshold_linear, _threshold_linears
from tests.helpers.checks import outputs_of
from tests.helpers.oracle import relative


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 8, 11])
def test_kernel_is_the_reference(dtype: torch.dtype, turned: bool, batch: int) -> None:
    assert native.load()
    make = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 1, 72, generator=make).to(dtype)
    weight = torch.randn(40, 72, generator=make).to(dtype)
    weight = weight.t().contiguous().t() if turned else weight
    bias, norm = torch.randn(40, generator=make).to(dtype), weight.float().norm(dim=0)
    center, base = (torch.randn(batch, n, generator=make) / 2 for n in (72, 40))
    centered = [(), (center[:1].to(dtype).float(), base[:1]), (center.to(dtype).float(), base)]
    limits = (torch.tensor([6.0]), torch.rand(batch, generator=make) * 12)
    for limit, moved in itertools.product(limits, centered):
        wide = (x.float(), weight.float(), bias.float(), norm, limit, 0)
        expected = _threshold_linear(*wide, *moved)
        for stored, out_dim in ((weight, 0), (weight.t(), 1)):
            got = threshold_linear(x, stored, bias, norm, limit, out_dim, *moved)
            assert relative(got, expected) < (1e-5 if dtype is torch.float32 else 2e-2)
    x[0, 0, 5] = float("nan")
    assert threshold_linear(x, weight, bias, norm, torch.tensor([6.0]), 0)[0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 5, 8])
def test_wide_linears_of_one_input_are_read_together(dtype, batch: int) -> None:
    make = torch.Generator().manual_seed(batch)
    x, norm = torch.randn(batch, 1, 37, generator=make).to(dtype), torch.ones(37)
    weights = [torch.randn(37, n, generator=make).to(dtype).t() for n in (7001, 799)]
    base, limit = torch.randn(1, 7800, generator=make), torch.tensor([0.5])
    y = threshold_linears(x, weights, [None, None], norm, limit, [0, 0], None, base)
    kept = x.float().where(x.abs() > 0.5, 0.0)
    outputs = outputs_of(y, x, [7001, 799])
    for y, weight, part in zip(outputs, weights, base.split([7001, 799], 1), strict=True):
        expected = kept @ weight.float().t() + part
        assert relative(y, expected) < (1e-5 if dtype is torch.float32 else 1e-2)


@pytest.mark.usefixtures("kernels")
def test_rows_may_be_parts_of_longer_ones() -> None:
    """As the pass slices centers and bases; of few tokens, and of more than a kernel takes."""
    make = torch.Generator().manual_seed(0)
    weights = [torch.randn(72, n, generator=make).t() for n in (40, 8)]
    norm, limit = torch.rand(80, generator=make)[5:77], torch.rand(2, generator=make)
    center = torch.randn(2, 90, generator=make)[:, 7:79]
    base = torch.randn(2, 60, generator=make)[:, 3:51]
    for length in (1, 3, 9):
        x = torch.randn(2, length, 72, generator=make)
        rest = [None, None], norm, limit, [0, 0], center, base
        y = threshold_linears(x, weights, *rest)
        torch.testing.assert_close(y, _threshold_linears(x, weights, *rest))
        assert y.shape == (x.shape[0] * length * 48,)


def test_a_line_that_is_not_read_counts_for_nothing() -> None:
    weight = torch.randn(72, 40).t()
    weight[:, 3] = float("nan")
    x, norm = torch.ones(1, 72), torch.ones(72)
    x[0, 3] = 0.1
    assert threshold_linear(x, weight, None, norm, torch.tensor([0.5]), 0).isfinite().all()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    "bad",
    [
        {"norm": torch.ones(71)},
        {"norm": torch.ones(72, dtype=torch.float64)},
        {"threshold": torch.ones(3)},
        {"bias": torch.ones(7)},
        {"center": torch.ones(2, 71)},
        {"center": torch.ones(3, 72)},
        {"base": torch.ones(1, 40, dtype=torch.float64)},
        {"x": torch.ones(2, 1, 70)},
        {"norm": torch.ones(73)},
        {"norm": torch.ones(1)},
        {"norm": torch.ones(1, 72)},
        {"threshold": torch.ones(2, 1)},
        {"threshold": torch.ones(2, 3)},
        {"center": torch.ones(1, 73)},
        {"center": torch.ones(72)},
        {"base": torch.ones(1, 41)},
        {"base": torch.ones(3, 40)},
    ],
)
def test_bad_arguments_are_refused(bad: dict[str, Tensor]) -> None:
    arguments = {
        "x": torch.ones(2, 1, 72),
        "weight": torch.ones(40, 72),
        "bias": None,
        "norm": torch.ones(72),
        "threshold": torch.ones(1),
        "out_dim": 0,
    }
    with pytest.raises((ValueError, TypeError)):
        threshold_linear(**{**arguments, **bad})
    arguments = {**arguments, **bad}
    many = [[arguments.pop(name)] for name in ("weight", "bias", "out_dim")]
    lists = dict(zip(("weights", "biases", "out_dims"), many, strict=True))
    with pytest.raises((ValueError, TypeError)):
        threshold_linears(**arguments, **lists)


def test_lists_that_do_not_go_together_are_refused() -> None:
    x, weight, norm = torch.ones(1, 72), torch.ones(40, 72), torch.ones(72)
    for weights, biases, dims in (
        ([weight], [], [0]),
        ([], [], []),
        ([weight] * 2, [None] * 2, [0]),
    ):
        with pytest.raises(ValueError, match="do not go together"):
            threshold_linears(x, weights, biases, norm, torch.ones(1), dims)

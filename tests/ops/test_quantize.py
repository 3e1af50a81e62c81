"""``popc::quantize``, ``dequantize`` and ``quantized_linear`` on CPUs against plain ATen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from popc.ops import dequantize, planes, quantize, quantized_linear
from tests.helpers.oracle import relative

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Whole blocks and tiles, with a rest of either, less than one, and more than a strip.
SIZES = [(64, 32), (37, 70), (5, 3), (130, 81), (2, 17, 40)]
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 1e-2, torch.float16: 6e-3}

pytestmark = pytest.mark.usefixtures("kernels_in_threads")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("row_dim", [0, 1])
def test_two_planes_are_the_reference_exactly(dtype: torch.dtype, row_dim: int) -> None:
    torch.manual_seed(0)
    for sizes in SIZES:
        w = torch.randn(sizes).to(dtype)
        for stored in (w, w.mT.contiguous().mT):
            packed = quantize(stored, row_dim, 2)
            assert torch.equal(packed, planes.pack(w, row_dim, 2))
            for bits in (4, 8):
                got = dequantize(packed, None, None, sizes, row_dim, 2, dtype, bits)
                expected = planes.unpack(packed, None, None, sizes, row_dim, 2, dtype, bits)
                assert torch.equal(got, expected) and got.stride() == expected.stride()


@pytest.mark.parametrize("row_dim", [0, 1])
def test_one_plane_has_the_least_error(row_dim: int) -> None:
    """Sums in another order may find another scale, no worse."""
    torch.manual_seed(0)
    for sizes in SIZES:
        w = torch.randn(sizes)
        packed, reference = quantize(w, row_dim, 1), planes.pack(w, row_dim, 1)
        assert (packed == reference).float().mean() > 0.99
        errors = [
            (dequantize(each, None, None, sizes, row_dim, 1, torch.float32) - w).square().sum()
            for each in (packed, reference)
        ]
        assert errors[0] <= errors[1] * (1 + 1e-6)


def test_blocks_of_zeros_and_nans() -> None:
    w = torch.zeros(64, 4)
    w[40, 2] = float("nan")
    for count in (1, 2):
        packed = quantize(w, 1, count)
        back = dequantize(packed, None, None, (64, 4), 1, count, torch.float32)
        assert back[32:, 2].isnan().all()
        back[32:, 2] = 0.0
        assert torch.equal(back, torch.zeros(64, 4))


def test_the_error_is_half_a_step() -> None:
    torch.manual_seed(0)
    w = torch.randn(96, 33)
    back = dequantize(quantize(w, 1, 2), None, None, (96, 33), 1, 2, torch.float32)
    step = w.view(3, 32, 33).abs().amax(1, keepdim=True) / 127 * (1 + 2**-7)
    assert ((back - w).view(3, 32, 33).abs() <= step / 2).all()


@pytest.mark.parametrize("row_dim", [0, 1])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("groups", [1, 3])
def test_scales_outside_of_rows(row_dim: int, count: int, groups: int) -> None:
    torch.manual_seed(0)
    sizes = (45, 70)
    packed = planes.pack_integers(torch.randint(256 if count == 2 else 16, sizes), row_dim, count)
    scale, zero = torch.rand(groups, 45) + 0.1, torch.randint(16, (groups, 45)).float()
    for zeros in (zero, None):
        for bits in (4, 8):
            arguments = packed, scale, zeros, sizes, row_dim, count, torch.float32, bits
            torch.testing.assert_close(dequantize(*arguments), planes.unpack(*arguments))
        for x in (torch.randn(1, 1, 70), torch.randn(3, 1, 70), torch.randn(30, 70)):
            check_linear(x, packed, scale, zeros, None, 45, row_dim, count)


def check_linear(x: Tensor, packed: Tensor, *others: Any) -> None:
    scale, zero, bias, outputs, row_dim, count = others
    sizes = outputs, x.shape[-1]
    weight = planes.unpack(packed, scale, zero, sizes, row_dim, count, torch.float64)
    y = quantized_linear(x, packed, *others)
    expected = x.double() @ weight.t() + (0.0 if bias is None else bias.double())
    assert (y.dtype, y.shape) == (x.dtype, expected.shape)
    assert relative(y, expected) < TOLERANCE[x.dtype]


@pytest.mark.parametrize("row_dim", [0, 1])
@pytest.mark.parametrize("size", [1e-25, 1e-6, 1.0, 1e20])
def test_values_of_any_size(row_dim: int, size: float) -> None:
    """Kernels count in integers, in units of the largest value nearby, whatever that is."""
    torch.manual_seed(0)
    packed = quantize(torch.randn(64, 96), row_dim, 2)
    x = torch.randn(2, 1, 96) * size
    x[1, 0, 7] *= 1000  # and one that is far larger than the rest
    check_linear(x, packed, None, None, None, 64, row_dim, 2)


@pytest.mark.parametrize("row_dim", [0, 1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_no_number_shows(row_dim: int, value: float) -> None:
    packed = quantize(torch.randn(64, 96), row_dim, 2)
    x = torch.randn(3, 1, 96)
    x[1, 0, 40] = value
    y = quantized_linear(x, packed, None, None, None, 64, row_dim, 2)
    assert not y[1].isfinite().any() and y[0].isfinite().all() and y[2].isfinite().all()


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_gradients_of_a_prompt(first: Any) -> None:
    """A product of many tokens leaves what another one's gradient needs as it is."""
    torch.manual_seed(0)
    sizes = (64, 96)
    one, other = (quantize(torch.randn(sizes), 1, 2) for _ in range(2))
    with first():
        quantized_linear(torch.randn(30, 96), other, None, None, None, 64, 1, 2)
    x = torch.randn(30, 96, requires_grad=True)
    y = quantized_linear(x, one, None, None, None, 64, 1, 2)
    with first():
        quantized_linear(torch.randn(30, 96), other, None, None, None, 64, 1, 2)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    weight = dequantize(one, None, None, sizes, 1, 2, torch.float32)
    torch.testing.assert_close(gradient, weight.sum(0).expand(30, 96))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row_dim", [0, 1])
@pytest.mark.parametrize("count", [1, 2])
def test_linear(dtype: torch.dtype, row_dim: int, count: int) -> None:
    torch.manual_seed(0)
    for outputs, inputs in ((40, 70), (333, 256), (129, 131), (64, 1000)):
        packed = quantize(torch.randn(outputs, inputs), row_dim, count)
        bias = torch.randn(outputs).to(dtype)
        for shape in ((1, 1), (2, 1), (5, 1), (8, 1), (2, 5), (3, 20)):
            x = torch.randn(*shape, inputs).to(dtype)
            check_linear(x, packed, None, None, bias, outputs, row_dim, count)
        check_linear(x[0, 0], packed, None, None, None, outputs, row_dim, count)


def test_a_dtype_without_kernel_is_served() -> None:
    x, packed = torch.randn(2, 1, 40).double(), quantize(torch.randn(30, 40), 1, 2)
    check_reference = torch.ops.popc.quantized_linear_reference
    arguments = x, packed, None, None, None, 30, 1, 2
    torch.testing.assert_close(quantized_linear(*arguments), check_reference(*arguments))
    back = dequantize(packed, None, None, (30, 40), 1, 2, torch.float64)
    assert torch.equal(back, planes.unpack(packed, None, None, (30, 40), 1, 2, torch.float64))


def test_empty_inputs() -> None:
    packed = quantize(torch.randn(30, 40), 1, 2)
    assert quantized_linear(torch.empty(0, 40), packed, None, None, None, 30, 1, 2).shape == (0, 30)
    assert quantize(torch.empty(0, 40), 0, 2).shape == (0, 68)
    assert quantize(torch.empty(0, 40), 1, 2).shape == (40, 0)


def test_bad_weights_are_refused() -> None:
    w = torch.randn(30, 40)
    for bad in ((w, 2, 2), (w, 0, 3), (w.int(), 0, 2), (w[0], 0, 2)):
        with pytest.raises((ValueError, TypeError)):
            quantize(*bad)


PACKED = torch.zeros(40, 34, dtype=torch.uint8)  # of [30, 40], channel-major
BAD: list[dict[str, Any]] = [
    {"packed": PACKED[:, :-1]},
    {"packed": PACKED[:-1]},
    {"packed": PACKED.float()},
    {"packed": PACKED.t().contiguous().t()},
    {"scale": torch.ones(1, 30)},
    {"zero": torch.ones(1, 30)},
    {"row_dim": 0},
    {"row_dim": 2},
    {"planes": 1},
    {"planes": 0},
]


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments_are_refused(bad: dict[str, Any]) -> None:
    good = {"packed": PACKED, "scale": None, "zero": None, "row_dim": 1, "planes": 2}
    with pytest.raises((ValueError, TypeError)):
        dequantize(**{**good, "sizes": (30, 40), "dtype": torch.float32, **bad})
    with pytest.raises((ValueError, TypeError)):
        quantized_linear(**{"x": torch.ones(1, 40), "bias": None, "outputs": 30, **good, **bad})


@pytest.mark.parametrize(
    "bad", [{"x": torch.ones(1, 41)}, {"bias": torch.ones(29)}, {"outputs": -1}, {"outputs": 33}]
)
def test_bad_linears_are_refused(bad: dict[str, Any]) -> None:
    good = {"x": torch.ones(1, 40), "packed": PACKED, "scale": None, "zero": None, "bias": None}
    with pytest.raises((ValueError, TypeError)):
        quantized_linear(**{**good, "outputs": 30, "row_dim": 1, "planes": 2, **bad})


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="sizes"):
        dequantize(PACKED, None, None, (40,), 1, 2, torch.float32)
    with pytest.raises(ValueError, match="bits"):
        dequantize(PACKED, None, None, (30, 40), 1, 2, torch.float32, 5)
    with pytest.raises(ValueError, match="packed"):
        dequantize(PACKED, None, None, (2, 30, 40), 1, 2, torch.float32)

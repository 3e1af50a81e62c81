"""``popc::graded_linears`` on CPUs against its reference in float64, and what it refuses."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from popc.ops import graded_linears, planes, quantize
from tests.helpers.checks import outputs_of
from tests.helpers.oracle import relative

reference = torch.ops.popc.graded_linears_reference
# Products are of bfloat16 parts: one of x times its scale, two where x is float32.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 1e-2, torch.float16: 6e-3}
# Less than a block, several chunks of blocks, one more than a chunk's.
OUTPUTS = [40, 333, 256, 129]

pytestmark = pytest.mark.usefixtures("kernels_in_threads")


def grouped(
    outputs: int, inputs: int, planes_each: int, groups: int, with_zero: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Random integers without scales in their rows; their scale and zero."""
    top = 256 if planes_each == 2 else 16
    packed = planes.pack_integers(torch.randint(top, (outputs, inputs)), 1, planes_each)
    zero = torch.randint(top // 4, 3 * top // 4, (groups, outputs)).float()
    return packed, torch.rand(groups, outputs) + 0.1, zero if with_zero else None


def wide(values: list[Tensor | None]) -> list[Tensor | None]:
    return [None if value is None else value.double() for value in values]


def check(x: Tensor, weights: list[tuple[Any, ...]], outputs: list[int], *others: Any) -> None:
    """``others``: planes, biases and what follows them."""
    packed, scales, zeros = map(list, zip(*weights, strict=True))
    counts, biases, *rest = others
    got = graded_linears(x, packed, scales, zeros, outputs, counts, biases, *rest)
    arguments = packed, scales, zeros, outputs, counts, wide(biases), *rest
    expected = reference(x.double(), *arguments)
    assert (got.dtype, got.shape) == (x.dtype, expected.shape)
    parts = (outputs_of(y, x, outputs) for y in (got, expected))
    for y, right in zip(*parts, strict=True):
        assert relative(y, right) < TOLERANCE[x.dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("batch", [1, 2, 4, 8, 11])
def test_kernel_is_the_reference(dtype: torch.dtype, batch: int) -> None:
    torch.manual_seed(batch)
    inputs, total = 101, sum(OUTPUTS)
    x = torch.randn(batch, 1, inputs).to(dtype)
    norm, low_norm = torch.rand(inputs) + 0.5, torch.rand(inputs)
    counts = [2, 1, 2, 2]
    weights = [
        (quantize(torch.randn(n, inputs), 1, count), None, None)
        for n, count in zip(OUTPUTS, counts, strict=True)
    ]
    limits = torch.tensor([0.3]), torch.rand(batch) * 0.6
    centers = None, torch.randn(1, inputs) / 5, torch.randn(batch, inputs) / 5
    for limit, center in itertools.product(limits, centers):
        # Parts of longer rows, as the pass slices them.
        base = None if center is None else torch.randn(center.shape[0], total + 5)[:, 3:-2]
        biases = [torch.randn(OUTPUTS[0]).to(dtype), None, None, torch.randn(OUTPUTS[3]).to(dtype)]
        check(x, weights, OUTPUTS, counts, biases, norm, low_norm, limit, center, base)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("counts", [[2, 2], [1, 1]])
def test_scales_outside_of_rows(dtype: torch.dtype, batch: int, counts: list[int]) -> None:
    torch.manual_seed(0)
    outputs, inputs = [70, 200], 100
    x = torch.randn(batch, 1, inputs).to(dtype)
    norm, low_norm = torch.ones(inputs), torch.rand(inputs)
    for groups, with_zero in itertools.product((1, 4, 7), (True, False)):
        weights = [grouped(n, inputs, counts[0], groups, with_zero) for n in outputs]
        check(x, weights, outputs, counts, [None, None], norm, low_norm, torch.tensor([0.4]))


def test_sums_of_many_outputs_and_channels() -> None:
    """More outputs than one panel of sums, shared by threads."""
    torch.manual_seed(0)
    x = torch.randn(1, 1, 61)
    weights = [(quantize(torch.randn(n, 61), 1, 2), None, None) for n in (8300, 64)]
    norm, low_norm = torch.ones(61), torch.full((61,), 0.3)
    check(x, weights, [8300, 64], [2, 2], [None, None], norm, low_norm, torch.tensor([0.2]))


def make_one(batch: int = 1) -> dict[str, Any]:
    weight = torch.randn(40, 72)
    return {
        "x": torch.randn(batch, 1, 72),
        "packed": [quantize(weight, 1, 2)],
        "scales": [None],
        "zeros": [None],
        "outputs": [40],
        "planes": [2],
        "biases": [None],
        "norm": torch.ones(72),
        "low_norm": torch.ones(72),
        "threshold": torch.tensor([0.5]),
    }


def test_a_token_does_not_depend_on_its_batch() -> None:
    torch.manual_seed(0)
    together = make_one(batch=6)
    together["low_norm"] = torch.rand(72)
    y = graded_linears(**together).view(6, 40)
    for n in range(6):
        alone = graded_linears(**{**together, "x": together["x"][n : n + 1]})
        torch.testing.assert_close(alone, y[n], atol=2e-3, rtol=0)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_row_that_is_not_read_counts_for_nothing(batch: int) -> None:
    one = make_one(batch)
    scales = one["packed"][0][3, :4].view(torch.bfloat16)
    scales.fill_(float("nan"))
    one["x"][:, :, 3] = 0.1
    one["x"][:, :, 4] = 1.0
    assert graded_linears(**one).isfinite().all()
    one["x"][-1, 0, 3] = 1.0
    y = graded_linears(**one).view(batch, 40)
    assert y[-1].isnan().all() and y[:-1].isfinite().all()


def test_a_nan_is_read() -> None:
    one = make_one(batch=2)
    one["x"][0, 0, 5] = float("nan")
    y = graded_linears(**one).view(2, 40)
    assert y[0].isnan().all() and y[1].isfinite().all()


def test_nothing_is_read() -> None:
    one = make_one()
    one["threshold"] = torch.tensor([1e9])
    bias = torch.randn(40)
    assert torch.equal(graded_linears(**{**one, "biases": [bias]}), bias)
    y = graded_linears(**{**one, "x": torch.empty(0, 1, 72), "threshold": torch.ones(1)})
    assert y.shape == (0,)


BAD: list[dict[str, Any]] = [
    {"norm": torch.ones(71)},
    {"low_norm": torch.ones(71)},
    {"norm": torch.ones(72, dtype=torch.float64)},
    {"low_norm": torch.ones(72, dtype=torch.float64)},
    {"threshold": torch.ones(3)},
    {"center": torch.ones(2, 71)},
    {"center": torch.ones(3, 72)},
    {"base": torch.ones(1, 39)},
    {"base": torch.ones(1, 41)},
    {"x": torch.ones(2, 1, 70)},
    {"norm": torch.ones(73), "low_norm": torch.ones(73)},
    {"low_norm": torch.ones(1)},
    {"center": torch.ones(1, 73)},
    {"threshold": torch.ones(2, 1)},
    {"biases": [torch.ones(7)]},
    {"packed": [torch.zeros(72, 67, dtype=torch.uint8)]},
    {"packed": [torch.zeros(71, 68, dtype=torch.uint8)]},
    {"packed": [torch.zeros(72, 68)]},
    {"packed": [torch.zeros(68, 72, dtype=torch.uint8).t()]},
    {"outputs": [65]},
    {"outputs": [-1]},
    {"planes": [1]},
    {"planes": [3]},
    {"planes": []},
    {"scales": [None, None]},
    {"zeros": [torch.ones(1, 40)]},
    {"scales": [torch.ones(1, 40)]},
    {"packed": [torch.zeros(72, 64, dtype=torch.uint8)], "scales": [torch.ones(1, 39)]},
    {"packed": [torch.zeros(72, 64, dtype=torch.uint8)], "scales": [torch.ones(73, 40)]},
    {"packed": [torch.zeros(72, 64, dtype=torch.uint8)], "scales": [torch.ones(0, 40)]},
]


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        graded_linears(**{**make_one(batch=2), **bad})


OTHER_PATHS = """
import sys, pytest
sys.exit(pytest.main(["-q", "-n0", "-p", "no:cacheprovider", "tests/ops/test_graded.py",
                      "tests/ops/test_quantize.py"]))
"""


@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="this is the run within")
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_vector_instructions(capability: str) -> None:
    """The same source with shorter vectors, and with none."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    ran = subprocess.run(
        [sys.executable, "-c", OTHER_PATHS], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout[-3000:]

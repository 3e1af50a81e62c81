"""Gathers on planes against gathers on the values that the planes hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from popc import ops
from popc.ops import planes as fmt
from popc.ops.gather_quantized import (
    count_expert_grades,
    gather_quantized,
    graded_experts,
    quantized_experts,
)

CHECKS = ("test_schema", "test_faketensor")
N, K, E = 70, 45, 4

Held = tuple[Tensor, Tensor | None, Tensor | None]


def held(*lead: int, row_dim: int, planes: int, apart: bool = False) -> Held:
    if not apart:
        return ops.quantize(torch.randn(*lead, N, K), row_dim, planes), None, None
    packed = fmt.pack_integers(torch.randint(16**planes, (*lead, N, K)), row_dim, planes)
    zero = torch.full((*lead, 3, N), 16.0**planes / 2 - 1)
    return packed, torch.rand(*lead, 3, N) / 16**planes, zero


def values(weight: Held, row_dim: int, planes: int, bits: int = 8) -> Tensor:
    sizes = *weight[0].shape[:-2], N, K
    return ops.dequantize(*weight, list(sizes), row_dim, planes, torch.float32, bits)


def lists(batch: int | None, size: int, n: int) -> Tensor:
    rows = [torch.randperm(size)[:n] for _ in range(batch or 1)]
    return torch.stack(rows) if batch else rows[0]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row_dim", [0, 1])
@pytest.mark.parametrize(("planes", "apart"), [(2, False), (1, False), (2, True)])
@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize(("rows", "columns"), [(7, None), (None, 9), (7, 9), (None, None)])
def test_gather_quantized(rows, columns, batch, planes, apart, row_dim, dtype) -> None:
    torch.manual_seed(0)
    weight = held(row_dim=row_dim, planes=planes, apart=apart)
    x, bias = torch.randn(3, 2, K).to(dtype), torch.randn(N).to(dtype)
    r = None if rows is None else lists(batch, N, rows)
    c = None if columns is None else lists(batch, K, columns)
    args = x, *weight, bias, r, c, N, row_dim, planes
    y = gather_quantized(*args)
    plain = values(weight, row_dim, planes), bias.float(), r, c, 0
    expected = torch.ops.popc.gather_linear_reference(x.float(), *plain)
    exact = dtype is torch.float32
    tolerance = {"rtol": 1e-3, "atol": 2e-3} if exact else {"rtol": 2e-2, "atol": 5e-2}
    torch.testing.assert_close(y.float(), expected, **tolerance)
    opcheck(gather_quantized, args, test_utils=CHECKS)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("row_dim", [0, 1])
@pytest.mark.parametrize(("planes", "apart"), [(2, False), (1, False), (2, True)])
@pytest.mark.parametrize(("rows", "columns"), [(7, None), (None, 9), (7, 9), (None, None)])
def test_quantized_experts(rows, columns, planes, apart, row_dim) -> None:
    torch.manual_seed(0)
    weight = held(E, row_dim=row_dim, planes=planes, apart=apart)
    x, expert = torch.randn(6, K), torch.tensor([0, 3, 3, 1, 0, 3])
    full = torch.tensor([False, True, False, False])
    r = None if rows is None else lists(E, N, rows)
    c = None if columns is None else lists(6, K, columns)
    args = x, *weight, expert, full, r, c, N, row_dim, planes
    y = quantized_experts(*args)
    plain = values(weight, row_dim, planes), expert, full, r, c, 0
    torch.testing.assert_close(y, ops.gather_experts(x, *plain), rtol=1e-3, atol=2e-3)
    opcheck(quantized_experts, args, test_utils=CHECKS)


@pytest.mark.usefixtures("kernels")
def test_experts_of_many_rows() -> None:
    torch.manual_seed(0)
    weight, x = held(E, row_dim=1, planes=2), torch.randn(100, K)
    expert = torch.randint(E - 1, (100,))  # the last has none
    y = quantized_experts(x, *weight, expert, None, None, None, N, 1, 2)
    expected = torch.einsum("sk,snk->sn", x, values(weight, 1, 2)[expert])
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=2e-3)
    none = x[:0], *weight, expert[:0], None, None, None, N, 1, 2
    assert quantized_experts(*none).shape == (0, N)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("planes", "apart"), [(2, False), (1, False), (2, True)])
def test_graded_experts(planes: int, apart: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = held(E, row_dim=1, planes=planes, apart=apart)
    x, expert = torch.randn(6, K).to(dtype), torch.tensor([0, 3, 3, 1, 0, 3])
    norm, low_norm = torch.rand(2 + E * K)[2:], torch.rand(E * K) / 2
    threshold = torch.tensor([0.3])
    args = x, *weight, expert, norm, low_norm, threshold, N, planes
    y = graded_experts(*args)
    each = (part.view(E, K)[expert] for part in (norm, low_norm))
    high, low = (x.float().abs() * part > 0.3 for part in each)
    both = values(weight, 1, planes)[expert]
    coarse = values(weight, 1, planes, 4)[expert] if planes == 2 else both
    read = torch.where((high & low)[:, None], both, torch.where(high[:, None], coarse, 0.0))
    expected = torch.einsum("sk,snk->sn", x.float(), read)
    exact = dtype is torch.float32
    tolerance = {"rtol": 1e-3, "atol": 2e-3} if exact else {"rtol": 2e-2, "atol": 5e-2}
    torch.testing.assert_close(y.float(), expected, **tolerance)
    opcheck(graded_experts, args, test_utils=CHECKS)
    counts = count_expert_grades(x, expert, norm, low_norm, threshold)
    mean = [read.sum(1).float().mean() for read in (high, high & low)]
    assert counts.tolist() == [round(float(value)) for value in mean]
    for limits in (torch.full((6,), 0.3), torch.full((2, 6), 0.3)):
        with pytest.raises((ValueError, RuntimeError), match="one threshold for all rows"):
            graded_experts(x, *weight, expert, norm, low_norm, limits, N, planes)
    for op in (graded_experts, torch.ops.popc.graded_experts_reference):
        for scales in ((norm[1:], low_norm), (norm, low_norm[:K]), (norm.view(E, K), low_norm)):
            with pytest.raises(ValueError):
                op(x, *weight, expert, *scales, threshold, N, planes)

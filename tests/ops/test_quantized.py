"""Ops on quantised weights: what each reads of them, by their references and on this device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.nn.functional import linear

from popc import ops
from popc.ops import planes as fmt
from popc.ops import quantized as references
from tests.helpers.checks import outputs_of

CHECKS = "test_schema", "test_faketensor"
K, OUTPUTS = 70, (40, 33)


def stored(
    outputs: int, row_dim: int = 1, planes: int = 2, apart: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """packed, scale, zero of a random weight; ``apart``: as those of torchao."""
    if not apart:
        return fmt.pack(torch.randn(outputs, K) / 8, row_dim, planes), None, None
    packed = fmt.pack_integers(torch.randint(0, 16**planes, (outputs, K)), row_dim, planes)
    zero = fmt.GROUP_ZERO[planes] + torch.randn(2, outputs).round()
    return packed, torch.rand(2, outputs) / 16**planes, zero


def values(weight: Any, outputs: int, row_dim: int, planes: int, bits: int = 8) -> Tensor:
    return fmt.unpack(*weight, (outputs, K), row_dim, planes, torch.float32, bits)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("row_dim", [0, 1])
def test_quantized_linear(row_dim: int, planes: int, apart: bool) -> None:
    torch.manual_seed(0)
    weight, bias = stored(40, row_dim, planes, apart), torch.randn(40)
    w = values(weight, 40, row_dim, planes)
    for shape in ((K,), (1, K), (2, 3, K)):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(shape, dtype=dtype)
            for added in (None, bias.to(dtype)):
                args = (x, *weight, added, 40, row_dim, planes)
                expected = linear(x.float(), w, None if added is None else added.float())
                exact = references._quantized_linear(*args)
                assert exact.dtype == dtype
                torch.testing.assert_close(exact, expected.to(dtype))
                close(ops.quantized_linear(*args), expected.to(dtype))
    opcheck(ops.quantized_linear, args, test_utils=CHECKS)


def test_fakes_of_the_format() -> None:
    for row_dim in (0, 1):
        for planes in (1, 2):
            w = torch.randn(3, 40, K)
            opcheck(ops.quantize, (w, row_dim, planes), test_utils=CHECKS)
            args = (ops.quantize(w, row_dim, planes), None, None, (3, 40, K), row_dim, planes)
            opcheck(ops.dequantize, (*args, torch.bfloat16), test_utils=CHECKS)


class Graded:
    """Two linears that share x; centers and bases are parts of longer rows."""

    def __init__(self, tokens: int, planes: tuple[int, int], apart: bool) -> None:
        torch.manual_seed(tokens)
        self.planes = planes
        self.weights = [
            stored(size, 1, count, apart) for size, count in zip(OUTPUTS, planes, strict=True)
        ]
        self.x = torch.randn(tokens, K)
        self.norm = torch.rand(K) + 0.5
        self.low_norm = self.norm * torch.rand_like(self.norm)
        self.threshold = torch.tensor([0.7])
        self.center = (torch.randn(1, K + 6) / 4)[:, 5:-1]
        self.base = torch.randn(1, sum(OUTPUTS) + 4)[:, 3:-1]
        self.biases = [None, torch.randn(OUTPUTS[1])]

    def args(self) -> tuple[Any, ...]:
        packed, scales, zeros = (list(part) for part in zip(*self.weights, strict=True))
        lists = packed, scales, zeros, list(OUTPUTS), list(self.planes), self.biases
        rest = self.norm, self.low_norm, self.threshold, self.center, self.base
        return (self.x, *lists, *rest)

    def outputs(self, op: Any) -> list[Tensor]:
        """Of each linear."""
        return outputs_of(op(*self.args()), self.x, OUTPUTS)

    def grades(self) -> tuple[Tensor, Tensor]:
        """By token and channel: whether the high plane is read, and the low one."""
        score = (self.x - self.center[0]).abs()
        high = ~(score * self.norm <= self.threshold)
        return high, high & ~(score * self.low_norm <= self.threshold)

    def expected(self) -> list[Tensor]:
        """Channel by channel."""
        high, low = self.grades()
        centered = self.x - self.center[0]
        outputs, start = [], 0
        for i, (size, weight) in enumerate(zip(OUTPUTS, self.weights, strict=True)):
            fine = values(weight, size, 1, self.planes[i])
            coarse = values(weight, size, 1, self.planes[i], bits=4)
            y = self.base[0, start : start + size].repeat(len(self.x), 1)
            for token in range(len(self.x)):
                for c in range(K):
                    if high[token, c]:
                        y[token] += centered[token, c] * (fine if low[token, c] else coarse)[:, c]
            outputs.append(y if self.biases[i] is None else y + self.biases[i])
            start += size
        return outputs


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("planes", [(2, 2), (1, 1), (2, 1)])
@pytest.mark.parametrize("tokens", [1, 3])
def test_graded_linears(tokens: int, planes: tuple[int, int], apart: bool) -> None:
    case = Graded(tokens, planes, apart)
    high, low = case.grades()
    assert 0.2 < high.float().mean() < 0.8 and 0.1 < low.float().mean() < high.float().mean()
    expected = case.expected()
    for got, exact in zip(case.outputs(references._graded_linears), expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-3, atol=2e-3)
    for got, exact in zip(case.outputs(ops.graded_linears), expected, strict=True):
        close(got, exact)
    opcheck(ops.graded_linears, case.args(), test_utils=CHECKS)


def test_count_grades() -> None:
    case = Graded(3, (2, 2), False)
    high, low = case.grades()
    parts = case.x, case.norm, case.low_norm, case.threshold, case.center
    assert ops.count_grades(*parts).tolist() == [high.any(0).sum(), low.any(0).sum()]
    opcheck(ops.count_grades, parts, test_utils=CHECKS)


@pytest.mark.parametrize("op", [references._graded_linears, ops.graded_linears])
def test_extremes(op: Any) -> None:
    """A negative threshold reads all, an infinite one nothing; a NaN is read, and shows."""
    case = Graded(2, (2, 2), False)
    base = [case.base[:, :40], case.base[:, 40:] + case.biases[1]]
    case.threshold.fill_(torch.inf)
    for got, expected in zip(case.outputs(op), base, strict=True):
        close(got, expected.expand_as(got))
    case.x[0, 4] = torch.nan
    first, _ = case.outputs(op)
    assert first[0].isnan().all() and first[1].isfinite().all()
    case.x[0, 4] = 1.0
    case.threshold.fill_(-1.0)
    centered = case.x - case.center
    for got, weight, size, more in zip(case.outputs(op), case.weights, OUTPUTS, base, strict=True):
        close(got, linear(centered, values(weight, size, 1, 2)) + more)


@pytest.mark.parametrize("op", [references._graded_linears, ops.graded_linears])
def test_a_token_has_grades_of_its_own(op: Any) -> None:
    case = Graded(5, (2, 2), False)
    together = case.outputs(op)
    rows = case.x
    for token in range(5):
        case.x = rows[token : token + 1]
        for alone, all_ in zip(case.outputs(op), together, strict=True):
            torch.testing.assert_close(alone[0], all_[token], rtol=1e-3, atol=2e-3)


def test_thresholds_of_sequences() -> None:
    """``threshold [S]`` for ``x [S, T, K]``: each sequence has its own."""
    case = Graded(4, (2, 2), False)
    case.x = case.x.view(2, 2, K)
    case.threshold = torch.tensor([0.4, 1.1])
    together = case.outputs(references._graded_linears)
    for sequence in range(2):
        one = Graded(4, (2, 2), False)
        one.x = one.x[2 * sequence :][:2]
        one.threshold = case.threshold[sequence : sequence + 1]
        for got, expected in zip(together, one.expected(), strict=True):
            torch.testing.assert_close(got[sequence], expected, rtol=1e-3, atol=2e-3)


def test_lists_of_different_lengths_are_refused() -> None:
    case = Graded(1, (2, 2), False)
    case.biases = [None]
    with pytest.raises((ValueError, RuntimeError), match="do not go together"):
        ops.graded_linears(*case.args())

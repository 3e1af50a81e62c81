"""The threshold pass on quantised weights: one op for linears that share an input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from popc import ops, policies
from popc.analysis.capture import Captured, capture_module
from popc.analysis.input_groups import InputGroup, find_input_groups
from popc.ops.planes import pack_integers
from popc.passes.region_binding import InputGroupBinding
from popc.passes.segments import segment_offsets
from popc.passes.threshold_inputs import rewrite_linears
from popc.quant import QuantizedTensor, Stored
from tests.helpers.checks import checked

K = 48


def quantized(outputs: int, planes: int, apart: bool = False, bias: bool = False) -> nn.Linear:
    """A linear ``[N, K]`` with a weight in planes; ``apart``: scales are not in their rows."""
    made = nn.Linear(K, outputs, bias=bias)
    weight = QuantizedTensor.of(made.weight.detach(), 1, planes)
    if apart:
        u = torch.randint(16**planes, (outputs, K))
        scale, zero = torch.rand(3, outputs) / 99, torch.full((3, outputs), 16.0**planes / 2 - 1)
        stored = Stored((outputs, K), 1, planes, torch.float32, (K, 1))
        weight = QuantizedTensor(pack_integers(u, 1, planes), scale, zero, stored)
    made.weight = nn.Parameter(weight, requires_grad=False)
    return made


def readings(made: nn.Linear) -> tuple[Tensor, Tensor]:
    """Its weight, and what high planes alone are read as."""
    weight: Any = made.weight
    stored, held = weight.stored, (weight.packed, weight.scale, weight.zero)
    both, high = (ops.dequantize(*held, *stored[:4], bits) for bits in (8, 4))
    return both, high


class Three(nn.Module):
    """Three weights of one x, each stored otherwise, and one of floats of another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList(
            [quantized(8, 2, bias=True), quantized(5, 1), quantized(7, 2, apart=True)]
        )
        self.last = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([part(x) for part in self.parts], -1).relu())


def found(model: nn.Module, x: Tensor) -> tuple[Captured, list[InputGroup], Sequence[Any]]:
    """Its graph, the groups of it, and what the graph takes."""
    captured = capture_module(model, (x,))
    args = captured.unwrapping([*model.parameters(), x])
    return captured, find_input_groups(captured, []), args


def test_grades_are_read_by_one_op() -> None:
    model, x = Three().eval(), torch.randn(3, 1, K)
    captured, groups, args = found(model, x)
    assert [group.is_quantized for group in groups] == [True, False]
    rewrite_linears(captured, groups, "batch", counting=True)
    targets = [node.target for node in captured.gm.graph.nodes]
    assert targets.count(ops.graded_linears) == 1 and ops.dequantize not in targets
    width = segment_offsets(groups)[-1][1]
    norm, low_norm = torch.ones(width), torch.full((width,), 0.5)
    center, base = torch.randn(1, width) / 4, torch.randn(1, 24)
    center[:, K:] = 0
    limits = torch.tensor([[0.5], [-1.0]])
    output, read = checked(captured.gm, *args, norm, low_norm, limits, center, base)
    moved = x - center[:, :K]
    high, low = moved.abs() > 0.5, moved.abs() > 1.0
    h, at = [], 0
    for part, planes in zip(model.parts, (2, 1, 2), strict=True):
        weight, coarse = readings(part)
        y = linear(moved.where(low if planes == 2 else high, 0.0), weight, part.bias)
        if planes == 2:
            y = y + linear(moved.where(high & ~low, 0.0), coarse)
        h.append(y + base[:, at : at + len(weight)])
        at += len(weight)
    expected = linear(torch.cat(h, -1).relu(), model.last.weight, model.last.bias + base[0, at:])
    torch.testing.assert_close(output, expected.detach(), rtol=1e-3, atol=1e-3)
    counts = [int(plane.flatten(0, 1).any(0).sum()) for plane in (high, low)]
    assert read.tolist() == [counts, [20, 20]]


@pytest.mark.parametrize("name", ["graded", "threshold"])
def test_scales_are_of_both_readings(name: str) -> None:
    model, x = Three().eval(), torch.randn(3, 1, K)
    captured, (group, _), args = found(model, x)
    binding, policy = InputGroupBinding.of(group, captured), policies.get(name)
    both, high = (torch.cat(weights) for weights in zip(*map(readings, model.parts), strict=True))
    norm, error = both.square().sum(0), (high - both).square().sum(0)
    # Rows of 8, 5 and 7 values take a block of 16 bytes for each plane, and 2 for a scale.
    apart: Any = model.parts[2].weight
    scales = apart.scale.nbytes + apart.zero.nbytes
    share = (K * (18 + 18 + 16) + scales) / (K * (34 + 18 + 32) + scales)
    spec = binding.state(args, policy).spec
    assert spec.high is not None and spec.high.share == pytest.approx(share)
    assert spec.high.error == pytest.approx(float(error.sum() / norm.sum()))
    expected = policy.scales(norm.sqrt(), error / norm, share)
    for scale, right in zip(binding.scales(args, policy), expected, strict=True):
        torch.testing.assert_close(scale, right)


def test_of_one_plane_there_is_one_grade() -> None:
    model, x = quantized(9, 1), torch.randn(1, 1, K)
    captured, (group,), args = found(model, x)
    binding, policy = InputGroupBinding.of(group, captured), policies.get("graded")
    assert binding.state(args, policy).spec.high is None
    for scale in binding.scales(args, policy):
        torch.testing.assert_close(scale, readings(model)[0].norm(dim=0))
    args[0].copy_(ops.quantize(torch.randn(9, K), 1, 1))  # a write is seen
    torch.testing.assert_close(binding.scales(args, policy)[0], readings(model)[0].norm(dim=0))

"""The threshold pass on quantised weights: one op for linears that share an input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from popc import ops, policies
from popc.analysis.capture import capture_module
from popc.analysis.input_groups import find_input_groups
from popc.ops import planes as fmt
from popc.passes.region_binding import InputGroupBinding
from popc.passes.segments import segment_offsets
from popc.passes.threshold_inputs import rewrite_linears
from tests.helpers.checks import assert_meta_is_true

K = 48


class Planes(nn.Module):
    """One weight ``[N, K]`` in planes, with or without scales apart from them."""

    def __init__(self, outputs: int, planes: int, apart: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.sizes, self.planes = [outputs, K], planes
        self.scale = self.zero = self.bias = None
        if apart:
            u = torch.randint(16**planes, (outputs, K))
            packed = fmt.pack_integers(u, 1, planes)
            self.scale = nn.Parameter(torch.rand(3, outputs))
            self.zero = nn.Parameter(torch.full((3, outputs), 16.0**planes / 2 - 1))
        else:
            packed = ops.quantize(torch.randn(outputs, K), 1, planes)
        if bias:
            self.bias = nn.Parameter(torch.randn(outputs))
        self.packed = nn.Parameter(packed, requires_grad=False)

    def weight(self, bits: int = 8) -> Tensor:
        stored = self.packed, self.scale, self.zero, self.sizes, 1, self.planes, torch.float32
        return ops.dequantize(*stored, bits)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight(), self.bias)


class Three(nn.Module):
    """Three weights of one x, each stored otherwise, and one of floats of another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList(
            [Planes(8, 2, bias=True), Planes(5, 1), Planes(7, 2, apart=True)]
        )
        self.last = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([part(x) for part in self.parts], -1).relu())


def test_grades_are_read_by_one_op() -> None:
    model, x = Three().eval(), torch.randn(3, 1, K)
    captured = capture_module(model, (x,))
    groups = find_input_groups(captured, [])
    assert [group.is_quantized for group in groups] == [True, False]
    rewrite_linears(captured, groups, "batch", counting=True)
    targets = [node.target for node in captured.gm.graph.nodes]
    assert targets.count(ops.graded_linears) == 1 and ops.dequantize not in targets
    width = segment_offsets(groups)[-1][1]
    norm, low_norm = torch.ones(width), torch.full((width,), 0.5)
    center, base = torch.randn(1, width) / 4, torch.randn(1, 24)
    center[:, K:] = 0
    limits = torch.tensor([[0.5], [-1.0]])
    fed = norm, low_norm, limits, center, base
    output, read = assert_meta_is_true(captured.gm, model, x, *fed)
    moved = x - center[:, :K]
    high, low = moved.abs() > 0.5, moved.abs() > 1.0
    h, at = [], 0
    for part in model.parts:
        n = part.sizes[0]
        y = linear(moved.where(low if part.planes == 2 else high, 0.0), part.weight(), part.bias)
        if part.planes == 2:
            y = y + linear(moved.where(high & ~low, 0.0), part.weight(4))
        h.append(y + base[:, at : at + n])
        at += n
    expected = linear(torch.cat(h, -1).relu(), model.last.weight, model.last.bias + base[0, at:])
    torch.testing.assert_close(output, expected.detach(), rtol=1e-5, atol=1e-5)
    counts = [int(plane.flatten(0, 1).any(0).sum()) for plane in (high, low)]
    assert read.tolist() == [counts, [20, 20]]


@pytest.mark.parametrize("policy", ["graded", "threshold"])
def test_scales_are_of_both_readings(policy: str) -> None:
    model, x = Three().eval(), torch.randn(3, 1, K)
    captured = capture_module(model, (x,))
    group, _ = find_input_groups(captured, [])
    binding = InputGroupBinding.of(group, captured)
    placeholders = captured.gm.graph.find_nodes(op="placeholder")
    args = [captured.parameters.get(node, x) for node in placeholders]
    args = [arg.detach() for arg in args]
    both = torch.cat([part.weight() for part in model.parts]).detach()
    high = torch.cat([part.weight(4) for part in model.parts]).detach()
    norm, error = both.square().sum(0), (high - both).square().sum(0)
    # Rows of 8, 5 and 7 values take a block of 16 bytes for each plane, and 2 for a scale.
    apart = sum(value.nbytes for value in (model.parts[2].scale, model.parts[2].zero))
    share = (K * (18 + 18 + 16) + apart) / (K * (34 + 18 + 32) + apart)
    chosen = policies.get(policy)
    spec = binding.state(args, chosen).spec
    assert spec.high.share == pytest.approx(share)
    assert spec.high.error == pytest.approx(float(error.sum() / norm.sum()))
    expected = chosen.scales(norm.sqrt(), error / norm, share)
    for scale, right in zip(binding.scales(args, chosen), expected, strict=True):
        torch.testing.assert_close(scale, right)


def test_of_one_plane_there_is_one_grade() -> None:
    model, x = Planes(9, 1), torch.randn(1, 1, K)
    captured = capture_module(model, (x,))
    (group,) = find_input_groups(captured, [])
    binding, policy = InputGroupBinding.of(group, captured), policies.get("graded")
    nodes = captured.gm.graph.find_nodes(op="placeholder")
    args = [captured.parameters.get(node, x) for node in nodes]
    assert binding.state(args, policy).spec.high is None
    for scale in binding.scales(args, policy):
        torch.testing.assert_close(scale, model.weight().norm(dim=0))
    model.packed.data.copy_(ops.quantize(torch.randn(9, K), 1, 1))
    model.packed.add_(0)  # what goes through .data is not seen; this is
    torch.testing.assert_close(binding.scales(args, policy)[0], model.weight().norm(dim=0))

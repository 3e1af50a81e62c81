"""The threshold pass alone: linears that share an input are one op, if nothing is in between."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from popc.analysis.capture import capture_module
from popc.analysis.input_groups import find_input_groups
from popc.ops import measure_inputs, threshold_linear, threshold_linears
from popc.ops.measure import BINS
from popc.passes.measure_inputs import append_statistics
from popc.passes.segments import segment_offsets
from popc.passes.threshold_inputs import rewrite_linears
from tests.helpers.checks import assert_meta_is_true


class Three(nn.Module):
    """q, k and v of one x; k's weight and v's are halves of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(16, 8)
        self.kv = nn.Parameter(torch.randn(10, 16))
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).relu()
        k, v = self.kv.chunk(2)
        return torch.cat([q, nn.functional.linear(x, k, self.bias), x @ v.t()], -1)


class Written(Three):
    """x changes between its linears."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        q = self.q(x)
        x.mul_(2)
        return torch.cat([q, nn.functional.linear(x, self.kv)], -1)


class LateBias(Three):
    """The second bias is made of what the first linear gave."""

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        bias = torch.cat([self.bias, q[0, 0, :5]])
        return torch.cat([q, nn.functional.linear(x, self.kv, bias)], -1)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("module", "together"), [(Three, [3]), (Written, [1, 1]), (LateBias, [1, 1])]
)
def test_is_the_module_with_masked_inputs(module: type[Three], together: list[int], batch) -> None:
    torch.manual_seed(0)
    model, x = module().eval(), torch.randn(batch, 1, 16)
    captured = capture_module(model, (x,))
    groups = find_input_groups(captured, [])
    rewrite_linears(captured, groups, "batch", counting=True)
    ops = [n for n in captured.gm.graph.nodes if n.target in (threshold_linear, threshold_linears)]
    many = [n.target is threshold_linears for n in ops]
    assert [len(n.args[1]) if m else 1 for n, m in zip(ops, many, strict=True)] == together
    width, outputs = segment_offsets(groups)[-1][1], 18
    norm, limits = torch.ones(width), torch.full((len(groups), 1), 0.5)
    center, base = torch.zeros(1, width), torch.zeros(1, outputs)
    (whole, _) = assert_meta_is_true(captured.gm, model, x, norm, limits * 0, center, base)
    torch.testing.assert_close(whole, model(x).detach(), rtol=1e-5, atol=1e-5)
    if module is not Three:
        return
    output, read = assert_meta_is_true(captured.gm, model, x, norm, limits, center, base)
    kept = x.where(x.abs() > 0.5, 0.0)
    torch.testing.assert_close(output, model(kept).detach(), rtol=1e-5, atol=1e-5)
    assert read.tolist() == [int((x.abs() > 0.5).flatten(0, 1).any(0).sum())]
    center, base = torch.randn(1, width) / 2, torch.randn(1, outputs)
    (moved, _) = assert_meta_is_true(captured.gm, model, x, norm, limits, center, base)
    kept = (x - center).where((x - center).abs() > 0.5, 0.0)
    model.q.bias.data += base[0, :8]
    model.bias.data += base[0, 8:13]
    expected = model(kept).detach()
    expected[..., 13:] += base[0, 13:]
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-5)


class Flat(Three):
    """Rows of all sequences are one axis for the linears."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, 16)).view(*x.shape[:2], -1)


@pytest.mark.parametrize("module", [Three, Flat])
@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_tokens_of_a_batch_are_measured_by_position(module: type[Three], scope: str) -> None:
    torch.manual_seed(0)
    model, x = module().eval(), torch.randn(3, 7, 16) + torch.randn(16)
    captured = capture_module(model, (x,))
    groups = find_input_groups(captured, [])
    append_statistics(captured, groups, scope)
    width, lead = segment_offsets(groups)[-1][1], 1 if scope == "batch" else 3
    known = torch.zeros(lead, 2 * width + 1, dtype=torch.float64)
    norm = torch.rand(width)
    y, *measured = assert_meta_is_true(captured.gm, model, x, norm, known)
    torch.testing.assert_close(y, model(x).detach())
    assert width == 16
    expected = measure_inputs(x, norm, None, known)
    for histogram, right in zip(measured, expected, strict=True):
        torch.testing.assert_close(histogram, right)
    assert len(measured[1]) == lead and measured[1][:, :BINS].sum() == x.numel()

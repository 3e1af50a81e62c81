"""The threshold pass alone: linears that share an input are one op, if nothing is in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from popc.analysis.capture import capture_dynamo, capture_module
from popc.analysis.input_groups import find_input_groups
from popc.analysis.tokens import rows_of
from popc.ops import measure_inputs, threshold_linear, threshold_linears, triton_gather
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
    values = {linear.node: linear.node.meta["val"] for group in groups for linear in group.linears}
    dense = {node: (value.shape, value.stride()) for node, value in values.items()}
    rewrite_linears(captured, groups, "batch", counting=True)
    for node, (size, stride) in dense.items():
        assert (node.meta["val"].shape, node.meta["val"].stride()) == (size, stride)
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


@pytest.mark.parametrize("served", [False, True])
def test_a_group_has_its_parts_made_once(monkeypatch: pytest.MonkeyPatch, served: bool) -> None:
    """One op takes them, or, where Triton serves, one for each linear."""
    monkeypatch.setattr(triton_gather, "serves", lambda *_: served)
    captured = capture_module(Three().eval(), (torch.randn(3, 1, 16),))
    rewrite_linears(captured, find_input_groups(captured, []), "batch", counting=True)
    inputs = {node.target: node for node in captured.gm.graph.find_nodes(op="placeholder")}
    takers = 3 if served else 1
    for name in ("popc_scale", "popc_threshold", "popc_center"):
        (part,) = inputs[name].users
        assert len(part.users) == takers + 1  # the count
    assert [len(part.users) for part in inputs["popc_base"].users] == [1] * takers


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


class FlatMlp(nn.Module):
    """Rows of all sequences are one axis, from one group of linears to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = x.reshape(-1, 16)
        return self.down(self.gate(h).relu() * self.up(h)).view(x.shape)


def test_rows_are_followed_through_joined_linears() -> None:
    captured = capture_module(FlatMlp().eval(), (torch.randn(3, 7, 16),))
    groups = find_input_groups(captured, [])
    before = [rows_of(group.x) for group in groups]
    rewrite_linears(captured, groups, "batch", counting=False)
    assert [rows_of(group.x) for group in groups] == before
    assert all(rows is not None and rows.is_plain for rows in before)


@pytest.mark.parametrize("module", [Three, FlatMlp])
@pytest.mark.parametrize("dims", [(0,), (1,), (0, 1)])
@torch.no_grad()
def test_sizes_may_be_symbolic(module: type[nn.Module], dims: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, seen = module().eval(), []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        captured = capture_dynamo(gm, inputs)
        groups = find_input_groups(captured, [])
        rewrite_linears(captured, groups, "batch", counting=False)
        seen.append([node.target for node in captured.gm.graph.nodes])
        width = segment_offsets(groups)[-1][1]
        outputs = sum(linear.outputs for group in groups for linear in group.linears)
        fed = torch.ones(width), torch.full((len(groups), 1), -1.0)
        return lambda *args: captured.gm(
            *args, *fed, torch.zeros(1, width), torch.zeros(1, outputs)
        )

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for sizes in ((3, 5), (4, 9)):
        x = torch.randn(*(size if i in dims else 2 for i, size in enumerate(sizes)), 16)
        for dim in dims:
            torch._dynamo.mark_dynamic(x, dim)
        y = compiled(x)
        torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-5)
        assert y.stride() == model(x).stride()
    (targets,) = seen
    assert threshold_linears in targets and torch.ops.aten.sym_size.int in targets

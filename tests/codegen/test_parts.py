"""Slices of inputs that become inputs."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from popc.codegen.parts import Parts, hoist_parts

aten = torch.ops.aten


def traced(function, *inputs: Tensor) -> fx.GraphModule:
    return make_fx(function, tracing_mode="fake", pre_dispatch=True)(*inputs)


def test_parts_become_inputs_and_are_kept() -> None:
    def model(x: Tensor, norms: Tensor) -> Tensor:
        return x * norms[1:3] + norms[3:5] + x[0]

    x, norms = torch.randn(2), torch.randn(6)
    gm = traced(model, x, norms)
    placeholders = gm.graph.find_nodes(op="placeholder")
    found = hoist_parts(gm, placeholders[1:])
    assert [(part.index, part.args) for part in found] == [(1, (0, 1, 3)), (1, (0, 3, 5))]
    assert all(n.args[0] is placeholders[0] for n in gm.graph.nodes if n.target == aten.select.int)
    parts = Parts(found)
    made = parts([x, norms])
    assert torch.equal(gm(x, norms, *made), model(x, norms))
    assert all(a is b for a, b in zip(made, parts([torch.randn(2), norms]), strict=True))
    other = torch.randn(6)
    assert torch.equal(gm(x, other, *parts([x, other])), model(x, other))


def test_what_is_written_stays_in_the_graph() -> None:
    def model(x: Tensor, norms: Tensor) -> Tensor:
        norms.add_(1)
        return x * norms[1:3]

    gm = traced(model, torch.randn(2), torch.randn(6))
    assert hoist_parts(gm, gm.graph.find_nodes(op="placeholder")[1:]) == []


def test_parts_with_sizes_of_the_call_stay_in_the_graph() -> None:
    def model(x: Tensor, norms: Tensor) -> Tensor:
        return norms[: x.shape[0]] * x

    gm = make_fx(model, tracing_mode="symbolic", pre_dispatch=True)(torch.randn(3), torch.randn(6))
    assert hoist_parts(gm, gm.graph.find_nodes(op="placeholder")) == []

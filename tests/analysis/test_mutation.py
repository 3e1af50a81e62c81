"""Dependencies through memory: what is written in place, and who reads it later."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from popc.analysis.capture import Captured, capture_dynamo
from popc.analysis.input_groups import find_input_groups
from popc.analysis.mutation import depends_on


class State(nn.Module):
    """Two linears of one input; the second reaches the output only through a buffer's slice."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)
        self.out = nn.Linear(4, 6, bias=False)
        self.late = late

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(3, 2, 4)
        gate = self.two(x)
        if self.late:
            y = self.out(self.one(x) + state[:, 1])
            state[:, 1] = gate
            return y + state.sum()
        state[:, 1] = gate
        return self.out(self.one(x) + state.sum(1))


def captured_state(late: bool) -> Captured:
    graphs: list[Captured] = []

    def backend(gm: fx.GraphModule, inputs: list[object]) -> fx.GraphModule:
        graphs.append(capture_dynamo(gm, inputs))
        return gm

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(State(late).eval(), backend=backend)(torch.randn(3, 8))
    return graphs[0]


def linears(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.target is torch.ops.aten.linear.default]


def test_a_slice_that_is_written_leads_to_its_reader() -> None:
    captured = captured_state(late=False)
    two, one, out = linears(captured.gm.graph)
    dependencies = depends_on(captured.gm.graph, [out])
    assert two in dependencies and one in dependencies and out not in dependencies


def test_a_write_after_the_read_does_not() -> None:
    captured = captured_state(late=True)
    two, one, out = linears(captured.gm.graph)
    dependencies = depends_on(captured.gm.graph, [out])
    assert two not in dependencies and one in dependencies


def test_linears_of_one_input_are_one_group() -> None:
    captured = captured_state(late=False)
    groups = find_input_groups(captured, [])
    assert [(group.kind, len(group.linears)) for group in groups] == [("other", 2), ("head", 1)]

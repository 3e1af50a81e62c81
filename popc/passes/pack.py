"""Pack pass: for devices without a gather kernel, listed rows of weights are copied once a prompt.

A plain ATen gather copies what it reads in every step. Here the copies become inputs of the decode
graph: they are made when the partition is, and a step is a linear with a smaller weight, near the
byte limit too. The price is memory, a copy of the live rows for each session; and ``down`` is read
at all live columns, of which those that the token leaves out meet zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from popc.analysis.capture import Captured
from popc.analysis.propagation import shape
from popc.ops import gather_linear, native, select_units, triton_gather
from popc.passes.builder import GraphBuilder, add_input, finish, replace

aten = torch.ops.aten

Packer = Callable[[Sequence[Any]], Sequence[Tensor]]


def has_kernel(device: torch.device) -> bool:
    """Whether gathers read rows in place on this device."""
    if device.type == "cpu":
        return native.load()
    return device.type == "cuda" and triton_gather.available()


def pack_weights(captured: Captured) -> Packer | None:
    """Let gathers that share one list for the batch read copies, which become the last inputs.

    Returns:
        What makes the copies from the graph's other inputs; None where there is nothing to copy.
        Gathers of experts, after a gate, and with a list for each sequence stay as they are.
    """
    graph = captured.gm.graph
    recipe = _Recipe(captured)
    for node in graph.find_nodes(op="call_function", target=gather_linear):
        x, weight, bias, rows, columns, out_dim = node.args
        listed = _live(captured, columns) if columns is not None else rows
        if listed is None or len(shape(listed)) != 1 or (rows is not None and columns is not None):
            continue
        if listed.target is select_units:  # rows that this very token chose
            continue
        dim = out_dim if columns is None else 1 - out_dim
        held = recipe.add(weight, dim, listed)
        with graph.inserting_before(node):
            emit = GraphBuilder(captured, node)
            turned = held if out_dim == 0 else emit.call(aten.t.default, held)
            y = (
                _by_rows(emit, x, turned, bias, rows, node)
                if columns is None
                else _by_columns(emit, x, turned, bias, listed, columns)
            )
        replace(node, y)
    if not recipe.outputs:
        return None
    packer = recipe.build()
    finish(captured)
    return packer


def _by_rows(
    emit: GraphBuilder,
    x: fx.Node,
    held: fx.Node,
    bias: fx.Node | None,
    rows: fx.Node,
    node: fx.Node,
) -> fx.Node:
    part = None if bias is None else emit.call(aten.index_select.default, bias, 0, rows)
    y = emit.call(aten.linear.default, x, held, part)
    sizes = [emit.size(x, d) for d in range(len(shape(x)) - 1)]
    zeros = emit.call(aten.new_zeros.default, y, [*sizes, shape(node)[-1]])
    return emit.call(aten.index_copy.default, zeros, -1, rows, y)


def _by_columns(
    emit: GraphBuilder,
    x: fx.Node,
    held: fx.Node,
    bias: fx.Node | None,
    listed: fx.Node,
    columns: fx.Node,
) -> fx.Node:
    # By copying, not by a product with 0: NaN in a channel that is left out counts for nothing.
    zeros = emit.call(aten.zeros_like.default, x)
    kept = emit.call(aten.index_select.default, x, -1, columns)
    masked = emit.call(aten.index_copy.default, zeros, -1, columns, kept)
    live = emit.call(aten.index_select.default, masked, -1, listed)
    return emit.call(aten.linear.default, live, held, bias)


def _live(captured: Captured, active: fx.Node) -> fx.Node | None:
    """All columns that ``active``, a token's choice, is made from; None if it is no choice."""
    if active.target is select_units:
        columns = active.args[2]
        assert isinstance(columns, fx.Node)
        if len(shape(columns)) != 2:
            return None
        with captured.gm.graph.inserting_after(columns):
            return GraphBuilder(captured, active).call(aten.reshape.default, columns, [-1])
    if active.target is aten.cat.default:
        parts = active.args[0]
        assert isinstance(parts, list | tuple)
        found = [_live(captured, part) or part for part in parts if isinstance(part, fx.Node)]
        if any(len(shape(part)) != 1 for part in found):
            return None
        with captured.gm.graph.inserting_before(active):
            return GraphBuilder(captured, active).call(aten.cat.default, found, -1)
    return None


class _Recipe:
    """A graph of its own that makes the copies from the inputs of the decode graph."""

    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        self.outputs: list[fx.Node] = []
        for node in captured.gm.graph.find_nodes(op="placeholder"):
            self.copies[node] = self.graph.placeholder(node.name)

    def add(self, weight: fx.Node, dim: int, listed: fx.Node) -> fx.Node:
        """The input of the decode graph that holds ``weight`` at ``listed`` of ``dim``."""
        args = (self._copied(weight), dim, self._copied(listed))
        self.outputs.append(self.graph.call_function(aten.index_select.default, args))
        with self.captured.fake_mode:
            value = aten.index_select(weight.meta["val"], dim, listed.meta["val"])
        return add_input(self.captured, f"popc_packed_{len(self.outputs) - 1}", value)

    def build(self) -> Packer:
        self.graph.output(tuple(self.outputs))
        self.graph.eliminate_dead_code()
        made = fx.GraphModule(torch.nn.Module(), self.graph)
        return lambda inputs: made(*inputs)

    def _copied(self, node: fx.Node) -> fx.Node:
        if node not in self.copies:
            for before in node.all_input_nodes:
                self._copied(before)
            self.copies[node] = self.graph.node_copy(node, self.copies.__getitem__)
        return self.copies[node]

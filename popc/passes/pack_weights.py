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
from popc.passes.base import UNCHANGED, Binding, Call, PassResult, State
from popc.passes.builder import GraphBuilder, add_input, finish, replace
from popc.planning.rewrite_plan import RewritePlan

aten = torch.ops.aten

Packer = Callable[[Sequence[Any]], Sequence[Tensor]]


def has_kernel(device: torch.device) -> bool:
    """Whether gathers read rows in place on this device."""
    if device.type == "cpu":
        return native.load()
    return device.type == "cuda" and triton_gather.available()


def pack_weights(captured: Captured, work: RewritePlan) -> PassResult:
    """Copy what gathers list, where the device has no kernel for them."""
    if not work.pruned or work.device is None or has_kernel(work.device):
        return UNCHANGED
    packer, count = copy_listed_rows(captured)
    return PassResult(count, None if packer is None else _Copies(packer))


class _Copies(Binding[State]):
    """Feeds the copies that go with a partition."""

    prunes = True

    def __init__(self, packer: Packer) -> None:
        self.packer = packer

    def state(self, args: Sequence[Any]) -> State:
        return State(owners=())

    def feed(self, call: Call, state: State) -> Sequence[Tensor]:
        partition = call.partition
        assert partition is not None  # prune_units runs before
        if partition.weights is None:
            partition.weights = self.packer(call.inputs)
        return partition.weights


def copy_listed_rows(captured: Captured) -> tuple[Packer | None, int]:
    """Let gathers that share one list for the batch read copies, which become the last inputs.

    Returns:
        What makes the copies from the graph's other inputs, and how many there are; None and 0
        where there is nothing to copy.
        Gathers of experts, after a gate, and with a list for each sequence stay as they are.
    """
    graph = captured.gm.graph
    recipe = _Recipe(captured)
    for node in graph.find_nodes(op="call_function", target=gather_linear):
        x, weight, bias, rows, columns, out_dim = node.args
        listed = _live_list(captured, columns) if columns is not None else rows
        if listed is None or len(shape(listed)) != 1 or (rows is not None and columns is not None):
            continue
        if listed.target is select_units:  # rows that this very token chose
            continue
        dim = out_dim if columns is None else 1 - out_dim
        packed = recipe.add(weight, dim, listed)
        with graph.inserting_before(node):
            builder = GraphBuilder(captured, node)
            weight_nk = packed if out_dim == 0 else builder.call(aten.t.default, packed)
            y = (
                _by_rows(builder, x, weight_nk, bias, rows, node)
                if columns is None
                else _by_columns(builder, x, weight_nk, bias, listed, columns)
            )
        replace(node, y)
    if not recipe.outputs:
        return None, 0
    packer = recipe.build()
    finish(captured)
    return packer, len(recipe.outputs)


def _by_rows(
    builder: GraphBuilder,
    x: fx.Node,
    packed: fx.Node,
    bias: fx.Node | None,
    rows: fx.Node,
    node: fx.Node,
) -> fx.Node:
    packed_bias = None if bias is None else builder.call(aten.index_select.default, bias, 0, rows)
    y = builder.call(aten.linear.default, x, packed, packed_bias)
    sizes = [builder.size(x, d) for d in range(len(shape(x)) - 1)]
    zeros = builder.call(aten.new_zeros.default, y, [*sizes, shape(node)[-1]])
    return builder.call(aten.index_copy.default, zeros, -1, rows, y)


def _by_columns(
    builder: GraphBuilder,
    x: fx.Node,
    packed: fx.Node,
    bias: fx.Node | None,
    listed: fx.Node,
    columns: fx.Node,
) -> fx.Node:
    # By copying, not by a product with 0: NaN in a channel that is left out counts for nothing.
    zeros = builder.call(aten.zeros_like.default, x)
    active = builder.call(aten.index_select.default, x, -1, columns)
    masked = builder.call(aten.index_copy.default, zeros, -1, columns, active)
    live = builder.call(aten.index_select.default, masked, -1, listed)
    return builder.call(aten.linear.default, live, packed, bias)


def _live_list(captured: Captured, active: fx.Node) -> fx.Node | None:
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
        lists = [_live_list(captured, part) or part for part in parts if isinstance(part, fx.Node)]
        if any(len(shape(part)) != 1 for part in lists):
            return None
        with captured.gm.graph.inserting_before(active):
            return GraphBuilder(captured, active).call(aten.cat.default, lists, -1)
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
        args = (self._copy(weight), dim, self._copy(listed))
        self.outputs.append(self.graph.call_function(aten.index_select.default, args))
        with self.captured.fake_mode:
            value = aten.index_select(weight.meta["val"], dim, listed.meta["val"])
        return add_input(self.captured, f"popc_packed_{len(self.outputs) - 1}", value)

    def build(self) -> Packer:
        self.graph.output(tuple(self.outputs))
        self.graph.eliminate_dead_code()
        made = fx.GraphModule(torch.nn.Module(), self.graph)
        return lambda inputs: made(*inputs)

    def _copy(self, node: fx.Node) -> fx.Node:
        if node not in self.copies:
            for before in node.all_input_nodes:
                self._copy(before)
            self.copies[node] = self.graph.node_copy(node, self.copies.__getitem__)
        return self.copies[node]

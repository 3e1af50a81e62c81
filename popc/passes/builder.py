"""Write nodes whose ``meta["val"]`` is right from the start.

A pass never puts another node in the place of one that it rewrites: it changes the node itself, by
:func:`replace`. What the analysis found, as the ``x`` of a linear, is held by node, and one pass
after another reads it: so whoever holds a node still holds its value, rewritten or not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from popc.analysis.capture import Captured, drop_dead

aten = torch.ops.aten


class GraphBuilder:
    """Adds nodes to a graph before a given place; each gets its fake value at once."""

    def __init__(self, captured: Captured, like: fx.Node) -> None:
        self.graph = captured.gm.graph
        self.mode = captured.fake_mode
        self.like = like

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A ``call_function`` node; module path and stack trace are those of ``like``.

        What the op raises where it refuses these arguments comes through: the rewrite is not valid.
        """
        node = self.graph.call_function(target, args, kwargs)
        for key in ("nn_module_stack", "stack_trace"):
            if key in self.like.meta:
                node.meta[key] = self.like.meta[key]
        fake_args, fake_kwargs = map_arguments(args, kwargs, lambda n: n.meta["val"])
        with self.mode:
            node.meta["val"] = target(*fake_args, **fake_kwargs)
        return node

    def change(self, node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> None:
        """Make ``node`` compute ``target(...)``."""
        replace(node, self.call(target, *args, **kwargs))

    def splice(self, function: Callable[..., Any], *values: fx.Node) -> fx.Node:
        """``function`` of ``values`` as nodes: traced once on their fake values."""
        with self.mode:
            traced = make_fx(function)(*(value.meta["val"] for value in values))
        inputs = iter(values)
        copied: dict[fx.Node, fx.Node] = {}
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                copied[node] = next(inputs)
            elif node.op == "output":
                return copied[node.args[0]]
            else:
                args, kwargs = map_arguments(node.args, node.kwargs, copied.__getitem__)
                copied[node] = self.call(node.target, *args, **kwargs)
        raise AssertionError("a graph has an output")

    def part(self, values: fx.Node, start: int, stop: int, like: fx.Node) -> fx.Node:
        """Columns of ``values [..., Σ]``, for all or for each sequence, to go with ``like
        [B, ..., K]``: of its rank and dtype."""
        part = self.call(aten.slice.Tensor, values, -1, start, stop)
        sizes = [-1, *([1] * (like.meta["val"].dim() - 2)), stop - start]
        part = self.call(aten.view.default, part, sizes)
        return self.call(aten.to.dtype, part, like.meta["val"].dtype)

    def size(self, value: fx.Node, dim: int) -> Any:
        """A size of ``value`` as an argument: a number, or a node where it is symbolic."""
        size = value.meta["val"].shape[dim]
        return size if isinstance(size, int) else self.call(aten.sym_size.int, value, dim)


def replace(node: fx.Node, made: fx.Node) -> None:
    """Make ``node`` compute what ``made`` does, a node written for this alone, which goes."""
    node.target, node.args, node.kwargs = made.target, made.args, made.kwargs
    node.meta["val"] = made.meta["val"]
    made.graph.erase_node(made)


def following(*nodes: fx.Node) -> fx.Node:
    """The first node after all of ``nodes`` that is no input: what is written before it can read
    them."""
    order = {node: i for i, node in enumerate(nodes[0].graph.nodes)}
    node = max(nodes, key=order.__getitem__).next
    while node.op == "placeholder":
        node = node.next
    return node


def map_arguments(
    args: Any, kwargs: Any, change: Callable[[fx.Node], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``args`` and ``kwargs`` with ``change`` applied to every node in them."""
    return tuple(fx.map_arg(args, change)), dict(fx.map_arg(kwargs, change))


def add_input(captured: Captured, name: str, value: torch.Tensor) -> fx.Node:
    """A new last placeholder with fake ``value``."""
    graph = captured.gm.graph
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    node.meta["val"] = value
    return node


def append_output(captured: Captured, target: Any, *args: Any) -> None:
    """A new last output: ``target(*args)``."""
    output = captured.gm.graph.output_node()
    with captured.gm.graph.inserting_before(output):
        append_outputs(captured, GraphBuilder(captured, output).call(target, *args))


def append_outputs(captured: Captured, *added: fx.Node) -> None:
    """Values of the graph as new last outputs."""
    output = captured.gm.graph.output_node()
    (values,) = output.args
    output.args = ((*values, *added),)  # type: ignore[misc]


def finish(captured: Captured) -> None:
    """Drop what the rewrite left dead, check the graph, and make it callable."""
    graph = captured.gm.graph
    # Keeps unused placeholders: the calling convention is not the pass's to change.
    drop_dead(graph)
    graph.lint()
    captured.gm.recompile()

"""What writes to what in place, by the ops' schemas: dependencies that no argument shows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from operator import getitem
from typing import Any

import torch
from torch import fx

from popc.compat import pytree


def writes_first(node: fx.Node) -> bool:
    """Whether ``node`` writes to its first argument."""
    alias = _first_alias(node)
    return _writes_by_name(node) if alias is None else alias.is_write


def writes(node: fx.Node) -> bool:
    """Whether ``node`` may write to some argument; what tells nothing of that, as another graph,
    may."""
    if node.op not in ("call_function", "call_method") or node.target is getitem:
        return False
    schema = getattr(node.target, "_schema", None)
    return bool(schema.is_mutable) if schema is not None else not _is_symbolic(node)


def written_by(node: fx.Node) -> list[fx.Node]:
    """The arguments that ``node`` may write to: of what tells nothing of that, all."""
    if not writes(node):
        return []
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return node.all_input_nodes
    given = {
        **dict(zip((a.name for a in schema.arguments), node.args, strict=False)),
        **node.kwargs,
    }
    written = [
        given.get(argument.name)
        for argument in schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return [leaf for leaf in pytree.tree_leaves(written) if isinstance(leaf, fx.Node)]


def is_mutable(node: fx.Node) -> bool:
    """Whether the op's schema says that it writes to an argument."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def may_alias(node: fx.Node) -> bool:
    """Whether the op's output can share memory with an input, as a view does."""
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(ret.alias_info is not None for ret in schema.returns)


def is_written(node: fx.Node) -> bool:
    """Whether the graph writes to what ``node`` gives, be it through a view of it."""
    for user in node.users:
        if user.args[:1] == (node,) and (
            writes_first(user) or (views_first(user) and is_written(user))
        ):
            return True
    return False


def _writes_by_name(node: fx.Node) -> bool:
    """For what has no schema, as calls on tensor subclasses: ``add_``, ``setitem``, ``iadd``."""
    if hasattr(node.target, "_schema") or node.op not in ("call_function", "call_method"):
        return False
    name = str(getattr(node.target, "__name__", node.target)).strip()
    inplace = name.endswith("_") and not name.endswith("__")
    return inplace or name.strip("_") in ("setitem", *(f"i{op}" for op in ("add", "sub", "mul")))


def _is_symbolic(node: fx.Node) -> bool:
    """Whether it computes a size, by a function of Python's."""
    return not isinstance(node.meta.get("val"), torch.Tensor | tuple | list | None)


class Written:
    """Where in a graph something is written, by the nodes that ``counts`` is true of."""

    def __init__(self, graph: fx.Graph, counts: Callable[[fx.Node], bool]) -> None:
        self._place = {node: i for i, node in enumerate(graph.nodes)}
        self._at = [place for node, place in self._place.items() if counts(node)]

    def between(self, first: fx.Node, last: fx.Node) -> bool:
        """Whether a write comes after ``first`` and before ``last``."""
        return any(self._place[first] < at < self._place[last] for at in self._at)


def views_first(node: fx.Node) -> bool:
    """Whether what ``node`` gives may share memory with its first argument."""
    return node.target is getitem or _first_alias(node) is not None


def bases(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Of each node, the one whose memory its value may be in."""
    base: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        first = node.args[0] if node.args and views_first(node) else node
        base[node] = base.get(first, node) if isinstance(first, fx.Node) else node
    return base


def depends_on(graph: fx.Graph, nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """All nodes that ``nodes`` depend on, by arguments or by what was written to them before."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    base = bases(graph)
    writers: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in filter(writes_first, graph.nodes):
        writers[base[node]].append(node)
    seen: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        for source in node.all_input_nodes:
            written = [w for w in writers[base[source]] if place[w] < place[node]]
            for dependency in (source, *written):
                if dependency not in seen:
                    seen.add(dependency)
                    stack.append(dependency)
    return seen


def _first_alias(node: fx.Node) -> Any:
    schema = getattr(node.target, "_schema", None)
    return schema.arguments[0].alias_info if schema is not None and schema.arguments else None

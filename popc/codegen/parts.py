"""Slices of a graph's inputs that are the same from token to token are made outside of its code.

popc feeds a graph the thresholds, centers and norms of all its linears in a few tensors, of which
each linear reads its own part. As inputs of the code the parts are made once, not at each token;
and layers whose parts stand at other offsets are the same code.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from popc.analysis.mutation import is_written

aten = torch.ops.aten


@dataclass(frozen=True)
class Part:
    """``take(input, *args)`` of the input at ``index``."""

    index: int
    take: Callable[..., Tensor]
    args: tuple[int, ...]


class Parts:
    """Makes the parts of a call's inputs; those of the same tensors are kept."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._sources = sorted({part.index for part in parts})
        self._known: tuple[list[Tensor], list[Tensor]] = [], []

    def __call__(self, args: Sequence[Any]) -> list[Tensor]:
        """Of a call with ``args``, in order."""
        sources = [args[i] for i in self._sources]
        before, made = self._known
        if len(before) != len(sources) or any(map(operator.is_not, before, sources)):
            made = [part.take(args[part.index], *part.args) for part in self._parts]
            self._known = sources, made  # replaced as a whole: other threads may read it
        return made


def hoist_parts(gm: fx.GraphModule, fed: Collection[fx.Node]) -> list[Part]:
    """Turn parts of the inputs ``fed`` into inputs that follow all others, in place.

    Args:
        fed: placeholders whose tensors stay the same objects from token to token.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    index = {node: i for i, node in enumerate(placeholders)}
    parts, last = [], placeholders[-1] if placeholders else None
    for node in list(gm.graph.nodes):
        if not _is_part(node) or node.args[0] not in fed:
            continue
        source = node.all_input_nodes[0]
        if is_written(source):
            continue
        assert last is not None
        with gm.graph.inserting_after(last):
            last = gm.graph.placeholder(node.name)
        # As an input it begins where it begins: at which offset of its source is not the code's.
        value = node.meta["val"]
        last.meta["val"] = value.new_empty_strided(value.shape, value.stride())
        parts.append(Part(index[source], node.target, node.args[1:]))
        node.replace_all_uses_with(last)
        gm.graph.erase_node(node)
    if parts:
        gm.recompile()
    return parts


def _is_part(node: fx.Node) -> bool:
    views = aten.slice.Tensor, aten.select.int
    return node.target in views and all(type(arg) is int for arg in node.args[1:])

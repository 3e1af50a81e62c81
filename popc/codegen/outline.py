"""A graph as a sequence of calls of pieces: layers that are alike are one piece, compiled once.

:func:`outline` cuts a graph where :mod:`popc.codegen.repeats` says, and makes a graph of each
stretch: what it reads from elsewhere are its inputs, what others read of it its outputs. Pieces of
a repeated stretch are one if each input is, in all repetitions, of the same dtype, shape, strides
and place among the others. In-place writes stay where they are, and calls keep their order.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from popc.analysis.mutation import bases, written_by
from popc.codegen.kinds import Correspondence, symbols_of, told_by, value_kind
from popc.codegen.repeats import Stretch, find_repeats
from popc.log import logger

# An input of a piece: what it is in each of its calls.
Column = tuple[fx.Node, ...]


@dataclass(frozen=True)
class Call:
    """A call of piece ``piece``: which nodes of the whole graph are its inputs and outputs."""

    piece: int
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Outline:
    """The pieces of a graph, and the calls of them that compute what it does.

    Attributes:
        own_sizes: of each piece, the symbols of its first call that are others in other calls.
    """

    pieces: Sequence[fx.GraphModule]
    calls: Sequence[Call]
    own_sizes: Sequence[set[Any]]

    def repetitions(self, piece: int) -> int:
        """How often a piece is called."""
        return sum(call.piece == piece for call in self.calls)


class CannotShare(Exception):
    """The graph must be compiled as a whole."""


def outline(gm: fx.GraphModule) -> Outline | None:
    """``gm`` in pieces; None if nothing in it is repeated, or can't be shared."""
    nodes = [node for node in gm.graph.nodes if _computes(gm, node)]
    stretches = find_repeats(nodes)
    if all(stretch.count == 1 for stretch in stretches):
        return None
    try:
        return _Cutter(gm, nodes, stretches).outline()
    except CannotShare as reason:
        logger.info("layers are not shared: %s", reason)
        return None


def _computes(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether it belongs to a piece: inputs and constant tensors belong to none."""
    if node.op == "get_attr":
        return isinstance(operator.attrgetter(str(node.target))(gm), fx.GraphModule)
    return node.op not in ("placeholder", "output")


class _Cutter:
    def __init__(
        self, gm: fx.GraphModule, nodes: Sequence[fx.Node], stretches: Sequence[Stretch]
    ) -> None:
        self.gm, self.nodes, self.stretches = gm, nodes, stretches
        # The number of its call, and its place in it.
        self.place: dict[fx.Node, tuple[int, int]] = {}
        self.ranges: list[tuple[int, int]] = []  # of each call, in nodes
        for stretch in stretches:
            for start in range(stretch.start, stretch.stop, stretch.length):
                for i in range(stretch.length):
                    self.place[nodes[start + i]] = len(self.ranges), i
                self.ranges.append((start, start + stretch.length))
        self.base = bases(gm.graph)
        self.written: set[fx.Node] = set()  # of bases
        self.symbols = _symbols(gm.graph)

    def outline(self) -> Outline:
        """See :func:`outline`."""
        self._check_writes()
        pieces: list[fx.GraphModule] = []
        calls: list[Call] = []
        own_sizes = []
        for stretch in self.stretches:
            numbers = range(len(calls), len(calls) + stretch.count)
            columns, symbols = self._columns(numbers)
            own_sizes.append({s for call in symbols for s in call.symbols if call.of(s) != s})
            results = self._results(numbers)
            pieces.append(self._piece(numbers, columns, results))
            for i, number in enumerate(numbers):
                own = self._of_call(number)
                inputs = tuple(column[i] for column in columns)
                calls.append(Call(len(pieces) - 1, inputs, tuple(own[j] for j in results)))
        return Outline(pieces, calls, own_sizes)

    def _of_call(self, number: int) -> Sequence[fx.Node]:
        start, stop = self.ranges[number]
        return self.nodes[start:stop]

    def _check_writes(self) -> None:
        """A piece may write to what it made and to inputs of the graph: what another piece made
        and returns need not be where that one had it."""
        for node in self.nodes:
            if node.is_impure() and not hasattr(node.target, "_schema"):
                raise CannotShare(f"{node} changes a state, such as autocast's, for those after it")
            for source in written_by(node):
                base = self.base[source]
                self.written.add(base)
                if base in self.place and self.place[base][0] != self.place[node][0]:
                    raise CannotShare(f"{node} writes to {base}, of another piece")

    def _columns(self, numbers: range) -> tuple[list[Column], list[Correspondence]]:
        """The inputs of a piece, and for each of its calls what sizes are called in it."""
        columns: dict[Column, None] = {}
        for nodes in zip(*map(self._of_call, numbers), strict=True):
            for sources in zip(*map(_read_by, nodes), strict=True):
                if not self._is_internal(numbers, sources):
                    columns.setdefault(sources)
        for column in columns:
            if len({value_kind(source.meta.get("val")) for source in column}) > 1:
                raise CannotShare(f"{column[0]} is of another kind in other layers")
        symbols = self._correspondences(numbers, list(columns))
        for column in self._missing_symbols(numbers, list(columns), symbols):
            columns.setdefault(column)
        self._check_aliases(list(columns))
        return list(columns), symbols

    def _is_internal(self, numbers: range, sources: Column) -> bool:
        """Whether each call has made what it reads there by itself, at the same place."""
        places = [self.place.get(source, (-1, -1)) for source in sources]
        internal = [at[0] == n for at, n in zip(places, numbers, strict=True)]
        if any(internal) and (not all(internal) or len({i for _, i in places}) > 1):
            raise CannotShare(f"where {sources[0]} is read, other layers read another value")
        return all(internal)

    def _check_aliases(self, columns: Sequence[Column]) -> None:
        """Which inputs share memory is part of the code, where they are written to."""
        patterns = set()
        for inputs in zip(*columns, strict=True):
            written = [node for node in inputs if self.base[node] in self.written]
            memory = [self.base[node] for node in written]
            patterns.add(tuple(map(memory.index, memory)))
            if len(set(written)) < len(written):
                raise CannotShare("a layer is given the same twice, and writes to it")
        if len(patterns) > 1:
            raise CannotShare("inputs share memory in some layers and not in others")

    def _correspondences(self, numbers: range, columns: Sequence[Column]) -> list[Correspondence]:
        """Of each call, what the first one's symbols are in it."""
        found = []
        for i, number in enumerate(numbers):
            symbols = Correspondence()
            inputs = [(column[0], column[i]) for column in columns]
            own = zip(self._of_call(numbers[0]), self._of_call(number), strict=True)
            for first, node in (*inputs, *own):
                if not symbols.extend(first.meta.get("val"), node.meta.get("val")):
                    raise CannotShare(f"{node} is of another size than {first}")
            found.append(symbols)
        return found

    def _missing_symbols(
        self, numbers: range, columns: Sequence[Column], calls: Sequence[Correspondence]
    ) -> Iterator[Column]:
        """Nodes for the symbols that no size of an input tells."""
        own = self._of_call(numbers[0])
        used = {symbol for node in own for symbol in symbols_of(node.meta.get("val"))}
        known = {symbol for c in columns for symbol in told_by(c[0].meta.get("val"))}
        for symbol in sorted(used - known, key=str):
            nodes = [self.symbols.get(call.of(symbol)) for call in calls]
            if any(n is None or self.place.get(n, (-1, 0))[0] >= numbers[0] for n in nodes):
                raise CannotShare(f"no input tells {symbol}")
            yield tuple(node for node in nodes if node is not None)

    def _results(self, numbers: range) -> list[int]:
        """The places of what others read of a piece, in any of its calls."""
        used = set()
        for number in numbers:
            for i, node in enumerate(self._of_call(number)):
                if any(self.place.get(user, (-1, 0))[0] != number for user in node.users):
                    if isinstance(node.meta.get("val"), tuple | list):
                        raise CannotShare(f"{node} gives several values, read by another piece")
                    used.add(i)
        return sorted(used)

    def _piece(
        self, numbers: range, columns: Sequence[Column], results: Sequence[int]
    ) -> fx.GraphModule:
        """The graph of the first of the calls ``numbers``."""
        graph = fx.Graph()
        inputs: dict[Column, fx.Node] = {}
        seen: set[fx.Node] = set()
        for i, column in enumerate(columns):
            # What this call is given twice may be two tensors in another.
            first, again = column[0], column[0] in seen
            inputs[column] = graph.placeholder(f"{first.name}_as_{i}" if again else first.name)
            value = first.meta.get("val")
            inputs[column].meta["val"] = _another(value) if again else value
            seen.add(first)
        own = self._of_call(numbers[0])
        copied: dict[fx.Node, fx.Node] = {}
        for nodes in zip(*map(self._of_call, numbers), strict=True):
            rows = zip(*map(_read_by, nodes), strict=True)
            sources = iter([inputs.get(row) or copied[row[0]] for row in rows])
            copied[nodes[0]] = graph.node_copy(nodes[0], _one_after_another(sources))
        graph.output(tuple(copied[own[i]] for i in results))
        graph.lint()
        return fx.GraphModule(self.gm, graph)


def _one_after_another(nodes: Iterator[fx.Node]) -> Callable[[fx.Node], fx.Node]:
    return lambda _: next(nodes)


def _another(value: Any) -> Any:
    """A tensor of the same kind; what is no tensor, as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.new_empty_strided(value.shape, value.stride())


def _read_by(node: fx.Node) -> list[fx.Node]:
    """The nodes among its arguments, in order, each as often as it stands there."""
    read: list[fx.Node] = []

    def note(source: fx.Node) -> fx.Node:
        read.append(source)
        return source

    fx.map_arg(node.args, note)
    fx.map_arg(node.kwargs, note)
    return read


def _symbols(graph: fx.Graph) -> dict[Any, fx.Node]:
    """Of each symbol, the first input or number of the graph that tells it."""
    found: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" or not isinstance(value, torch.Tensor):
            for symbol in told_by(value):
                found.setdefault(symbol, node)
    return found

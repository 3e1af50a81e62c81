"""Runs a graph that was compiled in pieces."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from popc.codegen.outline import Outline

Piece = Callable[..., Sequence[Any]]


@dataclass(frozen=True)
class _Step:
    """A call: where its inputs and outputs are in the list of all values, and what it is the last
    to read."""

    run: Piece
    inputs: Callable[[Sequence[Any]], Sequence[Any]]
    outputs: Sequence[int]
    last_read: Sequence[int]


class Program:
    """Calls of compiled pieces, in order; takes and gives what the whole graph does."""

    def __init__(self, gm: fx.GraphModule, outline: Outline, compiled: Sequence[Piece]) -> None:
        placeholders = gm.graph.find_nodes(op="placeholder")
        constants = [node for node in gm.graph.nodes if node.op == "get_attr"]
        slots = {node: i for i, node in enumerate((*placeholders, *constants))}
        for call in outline.calls:
            for node in call.outputs:
                slots.setdefault(node, len(slots))
        self._constants = [operator.attrgetter(str(node.target))(gm) for node in constants]
        self._inputs, self._made = len(placeholders), len(slots) - len(placeholders)
        self._results = [_result(value, slots) for value in _outputs(gm.graph)]
        kept = {slots[node] for node in gm.graph.output_node().all_input_nodes}
        kept |= set(range(len(placeholders) + len(constants)))
        self._steps = list(_steps(outline, compiled, slots, kept))

    def __call__(self, *args: Any) -> Sequence[Any]:
        """The graph's outputs for its inputs ``args``."""
        values = [*args, *self._constants]
        values += [None] * (self._inputs + self._made - len(values))
        for step in self._steps:
            outputs = step.run(*step.inputs(values))
            for slot, value in zip(step.outputs, outputs, strict=True):
                values[slot] = value
            for slot in step.last_read:
                values[slot] = None
        return [result if slot is None else values[slot] for slot, result in self._results]


def _outputs(graph: fx.Graph) -> Sequence[Any]:
    (values,) = graph.output_node().args
    assert isinstance(values, tuple | list)
    return values


def _result(value: Any, slots: Mapping[fx.Node, int]) -> tuple[int | None, Any]:
    """The slot of an output; or none, and the constant that it is."""
    return (slots[value], None) if isinstance(value, fx.Node) else (None, value)


def _steps(
    outline: Outline, compiled: Sequence[Piece], slots: Mapping[fx.Node, int], kept: set[int]
) -> Iterator[_Step]:
    last = {slots[node]: i for i, call in enumerate(outline.calls) for node in call.inputs}
    for i, call in enumerate(outline.calls):
        inputs = [slots[node] for node in call.inputs]
        outputs = [slots[node] for node in call.outputs]
        done = [slot for slot in {*inputs, *outputs} - kept if last.get(slot, i) == i]
        yield _Step(compiled[call.piece], _getter(inputs), outputs, done)


def _getter(slots: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    if len(slots) > 1:
        return operator.itemgetter(*slots)
    return lambda values: [values[slot] for slot in slots]

"""Which stretches of a graph are repeated, one right after the other, as a model's layers are.

Nodes are compared by what they compute, never by names: the op, its constants, and the dtype, shape
and strides of what it gives. What they read is compared where code is shared: see
:mod:`popc.codegen.outline`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import fx

from popc.codegen.kinds import value_kind
from popc.compat import pytree

# What is repeated less often, or is shorter, costs more to call than it saves to compile.
MIN_COUNT = 3
MIN_NODES = 16


@dataclass(frozen=True)
class Stretch:
    """Nodes ``[start, start + count · length)``: ``count`` times the same, ``length`` each."""

    start: int
    length: int
    count: int = 1

    @property
    def stop(self) -> int:
        """Where the next one begins."""
        return self.start + self.length * self.count


def find_repeats(nodes: Sequence[fx.Node]) -> list[Stretch]:
    """``nodes`` cut into stretches, all of them in order, some of which are repeated."""
    kinds = _numbered([_kind(node) for node in nodes])
    return _cut(nodes, kinds, 0, len(nodes))


def _kind(node: fx.Node) -> Hashable:
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    constants = tuple(
        None if isinstance(leaf, fx.Node) else (type(leaf), str(leaf)) for leaf in leaves
    )
    return node.op, str(node.target), str(spec), constants, value_kind(node.meta.get("val"))


def _numbered(kinds: Sequence[Hashable]) -> list[int]:
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(kind, len(numbers)) for kind in kinds]


def _cut(nodes: Sequence[fx.Node], kinds: Sequence[int], start: int, stop: int) -> list[Stretch]:
    """``[start, stop)``: what repeats most of it, and likewise what is before and after that."""
    found = _most_repeated(kinds, start, stop)
    if found is None:
        return [Stretch(start, stop - start)] if start < stop else []
    found = _aligned(nodes, kinds, found, stop)
    before = _cut(nodes, kinds, start, found.start)
    return [*before, found, *_cut(nodes, kinds, found.stop, stop)]


def _most_repeated(kinds: Sequence[int], start: int, stop: int) -> Stretch | None:
    """The repeated stretch that leaves least to compile; of equal ones the shortest."""
    places: dict[int, list[int]] = {}
    for i in range(start, stop):
        places.setdefault(kinds[i], []).append(i)
    lengths = {b - a for at in places.values() for a, b in pairwise(at)}
    best, most_saved = None, 0
    for length in sorted(lengths):
        if length < MIN_NODES:
            continue
        first = start  # of those that equal the ones `length` on
        for i in range(start, stop - length + 1):
            if i < stop - length and kinds[i] == kinds[i + length]:
                continue
            count = (i - first) // length + 1
            saved = (count - 1) * length
            if count >= MIN_COUNT and saved > most_saved:
                best, most_saved = Stretch(first, length, count), saved
            first = i + 1
    return best


def _aligned(nodes: Sequence[fx.Node], kinds: Sequence[int], found: Stretch, stop: int) -> Stretch:
    """``found``, moved to where fewest values pass from one repetition to the next."""
    last = found.start
    while last + found.count * found.length < stop and last < found.start + found.length - 1:
        if kinds[last] != kinds[last + found.count * found.length]:
            break
        last += 1
    place = {node: i for i, node in enumerate(nodes)}
    widths = []
    for first in range(found.start, last + 1):
        seam = first + found.length
        earlier = range(max(0, seam - found.length), seam)
        passing = [i for i in earlier if any(place.get(u, -1) >= seam for u in nodes[i].users)]
        widths.append((len(passing), first))
    return Stretch(min(widths)[1], found.length, found.count)

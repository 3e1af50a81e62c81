"""Linears by the input that they share: what can leave input channels out, token by token.

Every linear contracts its input's channels, so any of them may be left out where it is small. No
labels are needed for that, only what the linears of one input belong to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import fx

from popc.analysis.capture import Captured
from popc.analysis.findings import Region, record_of
from popc.analysis.linears import Linear, all_linears, uses_of_weights
from popc.analysis.mutation import depends_on
from popc.analysis.plan import InputRecord
from popc.analysis.propagation import shape
from popc.analysis.provenance import common, source_of, where
from popc.analysis.rules.traits import Trait, has


@dataclass(frozen=True, eq=False)
class InputGroup:
    """The linears that contract one value.

    Attributes:
        kind: ``"mlp"``, ``"attention"`` or ``"experts"``, after the region that they produce or
            consume; ``"head"`` where no other linear comes after in the model; else ``"other"``.
        name: where in the model, for people.
        x: what they read, ``[..., K]``; of experts in the form that the model has.
        linears: those that read it; each has one weight for all rows, or a stack of experts.
        key: the same in every graph that they are part of.
        alike: the same for groups of the same sizes, as those of other layers that do the same.
    """

    kind: str
    name: str
    x: fx.Node
    linears: tuple[Linear, ...]
    key: tuple[Any, ...]
    source: str = ""

    @property
    def width(self) -> int:
        """K, how many channels x has."""
        return self.linears[0].inputs

    @property
    def experts(self) -> int:
        """E, the number of experts whose weights are stacked; 0 in other groups."""
        experts = self.linears[0].experts
        return 0 if experts is None else experts.count

    @property
    def scale_count(self) -> int:
        """How many scores have a scale of their own: each channel, of each expert."""
        return self.width * max(1, self.experts)

    @property
    def alike(self) -> tuple[Any, ...]:
        """Equal for groups whose linears have the same sizes: its inputs, and outputs of each."""
        return (self.width, tuple(linear.outputs for linear in self.linears), self.experts)

    @cached_property
    def is_quantized(self) -> bool:
        """Whether all its weights are quantised and stored channel-major: read by grade."""
        return all(linear.weight.has_channel_planes for linear in self.linears)

    @cached_property
    def record(self) -> InputRecord:
        """The group as plain data."""
        linears = tuple(map(record_of, self.linears))
        return InputRecord(self.kind, self.name, linears, self.key, self.source)


def find_input_groups(captured: Captured, regions: Sequence[Region]) -> list[InputGroup]:
    """Every plain linear of a graph, grouped by what it reads, in graph order.

    Left out are linears that route, those of regions that run in one pass, and experts' linears,
    which have an input for each expert: but for those of quantised weights, of which each expert
    reads by grade.
    """
    kinds: dict[fx.Node, str] = {}
    once: set[fx.Node] = set()
    for region in regions:
        for linear in region.linears:
            kinds.setdefault(linear.node, region.kind)
            if region.one_pass:
                once.add(linear.node)
    linears = all_linears(captured)
    last = last_linears(captured, linears)
    groups: dict[tuple[fx.Node, str, fx.Node | None], list[Linear]] = {}
    for linear in linears:
        if not _can_leave_inputs(linear) or linear.node in once or routes(linear):
            continue
        default, selector = "head" if linear.node in last else "other", None
        if linear.experts is not None:
            default, selector = "experts", linear.experts.selector
        kind = kinds.get(linear.node, default)
        groups.setdefault((linear.x, kind, selector), []).append(linear)
    uses = uses_of_weights(linears)
    input_groups = []
    for (x, kind, _), members in groups.items():
        identities = tuple(linear.weight.identity for linear in members)
        name = common([where(linear.node) for linear in members])
        key = (identities, uses[members[0].node])
        source = source_of(members[0].node)
        input_groups.append(InputGroup(kind, name, x, tuple(members), key, source))
    return input_groups


def _can_leave_inputs(linear: Linear) -> bool:
    if linear.experts is not None:
        return linear.weight.has_channel_planes and linear.has_flat_rows
    return linear.x_dim == len(shape(linear.x)) - 1 == linear.y_dim


def last_linears(captured: Captured, linears: Sequence[Linear]) -> set[fx.Node]:
    """Those of ``linears``, all of a graph, which no other comes after in the model."""
    if captured.breaks_off:
        return set()
    nodes = [linear.node for linear in linears]
    return set(nodes) - set(depends_on(captured.gm.graph, nodes))


def routes(linear: Linear) -> bool:
    """Whether the output is small and decides a choice before any other product meets it."""
    stack, seen = list(linear.node.users), set()
    while stack:
        node = stack.pop()
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        if has(node, Trait.CHOICE):
            return True
        if all(source in seen or source is linear.node for source in node.all_input_nodes):
            stack += node.users
    return False

"""Gates: channels that are a product of two factors, of which one shows what the other is worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

from popc.analysis.linears import Linear
from popc.analysis.rules.traits import Trait, has

if TYPE_CHECKING:
    from popc.analysis.findings import Region

aten = torch.ops.aten

# What leaves each channel in its place, between the product and h; so does scaling it.
_IN_PLACE = Trait.RESHAPE | Trait.COPY | Trait.CAST | Trait.DROPOUT


@dataclass(frozen=True, eq=False)
class Gate:
    """``h = scored · other``, channel by channel; ``other`` is made by one linear alone.

    Attributes:
        scored: the factor that is computed first, as ``act(x gateᵀ)``.
        other: the factor of which then only the chosen channels are computed, as ``x upᵀ``.
        late: the linear that makes ``other``.
        path: the ops that make ``other`` of the linear's output, in graph order.
        product: the node that multiplies them.
    """

    scored: fx.Node
    other: fx.Node
    late: Linear
    path: tuple[fx.Node, ...]
    product: fx.Node


def find_gate(region: Region) -> Gate | None:
    """The gate of a region; None if it has none, or its factors order channels differently."""
    producers = {producer.linear.node: producer for producer in region.producers}
    origin: dict[fx.Node, frozenset[fx.Node]] = {node: frozenset([node]) for node in producers}
    product = None
    for node in region.body:
        sources = [origin[source] for source in node.all_input_nodes if source in origin]
        origin[node] = frozenset().union(*sources)
        if node.target is aten.mul.Tensor and len(sources) == 2:
            if sources[0].isdisjoint(sources[1]) and origin[node] == producers.keys():
                product = node
                break
    if product is None or not _stays_in_place(product, region):
        return None
    paths = {
        factor: tuple(
            n
            for n in region.body
            if n not in producers
            and n is not product
            and origin.get(n)
            and origin[n] <= origin[factor]
        )
        for factor in product.all_input_nodes
    }
    first, second = product.all_input_nodes
    # The factor with the activation comes first: it is the one that is often small.
    scored, other = (second, first) if len(paths[first]) < len(paths[second]) else (first, second)
    if len(origin[other]) != 1:
        return None
    (linear,) = origin[other]
    late = producers[linear]
    fits = late.rows.shape == region.columns.shape == (region.width, 1)
    if not fits or (late.rows != region.columns).any() or late.linear.outputs != region.width:
        return None
    moved = {linear, *paths[other]}
    if any(user not in moved and user is not product for node in moved for user in node.users):
        return None  # another op reads what is to be computed later
    return Gate(scored, other, late.linear, paths[other], product)


def _stays_in_place(product: fx.Node, region: Region) -> bool:
    """Whether h has the product's channels, each in the same place."""
    node = region.hidden
    while node is not product:
        sources = [source for source in node.all_input_nodes if source in region.body]
        kept = has(node, _IN_PLACE) or node.target is aten.mul.Tensor
        if not kept or len(sources) != 1:
            return False
        (node,) = sources
        if node.meta["val"].shape[-1] != region.width:
            return False
    return bool(product.meta["val"].shape[-1] == region.width)

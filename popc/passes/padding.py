"""Which rows of a hidden value are real tokens rather than padding, as nodes of the graph."""

from __future__ import annotations

from functools import partial

import torch
from torch import fx

from popc.analysis.capture import Captured
from popc.analysis.labels import same_size
from popc.analysis.propagation import shape
from popc.analysis.rules.traits import Trait, has
from popc.analysis.tokens import Mask, mask_of, rows_of, valid_tokens
from popc.passes.builder import GraphBuilder, following

aten = torch.ops.aten


def valid_rows_node(
    captured: Captured, hidden: fx.Node, before: fx.Node, memo: dict[Mask, fx.Node]
) -> fx.Node | None:
    """Bool, of the rank of ``hidden`` with size 1 in its channel dim; None: all rows are valid.

    Nodes go before ``before``; ``memo`` holds the node of each mask's valid tokens, right after it.
    """
    graph = captured.gm.graph
    mask, rows = mask_of(hidden, graph), rows_of(hidden)
    order = {node: i for i, node in enumerate(graph.nodes)}
    if mask is None or rows is None or order[mask.node] > order[before]:
        return None
    if mask not in memo:
        with graph.inserting_before(following(mask.node)):
            validity = partial(valid_tokens, hides=mask.hides)
            memo[mask] = GraphBuilder(captured, mask.node).splice(validity, mask.node)
    with graph.inserting_before(before):
        builder = GraphBuilder(captured, hidden)
        valid = memo[mask]
        if not same_size(shape(valid)[0], shape(rows.grid)[0]):  # one mask for all sequences
            valid = builder.call(aten.expand.default, valid, [builder.size(rows.grid, 0), -1])
        valid = builder.call(aten.unsqueeze.default, valid, -1)
        for step in rows.path:
            if has(step, Trait.RESHAPE):
                sizes = [builder.size(step, d) for d in range(len(shape(step)) - 1)]
                valid = builder.call(aten.reshape.default, valid, [*sizes, 1])
            else:
                valid = builder.call(step.target, valid, *step.args[1:], **step.kwargs)
    return valid

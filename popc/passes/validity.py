"""Which rows of a hidden value are real tokens rather than padding, as nodes of the graph."""

from __future__ import annotations

from functools import partial

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from popc.analysis.capture import Captured
from popc.analysis.tokens import VIEWS, Mask, mask_of, rows_of, valid_tokens
from popc.analysis.walk import shape
from popc.passes.emit import Emitter, map_arguments

aten = torch.ops.aten


def emit_valid_rows(
    captured: Captured, hidden: fx.Node, before: fx.Node, memo: dict[Mask, fx.Node]
) -> fx.Node | None:
    """Bool, of the rank of ``hidden`` with size 1 in its channel dim; None: all rows are valid.

    Nodes go before ``before``; ``memo`` holds what was emitted for each mask.
    """
    graph = captured.gm.graph
    mask, rows = mask_of(hidden, graph), rows_of(hidden)
    order = {node: i for i, node in enumerate(graph.nodes)}
    if mask is None or rows is None or order[mask.node] > order[before]:
        return None
    with graph.inserting_before(before):
        if mask not in memo:
            memo[mask] = _emit_validity(captured, mask)
        emit = Emitter(captured, hidden)
        valid = emit.call(aten.unsqueeze.default, memo[mask], -1)
        for step in rows.path:
            if step.target in VIEWS:
                sizes = [emit.size(step, d) for d in range(len(shape(step)) - 1)]
                valid = emit.call(aten.reshape.default, valid, [*sizes, 1])
            else:
                valid = emit.call(step.target, valid, *step.args[1:], **step.kwargs)
    return valid


def _emit_validity(captured: Captured, mask: Mask) -> fx.Node:
    """``valid_tokens`` as nodes: traced once on the mask's fake value and spliced in."""
    with captured.fake_mode:
        traced = make_fx(partial(valid_tokens, hides=mask.hides))(mask.node.meta["val"])
    emit = Emitter(captured, mask.node)
    copied: dict[fx.Node, fx.Node] = {}
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            copied[node] = mask.node
        elif node.op == "output":
            return copied[node.args[0]]
        else:
            args, kwargs = map_arguments(node.args, node.kwargs, copied.__getitem__)
            copied[node] = emit.call(node.target, *args, **kwargs)
    raise AssertionError("a graph has an output")

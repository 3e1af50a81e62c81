"""Mask pass: what attentions of many layers add to their scores for one mask is made once.

Inductor makes these ``T · S`` numbers for each layer anew, and where it fuses that with a sum over
the mask, as a prefill's statistics need it, holds those of all layers at the same time.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import fx

from popc.analysis.capture import Captured
from popc.analysis.labels import same_size
from popc.analysis.mutation import Written, writes_first
from popc.analysis.propagation import argument, shape
from popc.ops import additive_mask
from popc.passes.base import PassResult
from popc.passes.builder import GraphBuilder, finish
from popc.planning.rewrite_plan import RewritePlan

aten = torch.ops.aten


def hoist_masks(captured: Captured, work: RewritePlan) -> PassResult:
    """Give attentions of many tokens that share a mask of bools, on CPUs, one mask of numbers."""
    graph = captured.gm.graph
    attention = aten.scaled_dot_product_attention.default
    readers: dict[tuple[fx.Node, torch.dtype], dict[fx.Node, fx.Node]] = defaultdict(dict)
    for node in graph.find_nodes(op="call_function", target=attention):
        mask, value = argument(node, "attn_mask"), node.meta["val"]
        if not isinstance(mask, fx.Node) or value.device.type != "cpu":
            continue
        if mask.meta["val"].dtype is torch.bool and not same_size(shape(node)[-2], 1):
            readers[_unexpanded(mask), value.dtype][node] = mask
    written = Written(graph, lambda node: writes_first(node) and _may_be_mask(node))
    count = 0
    for (mask, dtype), masks in readers.items():
        nodes = list(masks)
        if len(nodes) < 2 or written.between(nodes[0], nodes[-1]):
            continue
        with graph.inserting_before(nodes[0]):
            added = GraphBuilder(captured, mask).call(additive_mask, mask, dtype)
        for node, expanded in masks.items():
            node.replace_input_with(expanded, added)
        count += 1
    if count:
        finish(captured)
    return PassResult(count)


def _may_be_mask(node: fx.Node) -> bool:
    """Whether what ``node`` writes to may be bools, in whatever dtype."""
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor) or value.element_size() == 1


def _unexpanded(mask: fx.Node) -> fx.Node:
    """What it is an expansion of: an attention expands its mask itself."""
    while mask.target is aten.expand.default:
        source = mask.all_input_nodes[0]
        if len(shape(source)) < 2:
            break
        mask = source
    return mask

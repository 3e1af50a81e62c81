"""Which axis is the token's, and which tokens are real rather than padding."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from popc.analysis.plan import Region
from popc.analysis.rules import LINEARS, VIEWS, argument, same_size, shape

aten = torch.ops.aten

# Besides pointwise ops and linears: what computes each row of its output from the same row.
ROWWISE = (
    aten.layer_norm.default,
    aten.rms_norm.default,
    aten.dropout.default,
    aten.to.dtype,
    aten._to_copy.default,
)

# An additive mask hides a key by this or less; position biases such as ALiBi stay above it.
HIDDEN = -1e4


def is_decode(region: Region) -> bool:
    """True if the graph runs this region on one token per sequence.

    Where tokens and batch are one axis (``h [N, F]``) only ``N = 1`` is known to be one token.
    """
    grid = shape(region.grid)
    tokens = grid[1:-1] if len(grid) > 2 else grid[:-1]
    return len(tokens) > 0 and all(same_size(size, 1) for size in tokens)


def token_grid(hidden: fx.Node) -> fx.Node:
    """The nearest node before ``hidden [B·T, F]`` that has its tokens as ``[B, T, ...]``.

    ``hidden`` itself if it is not flattened, or if no op before it shows the two axes apart.
    """
    if len(shape(hidden)) != 2:
        return hidden
    queue, seen = [hidden], {hidden}
    while queue:
        node = queue.pop(0)
        for source in _same_rows(node):
            if len(shape(source)) == 3:
                return source
            if len(shape(source)) == 2 and source not in seen:
                seen.add(source)
                queue.append(source)
    return hidden


def _same_rows(node: fx.Node) -> list[fx.Node]:
    """Inputs of ``node [N, ...]`` whose rows are its rows, one to one."""
    if node.target in VIEWS:
        (source, *_) = node.all_input_nodes
        kept = same_size(shape(source)[-1], shape(node)[-1])
        return [source] if kept and 2 <= len(shape(source)) <= 3 else []
    if node.target in LINEARS:
        return [node.args[LINEARS[node.target].x]]  # type: ignore[list-item]
    if node.target in ROWWISE or torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return [
            source
            for source in node.all_input_nodes
            if isinstance(source.meta.get("val"), torch.Tensor)
            and len(shape(source)) == 2
            and same_size(shape(source)[0], shape(node)[0])
        ]
    return []


def attention_masks(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Pairs of attention node and its mask ``[B or 1, 1, T, S]`` (bool, or added to the scores)."""
    for node in graph.nodes:
        if node.target is aten.scaled_dot_product_attention.default:
            mask = argument(node, 3, "attn_mask")
        elif node.target in (aten.softmax.int, aten._softmax.default):
            mask = _added_mask(node.args[0])
        else:
            continue
        if isinstance(mask, fx.Node) and len(shape(mask)) == 4:
            yield node, mask


def _added_mask(scores: fx.Node) -> fx.Node | None:
    """The operand of ``scores = q kᵀ + mask`` that is the same for every head."""
    while scores.target in (aten.to.dtype, aten._to_copy.default, aten.dropout.default):
        scores = scores.args[0]  # type: ignore[assignment]
    if scores.target is not aten.add.Tensor or len(shape(scores)) != 4:
        return None
    for operand in scores.args[:2]:
        if isinstance(operand, fx.Node) and len(shape(operand)) == 4 and shape(operand)[1] == 1:
            return operand
    return None


def mask_of(region: Region, graph: fx.Graph) -> fx.Node | None:
    """The mask of the attention nearest before ``region`` with the same token axis, or after it."""
    hidden = shape(region.grid)
    if len(hidden) != 3:
        return None
    order = {node: i for i, node in enumerate(graph.nodes)}
    fitting = [
        (attention, mask)
        for attention, mask in attention_masks(graph)
        if same_size(shape(mask)[-2], hidden[-2])
        and (same_size(shape(mask)[0], hidden[0]) or same_size(shape(mask)[0], 1))
    ]
    before = [pair for pair in fitting if order[pair[0]] < order[region.hidden]]
    if before:
        return before[-1][1]
    return fitting[0][1] if fitting else None


def valid_tokens(mask: torch.Tensor) -> torch.Tensor:
    """``[B, T]`` bool: tokens that attend to something and that something attends to.

    A left-padding token's row hides every key; a right-padding token is hidden from every query.
    The second can be read off the mask only where queries and keys are the same tokens (T = S).
    """
    seen = mask if mask.dtype is torch.bool else mask > HIDDEN
    seen = seen.any(1)
    valid = seen.any(-1)
    if same_size(mask.shape[-1], mask.shape[-2]):
        valid = valid & seen.any(-2)
    return valid

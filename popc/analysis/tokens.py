"""Which axis is the token's, and which tokens are real rather than padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from popc.analysis.labels import same_size
from popc.analysis.linears import grouped_ops
from popc.analysis.propagation import argument, is_tensor, shape
from popc.analysis.rules.traits import Trait, has

aten = torch.ops.aten

# An additive mask hides a key by this or less; position biases such as ALiBi stay above it.
HIDDEN = -1e4


@dataclass(frozen=True)
class Rows:
    """Where the rows of a value ``[..., K]`` come from.

    Attributes:
        grid: a node ``[B, T, ...]`` that shows batch and token axes apart.
        path: the ops that lead from its rows to the value's rows, in order; without those that
            leave rows as they are.
    """

    grid: fx.Node
    path: tuple[fx.Node, ...]

    @property
    def is_plain(self) -> bool:
        """Whether the rows are the grid's, in the same order."""
        return all(has(node, Trait.RESHAPE) for node in self.path)


def rows_of(value: fx.Node) -> Rows | None:
    """The rows of ``value``; None if no op before it shows batch and tokens apart."""
    if len(shape(value)) >= 3 and not _experts_first(value):
        return Rows(value, ())
    queue: list[tuple[fx.Node, tuple[fx.Node, ...]]] = [(value, ())]
    seen = {value}
    while queue:
        node, path = queue.pop(0)
        for source, step in _same_rows(node):
            if source in seen:
                continue
            seen.add(source)
            longer = (node, *path) if step else path
            if is_tensor(source) and _shows_tokens(source, node):
                return Rows(source, longer)
            queue.append((source, longer))
    return None


def _shows_tokens(source: fx.Node, node: fx.Node) -> bool:
    """Whether ``node`` flattens ``source [B, T, K]``."""
    flattens = has(node, Trait.RESHAPE) and len(shape(node)) == 2 and len(shape(source)) == 3
    return flattens and not _experts_first(source)


def _experts_first(value: fx.Node) -> bool:
    """Whether ``value`` (``[S, 1, K]``, ``[E, n, K]``) is one side of an experts' bmm."""
    three = len(shape(value)) == 3
    return three and any(
        has(user, Trait.MATMUL) and all(is_tensor(a) and len(shape(a)) == 3 for a in user.args[:2])
        for user in _users(value)
    )


def _users(value: fx.Node) -> Iterator[fx.Node]:
    yield from value.users
    for user in value.users:
        if has(user, Trait.EQUAL_PARTS):  # gate and up, say
            for piece in user.users:
                yield from piece.users


def _same_rows(node: fx.Node) -> list[tuple[fx.Node, bool]]:
    """Inputs of ``node`` that its rows come from, and whether it changes their order or number."""
    if node.op != "call_function" or not node.args:
        return []
    first = node.args[0]
    if has(node, Trait.RESHAPE):
        assert isinstance(first, fx.Node)
        joined = first.args[0] if has(first, Trait.SLICE) else first
        if has(joined, Trait.FLAT):
            return [(joined.args[0], False)]  # type: ignore[union-attr, list-item]
        kept = same_size(shape(first)[-1], shape(node)[-1])
        return [(first, True)] if kept and len(shape(first)) >= 2 else []
    if has(node, Trait.ROW_CHOICE):
        return [(first, True)]  # type: ignore[list-item]
    if has(node, Trait.ROWWISE) and has(node, Trait.PRODUCT):  # whose weight may stand first
        operands: list[Any] = [a for a in node.args if is_tensor(a)]
        return [(a, False) for a in operands if len(shape(a)) == len(shape(node))]
    if has(node, Trait.ROWWISE) or node.target in grouped_ops():
        return [(first, False)]  # type: ignore[list-item]
    if has(node, Trait.POINTWISE):
        return [
            (source, False)
            for source in node.all_input_nodes
            if is_tensor(source)
            and len(shape(source)) == len(shape(node))
            and same_size(shape(source)[0], shape(node)[0])
        ]
    return []


def tokens_of(value: fx.Node) -> list[Any] | None:
    """The sizes of ``value``'s token axes, without batch; None if they are not known."""
    rows = rows_of(value)
    if rows is not None:
        return list(shape(rows.grid)[1:-1])
    return list(shape(value)[:-1]) if len(shape(value)) == 2 else None


def is_one_token(value: fx.Node) -> bool | None:
    """Whether the graph runs ``value`` on one token per sequence; None if that can't be told.

    Where tokens and batch are one axis for all that is seen, only a single row is one token.
    """
    tokens = tokens_of(value)
    if tokens is None or not tokens:
        return None
    single = all(same_size(size, 1) for size in tokens)
    return None if rows_of(value) is None and not single else single


# --- attention masks and padding -----------------------------------------------------------------


def attentions(graph: fx.Graph) -> Iterator[tuple[fx.Node, Any, Any]]:
    """Each attention node ``[..., T, _]``, its number of keys, and its mask or masked scores."""
    for node in graph.nodes:
        if node.target is aten.scaled_dot_product_attention.default:
            yield node, shape(node.args[1])[-2], argument(node, "attn_mask")
        elif has(node, Trait.SOFTMAX) and len(shape(node)) >= 3:
            yield node, shape(node)[-1], node.args[0]


@dataclass(frozen=True)
class Mask:
    """``[B or 1, 1, T, S]``, as a node: bool, or added to the scores.

    ``hides``: a bool one is True where a key is hidden, not where it is seen.
    """

    node: fx.Node
    hides: bool = False


def mask_of(hidden: fx.Node, graph: fx.Graph) -> Mask | None:
    """The mask of the attention nearest before ``hidden`` with the same token axis, or after it."""
    rows = rows_of(hidden)
    if rows is None or len(shape(rows.grid)) != 3:
        return None
    sizes = shape(rows.grid)
    order = {node: i for i, node in enumerate(graph.nodes)}
    fitting = [
        (attention, mask)
        for attention, mask in _padding_masks(graph)
        if same_size(shape(mask.node)[-2], sizes[-2])
        and (same_size(shape(mask.node)[0], sizes[0]) or same_size(shape(mask.node)[0], 1))
    ]
    before = [pair for pair in fitting if order[pair[0]] < order[hidden]]
    if before:
        return before[-1][1]
    return fitting[0][1] if fitting else None


def _padding_masks(graph: fx.Graph) -> Iterator[tuple[fx.Node, Mask]]:
    """Attention nodes with their masks."""
    for node, _, mask in attentions(graph):
        known: Mask | None
        if node.target is not aten.scaled_dot_product_attention.default:
            known = _written_mask(mask)
        else:
            known = Mask(mask) if _is_mask(mask, heads=False) else None
        if known is not None:
            yield node, known


def _is_mask(value: Any, heads: bool = True) -> bool:
    """Whether it is 4-dimensional; with ``heads``, the same for each of them."""
    if not isinstance(value, fx.Node) or len(shape(value)) != 4:
        return False
    return not heads or bool(shape(value)[1] == 1)


def _written_mask(scores: fx.Node) -> Mask | None:
    """How ``scores`` came to hide keys: a mask added to ``q kᵀ``, or a value filled in by one."""
    while has(scores, Trait.CAST | Trait.DROPOUT):
        scores = scores.args[0]  # type: ignore[assignment]
    if scores.op != "call_function" or len(shape(scores)) != 4:
        return None
    name = scores.target._schema.name  # type: ignore[union-attr]
    if name == "aten::add":
        return next((Mask(x) for x in scores.args[:2] if _is_mask(x)), None)  # type: ignore[arg-type]
    if name == "aten::masked_fill" and _is_mask(scores.args[1]):
        return Mask(scores.args[1], hides=True)  # type: ignore[arg-type]
    if name == "aten::where" and _is_mask(scores.args[0]):
        first, second = (isinstance(x, fx.Node) and bool(shape(x)) for x in scores.args[1:3])
        if first != second:  # the other is the one value that hides
            return Mask(scores.args[0], hides=second)  # type: ignore[arg-type]
    return None


def valid_tokens(mask: torch.Tensor, hides: bool = False) -> torch.Tensor:
    """``[B, T]`` bool: tokens that attend to something and that something attends to.

    A left-padding token's row hides every key; a right-padding token is hidden from every query.
    The second can be read off the mask only where queries and keys are the same tokens (T = S).

    Args:
        hides: see :class:`Mask`.
    """
    seen = mask if mask.dtype is torch.bool else mask > HIDDEN
    seen = (seen.logical_not() if hides else seen).any(1)
    valid = seen.any(-1)
    if same_size(mask.shape[-1], mask.shape[-2]):
        valid = valid & seen.any(-2)
    return valid

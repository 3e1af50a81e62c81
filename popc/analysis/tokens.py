"""Which axis is the token's, which tokens are real rather than padding, and who sees whom."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from popc.analysis.labels import same_size
from popc.analysis.linears import grouped_ops
from popc.analysis.propagation import argument, is_tensor, shape
from popc.ops import LINEARS

aten = torch.ops.aten

VIEWS = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)
# What computes each row of its output from the same row of its first input.
_ROWWISE = (
    aten.linear.default,
    aten.layer_norm.default,
    aten.rms_norm.default,
    aten.dropout.default,
    aten.to.dtype,
    aten._to_copy.default,
    aten.contiguous.default,
    aten.chunk.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.slice.Tensor,
    operator.getitem,
    *LINEARS,  # of a graph that a pass has rewritten
)
# The same, where the weight may stand first.
_PRODUCTS = (aten.addmm.default, aten.mm.default, aten.matmul.default, aten.bmm.default)
# What picks or repeats rows; done to a mask over rows, it gives the mask over the new rows.
_ROW_CHOICES = (
    aten.index.Tensor,
    aten.index_select.default,
    aten.repeat_interleave.self_int,
    aten.repeat.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
)

# An additive mask hides a key by this or less; position biases such as ALiBi stay above it.
HIDDEN = -1e4
LARGEST_MASK = 1 << 24  # positions; a larger mask is not evaluated
LARGEST_TABLE = 1 << 16  # values of a table of position biases


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
        return all(node.target in VIEWS for node in self.path)


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
            found = (node, *path) if step else path
            if not is_tensor(source):
                queue.append((source, found))
            elif _shows_tokens(source, node):
                return Rows(source, found)
            else:
                queue.append((source, found))
    return None


def _shows_tokens(source: fx.Node, node: fx.Node) -> bool:
    """Whether ``node`` flattens ``source [B, T, K]``."""
    flattens = node.target in VIEWS and len(shape(node)) == 2 and len(shape(source)) == 3
    return flattens and not _experts_first(source)


def _experts_first(value: fx.Node) -> bool:
    """Whether ``value`` (``[S, 1, K]``, ``[E, n, K]``) is one side of an experts' bmm."""
    products = (aten.bmm.default, aten.matmul.default)
    three = len(shape(value)) == 3
    return three and any(
        user.target in products and all(is_tensor(a) and len(shape(a)) == 3 for a in user.args[:2])
        for user in _users(value)
    )


def _users(value: fx.Node) -> Iterator[fx.Node]:
    yield from value.users
    for user in value.users:
        if user.target in (aten.chunk.default, aten.split.Tensor):
            for piece in user.users:
                yield from piece.users


def _same_rows(node: fx.Node) -> list[tuple[fx.Node, bool]]:
    """Inputs of ``node`` that its rows come from, and whether it changes their order or number."""
    if node.op != "call_function" or not node.args:
        return []
    first = node.args[0]
    if node.target in VIEWS:
        assert isinstance(first, fx.Node)
        kept = same_size(shape(first)[-1], shape(node)[-1])
        return [(first, True)] if kept and len(shape(first)) >= 2 else []
    if node.target in _ROW_CHOICES:
        return [(first, True)]  # type: ignore[list-item]
    if node.target in _ROWWISE:
        return [(first, False)]  # type: ignore[list-item]
    if node.target in grouped_ops():
        return [(first, False)]  # type: ignore[list-item]
    if node.target in _PRODUCTS:
        operands: list[Any] = [a for a in node.args if is_tensor(a)]
        return [(a, False) for a in operands if len(shape(a)) == len(shape(node))]
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
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


# --- attention: who sees whom --------------------------------------------------------------------


def _attentions(graph: fx.Graph) -> Iterator[tuple[fx.Node, Any, Any]]:
    """Each attention node ``[..., T, _]``, its number of keys, and its mask or masked scores."""
    for node in graph.nodes:
        if node.target is aten.scaled_dot_product_attention.default:
            yield node, shape(node.args[1])[-2], argument(node, "attn_mask")
        elif node.target in (aten.softmax.int, aten._softmax.default) and len(shape(node)) >= 3:
            yield node, shape(node)[-1], node.args[0]


def runs_in_one_pass(
    hidden: fx.Node, graph: fx.Graph, caches: set[fx.Node], parameters: Collection[fx.Node]
) -> bool:
    """Whether ``hidden`` surely belongs to a model without a decode phase, such as an encoder.

    That is so if every attention over as many tokens lets tokens see later ones, one of them is of
    the tokens to themselves, and no cache keeps keys or values. A causal model called without a
    cache is none, nor is one whose mask comes from elsewhere.
    """
    tokens = tokens_of(hidden)
    if not tokens or caches or all(same_size(size, 1) for size in tokens):
        return False
    count = tokens[0]
    for size in tokens[1:]:
        count = count * size
    fitting = [
        (node, keys, mask)
        for node, keys, mask in _attentions(graph)
        if same_size(shape(node)[-2], count)
    ]
    to_themselves = any(same_size(keys, count) for _, keys, _ in fitting)
    return to_themselves and all(sees_ahead(node, mask, parameters) for node, _, mask in fitting)


def sees_ahead(attention: fx.Node, mask: Any, parameters: Collection[fx.Node] = ()) -> bool:
    """Whether the first token surely attends to the second, where nothing is padding."""
    if attention.target is aten.scaled_dot_product_attention.default:
        if argument(attention, "is_causal"):
            return False
        if mask is None:
            return True
    try:
        value = _evaluate(mask, _zeros(mask, parameters))
    except _Unknown:
        return False
    if min(value.shape[-1:]) < 2:
        return False
    row = value.reshape(-1, *value.shape[-2:])[0, 0]
    return bool(row[1]) if value.dtype is torch.bool else bool(row[1] > HIDDEN)


def _zeros(mask: Any, parameters: Collection[fx.Node]) -> dict[fx.Node, torch.Tensor]:
    """Parameters, such as tables of position biases, as zeros: they hide no key."""
    if not isinstance(mask, fx.Node):
        return {}
    values = {node: node.meta["val"] for node in parameters if node.graph is mask.graph}
    return {
        node: torch.zeros(val.shape, dtype=val.dtype)
        for node, val in values.items()
        if val.dim() <= 4 and val.numel() <= LARGEST_TABLE
    }


class _Unknown(Exception):
    """A value that depends on more than sizes and padding."""


_ORDERINGS = ("aten::le", "aten::ge", "aten::lt", "aten::gt")


def _evaluate(value: Any, memo: dict[fx.Node, torch.Tensor]) -> Any:
    """A mask as it is where no token is padding: scores and biases are 0, padding masks 1."""
    if not isinstance(value, fx.Node):
        return value
    held = value.meta.get("val")
    if isinstance(held, torch.SymInt | torch.SymFloat | torch.SymBool):
        if held.node.hint is None:
            raise _Unknown
        return held.node.hint
    if not isinstance(held, torch.Tensor):
        raise _Unknown
    if value not in memo:
        memo[value] = _evaluate_node(value, held, memo)
    return memo[value]


def _evaluate_node(node: fx.Node, held: torch.Tensor, memo: dict[fx.Node, Any]) -> torch.Tensor:
    sizes = [int(_evaluate_size(size)) for size in held.shape]
    if torch.Size(sizes).numel() > LARGEST_MASK:
        raise _Unknown
    name = getattr(getattr(node.target, "_schema", None), "name", "")
    scores = node.target in _PRODUCTS or name in (
        "aten::embedding",
        "aten::baddbmm",
        "aten::einsum",
    )
    if node.op == "call_method" or (node.op != "call_function" and not _may_be_padding(held)):
        raise _Unknown
    if node.op != "call_function" or scores:
        if held.dtype.is_floating_point:
            return torch.zeros(sizes, dtype=held.dtype)
        return torch.ones(sizes, dtype=held.dtype)
    if name in _ORDERINGS and any(_is_given(source) for source in node.all_input_nodes):
        raise _Unknown  # positions that are the graph's input
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: _evaluate(n, memo))
    if "device" in kwargs:
        kwargs = {**kwargs, "device": "cpu"}
    try:
        result = node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception as error:
        raise _Unknown from error
    if not isinstance(result, torch.Tensor):
        raise _Unknown
    return result


def _may_be_padding(value: torch.Tensor) -> bool:
    """Whether an input can be a padding mask ``[B, S]``; a causal one must not pass."""
    if value.dim() < 2:
        return True
    sizes = value.shape
    return value.dim() == 2 and value.dtype is torch.int64 and not same_size(sizes[0], sizes[1])


def _evaluate_size(size: Any) -> int:
    if isinstance(size, torch.SymInt):
        if size.node.hint is None:
            raise _Unknown
        return int(size.node.hint)
    return int(size)


def _is_given(node: fx.Node) -> bool:
    """Whether an integer tensor among the graph's inputs is behind ``node``."""
    queue, seen = [node], {node}
    while queue:
        at = queue.pop()
        value = at.meta.get("val")
        if at.op == "placeholder" and isinstance(value, torch.Tensor):
            return True
        for source in at.all_input_nodes:
            if source not in seen:
                seen.add(source)
                queue.append(source)
    return False


# --- padding -------------------------------------------------------------------------------------


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
    for node, _, mask in _attentions(graph):
        found: Mask | None
        if node.target is not aten.scaled_dot_product_attention.default:
            found = _written_mask(mask)
        else:
            found = Mask(mask) if _is_mask(mask, heads=False) else None
        if found is not None:
            yield node, found


def _is_mask(value: Any, heads: bool = True) -> bool:
    """Whether it is 4-dimensional; with ``heads``, the same for each of them."""
    if not isinstance(value, fx.Node) or len(shape(value)) != 4:
        return False
    return not heads or bool(shape(value)[1] == 1)


def _written_mask(scores: fx.Node) -> Mask | None:
    """How ``scores`` came to hide keys: a mask added to ``q kᵀ``, or a value filled in by one."""
    while scores.target in (aten.to.dtype, aten._to_copy.default, aten.dropout.default):
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

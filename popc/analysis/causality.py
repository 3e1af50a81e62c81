"""Who sees whom: whether a model's attentions let tokens see later ones, as in encoders."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from popc.analysis.labels import same_size
from popc.analysis.propagation import argument, shape
from popc.analysis.rules.traits import Trait, has
from popc.analysis.tokens import HIDDEN, attentions, tokens_of

aten = torch.ops.aten

LARGEST_MASK = 1 << 24  # positions; a larger mask is not evaluated
LARGEST_TABLE = 1 << 16  # values of a table of position biases


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
        for node, keys, mask in attentions(graph)
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


def _evaluate(value: Any, memo: dict[fx.Node, torch.Tensor]) -> Any:
    """A mask as it is where no token is padding: scores and biases are 0, padding masks 1."""
    if not isinstance(value, fx.Node):
        return value
    fake = value.meta.get("val")
    if isinstance(fake, torch.SymInt | torch.SymFloat | torch.SymBool):
        if fake.node.hint is None:
            raise _Unknown
        return fake.node.hint
    if not isinstance(fake, torch.Tensor):
        raise _Unknown
    if value not in memo:
        memo[value] = _evaluate_node(value, fake, memo)
    return memo[value]


def _evaluate_node(node: fx.Node, fake: torch.Tensor, memo: dict[fx.Node, Any]) -> torch.Tensor:
    sizes = [_evaluate_size(size) for size in fake.shape]
    if torch.Size(sizes).numel() > LARGEST_MASK:
        raise _Unknown
    if node.op == "call_method" or (node.op != "call_function" and not _may_be_padding(fake)):
        raise _Unknown
    if node.op != "call_function" or has(node, Trait.PRODUCT | Trait.LOOKUP):
        if fake.dtype.is_floating_point:
            return torch.zeros(sizes, dtype=fake.dtype)
        return torch.ones(sizes, dtype=fake.dtype)
    if has(node, Trait.ORDERING) and any(map(_depends_on_an_input, node.all_input_nodes)):
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


def _depends_on_an_input(node: fx.Node) -> bool:
    """Whether an integer tensor among the graph's inputs is behind ``node``."""
    queue, seen = [node], {node}
    while queue:
        node = queue.pop()
        if node.op == "placeholder" and isinstance(node.meta.get("val"), torch.Tensor):
            return True
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                queue.append(source)
    return False

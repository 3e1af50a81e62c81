"""Sizes that costs are made of and that only a graph shows: heads, tokens, experts of a token."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from popc.analysis.labels import same_size
from popc.analysis.linears import Linear
from popc.analysis.plan import AttentionRecord
from popc.analysis.propagation import shape
from popc.analysis.rules.traits import Trait, has
from popc.analysis.tokens import rows_of

if TYPE_CHECKING:
    from popc.analysis.findings import Region

aten = torch.ops.aten

# What lays a value out anew or repeats it: no more than its source is read from the cache.
_LAYOUTS = Trait.RESHAPE | Trait.TRANSPOSE | Trait.AXIS | Trait.COPY | Trait.REPEAT


def reads_context(linear: Linear, region: Region) -> bool:
    """Whether ``linear`` reads not h's tokens, but those that a cross-attention attends to."""
    read_rows, hidden_rows = rows_of(linear.x), rows_of(region.hidden)
    if region.kind != "attention" or read_rows is None or hidden_rows is None:
        return False
    pairs = zip(shape(read_rows.grid)[1:-1], shape(hidden_rows.grid)[1:-1], strict=False)
    return not all(same_size(a, b) for a, b in pairs)


def experts_met(region: Region) -> int:
    """How many experts each token meets, all where that is not known; 1 in other regions."""
    if not region.experts:
        return 1
    rows = rows_of(region.hidden)
    if rows is None:
        return region.experts
    hidden, tokens = _product(shape(region.hidden)), _product(shape(rows.grid)[:-1])
    count = sympy.cancel(hidden / region.width / tokens)
    return int(count) if count.is_Integer and count > 0 else region.experts


def attention_sizes(region: Region) -> AttentionRecord:
    """Of ``q kᵀ`` and ``softmax(·) v``, all heads: they see zeros where nothing was computed."""
    rows = rows_of(region.hidden)
    batch = _product(shape(rows.grid)[:1]) if rows else sympy.S.One

    def heads(sizes: Sequence[Any]) -> sympy.Expr:
        count = sympy.cancel(_product(sizes) / batch)
        return count if count.is_Integer else sympy.Integer(region.units)

    channels, stored = 0, {}
    for lead, operand_lead, width, operand in _contractions(region):
        channels += int(heads(lead) * width)
        source = operand
        while has(source, _LAYOUTS):
            source = source.args[0]  # type: ignore[assignment]
        times = sympy.cancel(_product(shape(operand)) / _product(shape(source)))
        kept = heads(operand_lead) * width / (times if times.is_Integer else 1)
        stored[source] = kept * source.meta["val"].element_size()
    context = sum(stored.values(), sympy.S.Zero)
    return AttentionRecord(channels, int(context) if context.is_Integer else float(context))


def _contractions(region: Region) -> Iterator[tuple[Sequence[Any], Sequence[Any], int, fx.Node]]:
    """Products of two activations: sizes of batch and heads in the result and in the second
    operand; channels of a head; the second operand, which is k or v."""
    weights: set[fx.Node] = set()  # products, and what is made of them
    nodes: list[Any] = [n.args[0] if n.target is operator.getitem else n for n in region.body]
    for node in dict.fromkeys(nodes):
        if has(node, Trait.ATTENTION):
            q, *operands = node.args[:3]
            for operand in operands:
                yield shape(q)[:-2], shape(operand)[:-2], shape(operand)[-1], operand
        elif _is_product(node):
            a, b, left, right, out = _operands(node)
            sizes = dict(zip(right, shape(b), strict=True))
            both = set(left) & set(right) & set(out)
            # q kᵀ sums over a head's channels; attention weights times v give them.
            inner = set(right) & (set(out) - set(left) if a in weights else set(left) - set(out))
            width = _product([sizes[letter] for letter in inner])
            if width.is_Integer:
                result = zip(out, shape(node), strict=True)
                lead = [size for letter, size in result if letter in both]
                yield lead, [sizes[letter] for letter in both], int(width), b
        if has(node, Trait.BATCHED) or not weights.isdisjoint(node.all_input_nodes):
            weights.add(node)


def _is_product(node: fx.Node) -> bool:
    """Whether ``node`` multiplies two values, in a form that :func:`_operands` reads."""
    if node.target is aten.einsum.default:
        equation, operands = str(node.args[0]), node.args[1]
        return len(operands) == 2 and "..." not in equation and "->" in equation  # type: ignore[arg-type]
    if not has(node, Trait.BATCHED):
        return False
    a, b = node.args[1:3] if node.target is aten.baddbmm.default else node.args[:2]
    return min(len(shape(a)), len(shape(b))) >= 2


def _operands(node: fx.Node) -> tuple[Any, Any, str, str, str]:
    """A product's operands, and the letters of their dims and of the result's, as in einsum."""
    args: Any = node.args
    if node.target is aten.einsum.default:
        left, right, out = args[0].replace(" ", "").replace("->", ",").split(",")
        return *args[1], left, right, out
    a, b = args[1:3] if node.target is aten.baddbmm.default else args[:2]
    lead = "abcdefgh"[: len(shape(node)) - 2]
    left, right = (lead[len(lead) + 2 - len(shape(x)) :] for x in (a, b))
    return a, b, left + "mk", right + "kn", lead + "mn"


def _product(sizes: Sequence[Any]) -> sympy.Expr:
    exprs = [size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes]
    return sympy.prod(map(sympy.sympify, exprs))

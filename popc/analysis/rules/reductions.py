"""Rules for ops that mix along a dim: norms, reductions, and products of two activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from popc.analysis.labels import DimFactor, LabeledValue, Mixes, same_size
from popc.analysis.propagation import (
    Labels,
    Propagation,
    argument,
    dims_of,
    mixing,
    only_input,
    shape,
)

aten = torch.ops.aten


def along(propagation: Propagation, node: fx.Node) -> Labels:
    """Keeps the shape, mixes along dims: softmax, cumsum, sort."""
    value = only_input(propagation, node)
    out = propagation.flow.mix(value, dims_of(node, len(value.dims)), node, mixing(node))
    many = isinstance(node.meta["val"], tuple | list)
    return [_fitted(out, val.shape) for val in node.meta["val"]] if many else out


def _fitted(value: LabeledValue, sizes: Any) -> LabeledValue:
    """With free dims of these sizes: topk's output is shorter."""
    for dim, size in enumerate(sizes):
        if value.is_free(dim):
            value = value.resized(dim, size)
    return value


def norm(propagation: Propagation, node: fx.Node) -> Labels:
    """layer_norm and rms_norm: over the last dims, then scaled elementwise."""
    value = only_input(propagation, node)
    rank, last = len(value.dims), len(argument(node, "normalized_shape"))
    propagation.flow.mix(value, range(rank - last, rank), node, mixing(node))
    return value


def last_dim(propagation: Propagation, node: fx.Node) -> Labels:
    """Of the input's shape, mixed along the last dim."""
    value = only_input(propagation, node)
    return propagation.flow.mix(value, [len(value.dims) - 1], node, mixing(node))


def group_norm(propagation: Propagation, node: fx.Node) -> Labels:
    """``group_norm``: all but the batch is mixed."""
    value = only_input(propagation, node)
    propagation.flow.mix(value, range(1, len(value.dims)), node, mixing(node))
    return value


def reduce(propagation: Propagation, node: fx.Node) -> Labels:
    """Sums, means, norms and their like: what they reduce is mixed."""
    value = only_input(propagation, node)
    dims = dims_of(node, len(value.dims))
    out = propagation.flow.mix(value, dims, node, mixing(node))
    for dim in sorted(dims, reverse=True):
        out = out.resized(dim, 1) if argument(node, "keepdim") else out.squeezed(dim)
    many = isinstance(node.meta["val"], tuple | list)
    return [out] * len(node.meta["val"]) if many else out


def _contract(
    propagation: Propagation,
    node: fx.Node,
    terms: list[tuple[fx.Node, str]],
    out: str,
    extra: fx.Node | None = None,
) -> Labels:
    """A sum of products, written as in einsum; ``extra`` is added to it, with broadcasting."""
    sizes: dict[Any, Any] = {}
    for source, letters in terms:
        for letter, size in zip(letters, shape(source), strict=True):
            if letter not in sizes or not same_size(size, 1):
                sizes[letter] = size
    operands = [
        (labels, letters) for s, letters in terms if (labels := propagation.of(s)) is not None
    ]
    order = [*out, *(letter for letter in sizes if letter not in out)]
    if operands:
        product = propagation.flow.combine(operands, order, sizes)
        propagation.attention.append((node, product, [source for source, _ in terms[1:]]))
        summed = list(range(len(out), len(order)))
        if _scores_pairs(product, order, terms, out):
            propagation.scores.add(node)
        value = propagation.flow.mix(product, summed, node, mixing(node), "attention")
        for dim in reversed(summed):
            value = value.squeezed(dim)
    if extra is None or propagation.of(extra) is None:
        return value
    lead = len(out) - len(shape(extra))
    more = [(propagation.of(extra), out[lead:]), *([(value, out)] if operands else [])]
    return propagation.flow.combine(more, out, sizes)  # type: ignore[arg-type]


def _scores_pairs(
    product: LabeledValue, order: list[str], terms: list[tuple[fx.Node, str]], out: str
) -> bool:
    """Whether channels are contracted and an axis of each operand is left that has none."""
    summed = [d for d, letter in enumerate(order) if letter not in out]
    kept = [
        [
            order.index(c)
            for c in letters
            if c in out and all(c not in o for s, o in terms if s is not n)
        ]
        for n, letters in terms
    ]
    labelled = any(not product.is_free(dim) for dim in summed)
    return labelled and all(dims and all(map(product.is_free, dims)) for dims in kept)


def matmul(propagation: Propagation, node: fx.Node) -> Labels:
    """``matmul``, ``mm``, ``bmm``: a product of two."""
    a, b = node.args[:2]
    return _product(propagation, node, a, b)


def baddbmm(propagation: Propagation, node: fx.Node) -> Labels:
    """``baddbmm``, ``addmm``: a product to which a third value is added."""
    extra, a, b = node.args[:3]
    return _product(propagation, node, a, b, extra)


def addbmm(propagation: Propagation, node: fx.Node) -> Labels:
    """Sums over the batch too."""
    extra, a, b = node.args[:3]
    return _contract(propagation, node, [(a, "bmk"), (b, "bkn")], "mn", extra)  # type: ignore[list-item, arg-type]


def _product(propagation: Propagation, node: fx.Node, a: Any, b: Any, extra: Any = None) -> Labels:
    batch = "abcdefgh"
    rank = max(len(shape(a)), len(shape(b))) - 2
    if min(len(shape(a)), len(shape(b))) < 2:
        raise Mixes("multiplies with a vector of channels")
    left = batch[rank - len(shape(a)) + 2 : rank] + "mk"
    right = batch[rank - len(shape(b)) + 2 : rank] + "kn"
    return _contract(propagation, node, [(a, left), (b, right)], batch[:rank] + "mn", extra)


def linear(propagation: Propagation, node: fx.Node) -> Labels:
    """A linear whose weight is no parameter, but a value like any other."""
    x, weight = node.args[:2]
    lead = "abcdefgh"[: len(shape(x)) - 1]
    bias = argument(node, "bias")
    return _contract(propagation, node, [(x, lead + "k"), (weight, "nk")], lead + "n", bias)  # type: ignore[list-item]


def einsum(propagation: Propagation, node: fx.Node) -> Labels:
    """``einsum`` with its output spelled out: each letter is an axis."""
    equation, operands = node.args[:2]
    spelled = str(equation).replace(" ", "")
    if "->" not in spelled:
        raise Mixes("is an einsum without an output")
    inputs, out = spelled.split("->")
    free_letters = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in spelled]
    terms, longest = [], 0
    for operand, letters in zip(operands, inputs.split(","), strict=True):  # type: ignore[arg-type]
        count = len(shape(operand)) - len(letters.replace("...", ""))
        longest = max(longest, count)
        terms.append((operand, letters.replace("...", "".join(free_letters[:count][::-1]))))
    out = out.replace("...", "".join(free_letters[:longest][::-1]))
    if any(len(set(letters)) != len(letters) for _, letters in terms):
        raise Mixes("is an einsum that takes a diagonal")
    return _contract(propagation, node, terms, out)


def attention(propagation: Propagation, node: fx.Node) -> Labels:
    """``softmax(q kᵀ + mask) v``, heads at dim -3; with enable_gqa each k and v serves a group."""
    q, k, v = node.args[:3]
    mask = argument(node, "attn_mask")
    return _softmax_attention(propagation, node, q, k, v, mask, bool(argument(node, "enable_gqa")))


def _softmax_attention(
    propagation: Propagation, node: fx.Node, q: Any, k: Any, v: Any, mask: Any, grouped: bool
) -> Labels:
    lead = "abc"[: len(shape(q)) - 3]
    if len(shape(q)) < 3:
        lead, heads = "", ""
    else:
        heads = "h"
    names = {q: f"{lead}{heads}te", k: f"{lead}{heads}se", v: f"{lead}{heads}sf"}
    labels = {source: propagation.of(source) for source in (q, k, v)}
    if grouped and heads:
        for source in (k, v):
            value = labels[source]
            times = shape(q)[-3] // shape(source)[-3]
            if value is not None and times > 1:
                dim = len(lead)
                grown = (*value.dims[dim], DimFactor(times, False))
                dims = (*value.dims[:dim], grown, *value.dims[dim + 1 :])
                labels[source] = LabeledValue(dims, value.labels)
    out_letters = f"{lead}{heads}tf"
    sizes = {
        **dict(zip(names[v], shape(v), strict=True)),
        **dict(zip(names[q], shape(q), strict=True)),
    }
    scored = [(labels[s], names[s]) for s in (q, k) if labels[s] is not None]
    if isinstance(mask, fx.Node) and propagation.of(mask) is not None:
        scored.append((propagation.of(mask), f"{lead}{heads}ts"[-len(shape(mask)) :]))
    parts: list[Any] = []
    if scored:
        order = [*lead, *heads, "t", "s", "e"]
        used = [letter for letter in order if letter != "e" or any("e" in n for _, n in scored)]
        scores = propagation.flow.combine(scored, used, sizes)  # type: ignore[arg-type]
        propagation.attention.append((node, scores, [k, v]))
        rank = len(lead) + len(heads)
        mixed = [rank + 1, *([rank + 2] if "e" in used else [])]
        scores = propagation.flow.mix(scores, mixed, node, mixing(node), "attention")
        for dim in reversed(mixed):
            scores = scores.squeezed(dim)
        parts.append((scores, [*lead, *heads, "t"]))
    if labels[v] is not None:
        value = labels[v]
        assert value is not None
        at = len(lead) + len(heads)
        propagation.attention.append((node, value, [k, v]))
        value = propagation.flow.mix(value, [at], node, mixing(node), "attention").squeezed(at)
        parts.append((value, [*lead, *heads, "f"]))
    return propagation.flow.combine(parts, list(out_letters), sizes)


def flex_attention(propagation: Propagation, node: fx.Node) -> Labels:
    """The higher-order op: q, k, v, a score function, a block mask, scale and options."""
    q, k, v = node.args[:3]
    if any(propagation.of(other) for other in node.all_input_nodes if other not in (q, k, v)):
        raise Mixes("takes channels in its score function")
    out = _softmax_attention(propagation, node, q, k, v, None, shape(q)[-3] != shape(k)[-3])
    assert isinstance(out, LabeledValue)
    last = len(out.dims) - 1
    row = propagation.flow.mix(out, [last], node, mixing(node)).squeezed(last)
    outputs = node.meta["val"]
    return [out, *([row] * (len(outputs) - 1))]

"""Heads pass: query heads that share keys and values read each once, without a repeated copy.

A model repeats the heads of its cache for ``scaled_dot_product_attention``. Inductor writes all of
that out, the whole of a static cache for every token. ``enable_gqa`` says the same without a copy,
and one token's attention has a kernel of its own: see :mod:`popc.ops.attend`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from popc.analysis.capture import Captured
from popc.analysis.labels import same_size
from popc.analysis.mutation import Written, writes
from popc.analysis.propagation import argument, order_of, shape
from popc.analysis.rules.traits import Trait, has
from popc.ops import attend, native
from popc.passes.base import PassResult
from popc.passes.builder import GraphBuilder, finish
from popc.planning.rewrite_plan import RewritePlan

aten = torch.ops.aten

_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
_HEADS = 1  # q, k and v are [B, H, T, E]


def fold_repeat_kv(captured: Captured, work: RewritePlan) -> PassResult:
    """Let attentions on CPUs read keys and values as they were before they were repeated.

    One token's are also left to the kernel where nothing is repeated, if that gains.
    """
    graph = captured.gm.graph
    written = Written(graph, writes)
    count = 0
    for node in graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    ):
        if node.meta["val"].device.type != "cpu" or len(shape(node)) != 4:
            continue
        repeats = _repeated_kv(node)
        if repeats and any(written.between(repeat.copy, node) for repeat in repeats):
            repeats = None  # the copies may hold what is overwritten by then
        is_decode = _has_one_query(node) and native.load()
        if repeats is None and not (is_decode and _kernel_is_faster(node)):
            continue
        q, k, v, mask, dropout, causal, scale = (argument(node, name) for name in _ARGUMENTS)
        with graph.inserting_before(node):
            builder = GraphBuilder(captured, node)
            if repeats is not None:
                k, v = (repeat.unrepeated(builder) for repeat in repeats)
        if is_decode:
            builder.change(node, attend, q, k, v, mask, scale)
        else:
            args, options = (q, k, v, mask, dropout, causal), {"scale": scale, "enable_gqa": True}
            builder.change(node, node.target, *args, **options)
        count += 1
    if count:
        finish(captured)
    return PassResult(count)


def _has_one_query(attention: fx.Node) -> bool:
    """Whether it is of one token that sees all keys but those that a mask hides."""
    plain = not argument(attention, "is_causal") and not argument(attention, "dropout_p")
    return plain and same_size(shape(attention)[-2], 1)


def _kernel_is_faster(attention: fx.Node) -> bool:
    """Whether one token's kernel gains where nothing is repeated for its sake.

    On two cores with AVX-512, ATen's took 5 to 19 times as long in 16 bits; in float32 0.85
    times where each head has keys of its own and all are seen.
    """
    is_float32 = attention.meta["val"].dtype is torch.float32
    is_grouped = bool(argument(attention, "enable_gqa"))
    return is_grouped or not is_float32 or argument(attention, "attn_mask") is not None


@dataclass(frozen=True)
class _Repeat:
    """A value whose heads are those of another, each several times in a row.

    Attributes:
        source: the other value.
        expanded: a dim of ``source``, of size 1, that its repetition fills; None if there is none.
        copy: the node that makes the repetition.
        transposes: the nodes that reorder dims after it.
    """

    source: fx.Node
    expanded: int | None
    copy: fx.Node
    transposes: tuple[fx.Node, ...]

    def unrepeated(self, builder: GraphBuilder) -> fx.Node:
        value = self.source
        if self.expanded is not None:
            value = builder.call(aten.squeeze.dim, value, self.expanded)
        for transpose in self.transposes:
            value = builder.call(transpose.target, value, *transpose.args[1:], **transpose.kwargs)
        return value


def _repeated_kv(attention: fx.Node) -> list[_Repeat] | None:
    """The repeats of keys and of values, of the same heads; None unless both are repeated."""
    nodes = (argument(attention, name) for name in ("key", "value"))
    candidates = [_find_repeat(node, _HEADS) for node in nodes]
    repeats = [repeat for repeat in candidates if repeat is not None]
    heads = [_heads(repeat) for repeat in repeats]
    return repeats if len(repeats) == 2 and same_size(*heads) else None


def _heads(repeat: _Repeat) -> int:
    dim = _HEADS
    for transpose in reversed(repeat.transposes):
        dim = order_of(transpose)[dim]
    return shape(repeat.source)[dim]


def _find_repeat(value: fx.Node, dim: int) -> _Repeat | None:
    """What ``value`` repeats along ``dim``: by ``repeat_interleave``, or by an expanded dim that is
    then merged with the one before it."""
    transposes: list[fx.Node] = []
    while has(value, Trait.COPY | Trait.TRANSPOSE):
        if has(value, Trait.TRANSPOSE):
            transposes.insert(0, value)
            dim = order_of(value)[dim]
        value = _first_input(value)
    if value.target is aten.repeat_interleave.self_int:
        along = argument(value, "dim")
        if along is None or along % len(shape(value)) != dim:
            return None
        return _Repeat(_first_input(value), None, value, tuple(transposes))
    if not has(value, Trait.RESHAPE) or _first_input(value).target is not aten.expand.default:
        return None
    source = _first_input(_first_input(value))
    expanded, unexpanded = shape(_first_input(value)), shape(source)
    if not len(expanded) == len(unexpanded) == len(shape(value)) + 1:
        return None
    merged = [*expanded[:dim], expanded[dim] * expanded[dim + 1], *expanded[dim + 2 :]]
    if not _same_shape(shape(value), merged) or not same_size(unexpanded[dim + 1], 1):
        return None
    if not _same_shape(unexpanded, [*expanded[: dim + 1], 1, *expanded[dim + 2 :]]):
        return None
    return _Repeat(source, dim + 1, value, tuple(transposes))


def _first_input(node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0]


def _same_shape(a: Sequence[int], b: Sequence[int]) -> bool:
    return len(a) == len(b) and all(map(same_size, a, b))

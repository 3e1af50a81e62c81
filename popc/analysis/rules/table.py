"""The transfer table: what each op does to the labels of its inputs. One op, one line.

A rule is called for each node with a labelled input, and answers with the labels of the output (a
list of them where there are several outputs; None where the output is no data). It raises
:class:`~popc.analysis.labels.Mixes` where it can't follow the channels; an op that the table does
not know is taken to mix all that it is given, so none of it is prunable.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from popc.analysis.labels import Mixes
from popc.analysis.propagation import (
    Labels,
    Propagation,
    Rule,
    argument,
    mixing,
    only_input,
    shape,
)
from popc.analysis.rules import joins as join
from popc.analysis.rules import reductions as mix
from popc.analysis.rules import views as to

aten = torch.ops.aten


def pointwise(walk: Propagation, node: fx.Node) -> Labels:
    """Elementwise, with broadcasting: dims are aligned from the right."""
    sizes = shape(node)
    rank = len(sizes)
    operands = []
    for source in node.all_input_nodes:
        held = walk.of(source)
        if held is not None:
            lead = rank - len(held.dims)
            operands.append((held, [lead + d for d in range(len(held.dims))]))
    return walk.flow.combine(operands, range(rank), dict(enumerate(sizes)))


def _same(walk: Propagation, node: fx.Node) -> Labels:
    return only_input(walk, node)


def _first(walk: Propagation, node: fx.Node) -> Labels:
    """Like the first input; of any other only size, dtype or device is read."""
    return walk.of(node.args[0])


def _nothing(walk: Propagation, node: fx.Node) -> Labels:
    """Made of an input's sizes, not of its values."""
    return None


def _as_complex(walk: Propagation, node: fx.Node) -> Labels:
    value = only_input(walk, node)
    last = len(value.dims) - 1
    return walk.flow.mix(value, [last], node, mixing(node)).squeezed(last)


def _as_real(walk: Propagation, node: fx.Node) -> Labels:
    return only_input(walk, node).unsqueezed(len(shape(node)) - 1, 2)


def _dropout(walk: Propagation, node: fx.Node) -> Labels:
    if argument(node, "train"):
        raise Mixes("is dropout in training mode", "training")
    return only_input(walk, node)


def _glu(walk: Propagation, node: fx.Node) -> Labels:
    value = only_input(walk, node)
    dim = argument(node, "dim") % len(value.dims)
    if value.is_free(dim):
        return value.resized(dim, shape(node)[dim])
    first, second = np.split(value.along(dim), 2, axis=-1)
    walk.flow.tie(first, second)
    return value.replaced(dim, first)


def _ops(*names: str) -> list[Any]:
    """The ops of these names that this torch has."""
    found = []
    for name in names:
        packet, overload = name.split(".")
        op = getattr(getattr(aten, packet, None), overload, None)
        if op is not None:
            found.append(op)
    return found


def _table(*lines: tuple[Rule, list[Any]]) -> dict[Any, Rule]:
    return {op: rule for rule, ops in lines for op in ops}


# An op's name ends in "_" where it works in place; the rule is the same.
RULES: dict[Any, Rule] = _table(
    (_same, _ops("to.dtype", "to.device", "to.dtype_layout", "_to_copy.default")),
    (_first, _ops("to.other", "type_as.default")),
    (_same, _ops("contiguous.default", "detach.default", "detach_.default", "alias.default")),
    (_same, _ops("lift_fresh_copy.default", "lift_fresh.default")),
    (_same, _ops("clone.default", "hardswish.default", "hardswish_.default")),
    (_same, _ops("log_sigmoid.default", "requires_grad_.default", "float.default")),
    (pointwise, _ops("masked_fill.Tensor", "masked_fill_.Tensor", "__and__.Tensor")),
    (pointwise, _ops("multiply.Tensor", "divide.Tensor", "subtract.Tensor", "__or__.Tensor")),
    (pointwise, _ops("floor_divide.default", "floor_divide_.Tensor", "float_power.Tensor_Tensor")),
    (pointwise, _ops("prelu.default", "rrelu.default", "where.ScalarOther", "where.ScalarSelf")),
    (_nothing, _ops("new_empty.default", "new_zeros.default", "new_ones.default")),
    (_nothing, _ops("new_full.default", "zeros_like.default", "ones_like.default")),
    (_nothing, _ops("full_like.default", "empty_like.default", "rand_like.default")),
    (_nothing, _ops("sym_stride.int", "sym_numel.default", "sym_storage_offset.default")),
    (_as_complex, _ops("view_as_complex.default")),
    (_as_real, _ops("view_as_real.default")),
    (_dropout, _ops("dropout.default", "dropout_.default", "feature_dropout.default")),
    (_glu, _ops("glu.default")),
    (to.view, _ops("view.default", "reshape.default", "_unsafe_view.default", "view_as.default")),
    (to.view, _ops("flatten.using_ints", "unflatten.int", "reshape_as.default")),
    (to.reorder, _ops("transpose.int", "swapaxes.default", "swapdims.default", "t.default")),
    (to.reorder, _ops("mT.default", "matrix_H.default", "adjoint.default")),
    (to.reverse, _ops("numpy_T.default")),
    (to.reorder, _ops("permute.default")),
    (to.movedim, _ops("movedim.intlist", "movedim.int")),
    (to.unsqueeze, _ops("unsqueeze.default")),
    (to.squeeze, _ops("squeeze.default", "squeeze.dim", "squeeze.dims")),
    (to.expand, _ops("expand.default", "expand_as.default", "broadcast_to.default")),
    (to.repeat, _ops("repeat.default")),
    (to.repeat_interleave, _ops("repeat_interleave.self_int", "repeat_interleave.self_Tensor")),
    (to.on_dim(to.sliced), _ops("slice.Tensor")),
    (to.on_dim(to.narrowed), _ops("narrow.default")),
    (to.on_dim(lambda _, labels, __: labels[..., ::-1], "dims"), _ops("flip.default")),
    (to.on_dim(to.rolled, "dims"), _ops("roll.default")),
    (to.select, _ops("select.int")),
    (to.pieces, _ops("split.Tensor", "split_with_sizes.default", "chunk.default", "split.sizes")),
    (to.pieces, _ops("tensor_split.sections", "tensor_split.indices")),
    (to.unbind, _ops("unbind.int")),
    (to.unfold, _ops("unfold.default")),
    (to.pad, _ops("constant_pad_nd.default", "pad.default")),
    (join.cat, _ops("cat.default", "concat.default", "concatenate.default")),
    (join.stack, _ops("stack.default")),
    (join.index, _ops("index.Tensor")),
    (join.index_select, _ops("index_select.default")),
    (join.gather, _ops("gather.default", "take_along_dim.default")),
    (join.written("source", "dim"), _ops("index_copy.default", "index_copy_.default")),
    (join.written("src", "dim"), _ops("slice_scatter.default", "select_scatter.default")),
    (join.written("src"), _ops("copy.default", "copy_.default")),
    (join.index_put, _ops("index_put.default", "index_put_.default")),
    (
        mix.along,
        _ops("softmax.int", "_softmax.default", "log_softmax.int", "_log_softmax.default"),
    ),
    (mix.along, _ops("cumsum.default", "cumprod.default", "sort.default", "sort.stable")),
    (mix.along, _ops("topk.default", "argsort.default", "argsort.stable")),
    (mix.norm, _ops("layer_norm.default", "rms_norm.default")),
    (mix.group_norm, _ops("group_norm.default")),
    (
        mix.reduce,
        _ops("sum.default", "sum.dim_IntList", "mean.default", "mean.dim", "prod.dim_int"),
    ),
    (mix.reduce, _ops("amax.default", "amin.default", "max.dim", "min.dim", "argmax.default")),
    (mix.reduce, _ops("var.correction", "std.correction", "var_mean.correction", "var.dim")),
    (mix.reduce, _ops("linalg_vector_norm.default", "norm.ScalarOpt_dim", "logsumexp.default")),
    (mix.reduce, _ops("any.dim", "all.dim", "any.default", "all.default", "max.default")),
    (mix.matmul, _ops("matmul.default", "bmm.default", "mm.default")),
    (mix.baddbmm, _ops("baddbmm.default", "addmm.default", "addbmm.default")),
    (mix.linear, _ops("linear.default")),
    (mix.einsum, _ops("einsum.default")),
    (mix.attention, _ops("scaled_dot_product_attention.default")),
    (mix.flex_attention, [torch.ops.higher_order.flex_attention]),
)


def rule_of(target: Any) -> Rule | None:
    """The rule for an op: its own, or that of elementwise ops."""
    rule = RULES.get(target)
    if rule is None and torch.Tag.pointwise in getattr(target, "tags", ()):
        return pointwise
    return rule

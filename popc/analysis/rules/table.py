"""The table of ops: what each does to the labels of channels, and its traits.

An op is added by its name on the line of its like, or by a line of its own, and by a case in
``tests/analysis/rules/test_table.py``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch

from popc.analysis.propagation import Rule
from popc.analysis.rules import elementwise as each
from popc.analysis.rules import joins as join
from popc.analysis.rules import reductions as mix
from popc.analysis.rules import views as to
from popc.analysis.rules.traits import Trait, declare
from popc.ops import FLAT_LINEARS, LINEARS, attend

aten = torch.ops.aten

RULES: dict[Any, Rule] = {}


def _line(ops: str | Iterable[Any], rule: Rule | None, traits: Trait = Trait.NOTHING) -> None:
    """One line of the table: ops, by their names or as they are, that do the same.

    A name without an overload is that of ``default``; ops that this torch lacks are left out.
    Without a rule an op has traits alone: a linear's rule depends on its weight, say.
    """
    for op in _named(ops) if isinstance(ops, str) else ops:
        assert op not in RULES, f"{op} has two lines"
        if rule is not None:
            RULES[op] = rule
        declare(op, traits)


def _named(names: str) -> list[Any]:
    ops = []
    for name in names.split():
        packet, _, overload = name.partition(".")
        op = getattr(getattr(aten, packet, None), overload or "default", None)
        if op is not None:
            ops.append(op)
    return ops


_ROWWISE = Trait.ROWWISE
_CAST = Trait.CAST | Trait.ROWWISE
_PIECES = Trait.PART | Trait.ROWWISE
_REPEAT_ROWS = Trait.REPEAT | Trait.ROW_CHOICE
_INDEX = Trait.INDEX | Trait.ROW_CHOICE
_STACKS = Trait.PRODUCT | Trait.BATCHED

# A name ends in "_" where the op works in place; the rule is the same.

# --- elementwise ---
_line("to.dtype to.device to.dtype_layout _to_copy", each.same, _CAST)
_line("to.other type_as", each.first, _CAST)
_line("contiguous", each.same, Trait.COPY | _ROWWISE)
_line("clone lift_fresh_copy", each.same, Trait.COPY)
_line("detach detach_ alias lift_fresh", each.same, Trait.COPY | Trait.ALIAS)
_line("hardswish hardswish_ log_sigmoid requires_grad_", each.same)
_line("masked_fill.Tensor masked_fill_.Tensor __and__.Tensor", each.pointwise, Trait.POINTWISE)
_line(
    "multiply.Tensor divide.Tensor subtract.Tensor __or__.Tensor", each.pointwise, Trait.POINTWISE
)
_line("floor_divide floor_divide_.Tensor", each.pointwise, Trait.POINTWISE)
_line("float_power.Tensor_Tensor prelu rrelu", each.pointwise, Trait.POINTWISE)
_line("where.ScalarOther where.ScalarSelf", each.pointwise, Trait.POINTWISE)
_line("le.Tensor le.Scalar ge.Tensor ge.Scalar", None, Trait.ORDERING)  # elementwise by their tag
_line("lt.Tensor lt.Scalar gt.Tensor gt.Scalar", None, Trait.ORDERING)
_line("new_empty new_zeros new_ones new_full", each.sizes_alone)
_line("zeros_like ones_like full_like empty_like rand_like", each.sizes_alone)
_line("sym_stride.int sym_numel sym_storage_offset", each.sizes_alone)
_line("view_as_complex", each.as_complex)
_line("view_as_real", each.as_real)
_line("dropout", each.dropout, Trait.DROPOUT | _ROWWISE)
_line("dropout_ feature_dropout", each.dropout, Trait.DROPOUT)
_line("glu", each.glu)

# --- views and other layouts ---
_line("view reshape _unsafe_view view_as reshape_as", to.view, Trait.RESHAPE)
_line("flatten.using_ints unflatten.int", to.view, Trait.RESHAPE)
_line("transpose.int swapaxes swapdims permute", to.reorder, Trait.TRANSPOSE)
_line("t mT numpy_T matrix_H adjoint", to.reorder, Trait.TRANSPOSE)
_line("movedim.intlist movedim.int", to.movedim)
_line("unsqueeze", to.unsqueeze, Trait.AXIS | Trait.ROW_CHOICE)
_line("squeeze.dim", to.squeeze, Trait.AXIS | Trait.PART | Trait.ROW_CHOICE)
# No choice of rows: done to a mask, these could drop its last dim.
_line("squeeze squeeze.dims", to.squeeze, Trait.AXIS | Trait.PART)
# Nor these: they name the size of the last dim, which a mask has not.
_line("expand expand_as broadcast_to", to.expand, Trait.REPEAT)
_line("repeat", to.repeat, _REPEAT_ROWS)
_line("repeat_interleave.self_int", to.repeat_interleave, _REPEAT_ROWS)
_line("repeat_interleave.self_Tensor", to.repeat_interleave)  # some more often than others
_line("slice.Tensor", to.on_dim(to.sliced), Trait.SLICE | _PIECES)
_line("narrow", to.on_dim(to.narrowed), Trait.SLICE | _PIECES)
_line("select.int", to.select, Trait.PART)
_line("split.Tensor chunk", to.pieces, Trait.EQUAL_PARTS | _PIECES)
_line("split.sizes split_with_sizes", to.pieces, _PIECES)
_line("tensor_split.sections tensor_split.indices", to.pieces, _PIECES)
_line("unbind.int", to.unbind, Trait.PART)
_line([operator.getitem], None, _PIECES)  # of an op with several outputs
_line("flip", to.on_dim(to.flipped, "dims"))
_line("roll", to.on_dim(to.rolled, "dims"))
_line("unfold", to.unfold)
_line("constant_pad_nd pad", to.pad)

# --- joins, picks and writes ---
_line("cat concat concatenate", join.cat)
_line("stack", join.stack)
_line("index.Tensor", join.index, _INDEX)
_line("index_select", join.index_select, _INDEX)
_line("gather take_along_dim", join.gather)
_line("embedding", None, Trait.LOOKUP)
_line("index_copy index_copy_", join.written("source", "dim"))
_line("slice_scatter select_scatter", join.written("src", "dim"))
_line("copy copy_", join.written("src"))
_line("index_put index_put_", join.index_put)

# --- norms and reductions ---
_line("softmax.int _softmax", mix.along, Trait.SOFTMAX)
_line("log_softmax.int _log_softmax cumsum cumprod", mix.along)
_line("topk sort sort.stable argsort argsort.stable", mix.along, Trait.CHOICE)
_line("argmax", mix.reduce, Trait.CHOICE)
_line("layer_norm rms_norm", mix.norm, _ROWWISE)
_line("group_norm", mix.group_norm)
_line("sum sum.dim_IntList mean mean.dim prod.dim_int", mix.reduce)
_line("amax amin max max.dim min.dim logsumexp", mix.reduce)
_line("var.dim var.correction std.correction var_mean.correction", mix.reduce)
_line("linalg_vector_norm norm.ScalarOpt_dim any any.dim all all.dim", mix.reduce)

# --- products ---
_line("matmul bmm", mix.matmul, Trait.MATMUL | _STACKS | _ROWWISE)
_line("mm", mix.matmul, Trait.MATMUL | Trait.PRODUCT | _ROWWISE)
_line("addmm", mix.baddbmm, Trait.PRODUCT | _ROWWISE)
_line("baddbmm", mix.baddbmm, _STACKS)
_line("addbmm", mix.addbmm, Trait.PRODUCT)
_line("einsum", mix.einsum, _STACKS)
_line("linear", mix.linear, Trait.LINEAR | _ROWWISE)
_line(LINEARS, None, Trait.LINEAR | _ROWWISE)  # what passes put in the place of linears
_line(FLAT_LINEARS, None, Trait.LINEAR | Trait.FLAT)
_line("scaled_dot_product_attention", mix.attention, Trait.ATTENTION)
_line([torch.ops.higher_order.flex_attention], mix.flex_attention, Trait.ATTENTION)
_line([attend], None, Trait.ATTENTION)  # what a pass makes of attentions of one token

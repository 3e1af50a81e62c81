"""Each op of the table: its labels are what running the op shows, its refusals are raised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn.attention.flex_attention import create_block_mask

from popc.analysis.labels import Mixes
from popc.analysis.propagation import order_of
from popc.analysis.rules.table import RULES
from popc.analysis.rules.traits import Trait, has
from tests.helpers.label_truth import Channels, Constant, Opaque, Run

aten = torch.ops.aten


@dataclass
class Case:
    """Arguments of an op; ``coarse``: the rule may tie more than it must, for a reason."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    coarse: str = ""
    refused: str = ""

    def __repr__(self) -> str:
        return self.refused or self.coarse or "exact"


def case(*args: Any, **kwargs: Any) -> Case:
    return Case(args, kwargs)


def coarse(why: str, *args: Any, **kwargs: Any) -> Case:
    return Case(args, kwargs, coarse=why)


def refused(match: str, *args: Any, **kwargs: Any) -> Case:
    """The rule raises Mixes, with a text that ``match`` is a part of."""
    return Case(args, kwargs, refused=match)


X = Channels()  # [2, 3, 4], channels last
FIRST = Channels(dims=(0,))
MIDDLE = Channels((2, 4, 3), (1,))
ROW = Channels((4,))
BOOLS = Channels(dtype=torch.bool)
INTEGERS = Channels(dtype=torch.int64)
COMPLEX = Channels(dtype=torch.complex128)
HEADS = Channels((1, 2, 3, 4), (1, 3))  # [B, H, T, E]
KEYS_T = Channels((1, 2, 4, 3), (1, 2))  # [B, H, E, S]
PLAIN = torch.arange(24.0, dtype=torch.float64).reshape(2, 3, 4).sin()
MASK = PLAIN > 0
SCALAR = torch.tensor(0.5, dtype=torch.float64)
ROWS = torch.tensor([2, 0])  # indices of tokens
PICKED = torch.tensor([3, 1, 1])  # indices of channels
TIED = "of two values along tokens, each position is one or the other"

CASES: dict[str, list[Case]] = {}


def of(names: str, *cases: Case) -> None:
    for name in names.split():
        CASES.setdefault(name if "." in name else f"{name}.default", []).extend(cases)


# --- elementwise ---
of("contiguous detach detach_ alias lift_fresh lift_fresh_copy clone", case(X), case(HEADS))
of("hardswish hardswish_ log_sigmoid requires_grad_", case(X), case(FIRST))
of("to.dtype", case(X, torch.float32), case(X, torch.float64))
of("to.device", case(X, "cpu", torch.float32))
of("to.dtype_layout _to_copy", case(X, dtype=torch.float32))
of("to.other type_as", case(X, SCALAR.float()), case(X, X))
of("masked_fill.Tensor masked_fill_.Tensor", case(X, MASK, SCALAR), case(X, BOOLS, SCALAR))
of("__and__.Tensor __or__.Tensor", case(INTEGERS, INTEGERS), case(BOOLS, MASK))
of("multiply.Tensor divide.Tensor subtract.Tensor", case(X, X), case(X, PLAIN), case(X, ROW))
of("multiply.Tensor subtract.Tensor", case(HEADS, Channels((2, 1, 1), (0,))), case(X, FIRST))
of("floor_divide floor_divide_.Tensor", case(X, X), case(X, PLAIN), case(X, ROW))
of("float_power.Tensor_Tensor", case(X, PLAIN.abs()), case(PLAIN.abs(), X))
of("prelu", case(X, SCALAR.reshape(1)))
of("rrelu", case(X))
of("where.ScalarOther", case(MASK, X, 0.0), case(BOOLS, X, 0.0))
of("where.ScalarSelf", case(MASK, 0.0, X), case(BOOLS, 0.0, X))
of("new_empty new_zeros new_ones", case(X, [2, 4]))
of("new_full", case(X, [2, 4], 3.0))
of("zeros_like ones_like empty_like rand_like", case(X))
of("full_like", case(X, 3.0))
of("sym_stride.int", case(X, 1))
of("sym_numel sym_storage_offset", case(X))
of("view_as_complex", case(Channels((3, 4, 2), (1, 2))), case(Channels((3, 4, 2), (1,))))
of("view_as_real", case(COMPLEX))
of("dropout dropout_ feature_dropout", case(X, 0.5, False), refused("training mode", X, 0.5, True))
of("glu", case(X), case(X, -1), case(Channels((2, 6, 4)), 1), case(HEADS, -1))

# --- views and other layouts ---
of("view reshape _unsafe_view", case(X, [6, 4]), case(X, [2, 3, 2, 2]), case(HEADS, [2, 3, 2, 2]))
of("view reshape _unsafe_view", refused("unknown way", X, [3, 8]), case(MIDDLE, [8, 3]))
of(
    "view_as reshape_as",
    case(X, torch.zeros(6, 2, 2)),
    refused("unknown way", X, torch.zeros(3, 8)),
)
of("flatten.using_ints", case(X, 0, 1), case(X, 1, 2), case(HEADS))
of("unflatten.int", case(X, -1, [2, 2]), case(HEADS, 3, [2, 2]))
of("transpose.int swapaxes swapdims", case(X, 0, 2), case(HEADS, 1, 2), case(HEADS, -1, -3))
of("permute", case(X, [2, 0, 1]), case(HEADS, [0, 2, 1, 3]), case(HEADS, [3, -3, 0, 2]))
of("t", case(Channels((3, 4))), case(ROW))
of("mT adjoint", case(X), case(HEADS))
of("numpy_T", case(X), case(HEADS))
of("matrix_H", case(Channels((3, 4))))
of("movedim.intlist", case(X, [2, 0], [0, 1]), case(HEADS, [1, 2], [-1, -2]))
of("movedim.int", case(X, -1, 0), case(HEADS, 1, 3))
of("unsqueeze", case(X, 0), case(X, -1), case(X, 2))
of("squeeze", case(Channels((1, 3, 1, 4))), case(X))
of("squeeze.dim", case(Channels((1, 3, 1, 4)), 2), case(X, 0), case(Channels((4, 1), (0,)), -1))
of("squeeze.dims", case(Channels((1, 3, 1, 4)), [0, -2]))
of("expand broadcast_to", case(Channels((3, 1, 4)), [2, 3, 5, 4]), case(ROW, [3, 4]))
of("expand", case(Channels((1, 3, 4)), [2, -1, -1]))
of("expand_as", case(Channels((1, 3, 4)), torch.zeros(2, 3, 4)))
of("repeat", case(X, [2, 1, 2]), case(X, [3, 1, 2, 1]), case(HEADS, [1, 2, 1, 3]))
of("repeat_interleave.self_int", case(X, 2, -1), case(X, 3, 1), case(HEADS, 2, 1))
of("repeat_interleave.self_int", refused("flattens", X, 2))
of(
    "repeat_interleave.self_Tensor",
    case(X, torch.tensor([1, 0, 2]), 1),
    refused("only at run time", X, torch.tensor([1, 0, 2, 1]), 2),
)
of("slice.Tensor", case(X, -1, 1, 3), case(X, -1, 0, None, 2), case(X, 1, 1), case(HEADS, 3, 2))
of("narrow", case(X, -1, 1, 2), case(X, 1, 0, 2), case(X, 2, -3, 2))
of("flip", case(X, [-1]), case(HEADS, [1, 2]))
of("roll", case(X, [1], [-1]), case(HEADS, [1, -1], [3, 1]), case(ROW, [3]))
of("select.int", case(X, 1, 0), case(X, -1, 2), case(HEADS, 1, -1))
of("split.Tensor chunk", case(X, 2, -1), case(X, 3, -1), case(X, 2, 1))
of("split_with_sizes split.sizes", case(X, [1, 3], -1), case(X, [1, 2], 1))
of("tensor_split.sections", case(X, 3, -1), case(X, 2, 1))
of("tensor_split.indices", case(X, [1, 3], -1), case(X, [1], 1))
of("unbind.int", case(X, -1), case(X, 0), case(HEADS, 1))
of("unfold", case(X, 1, 2, 1), refused("windows over the channels", X, 2, 2, 1))
of("constant_pad_nd", case(X, [1, 2]), case(X, [0, 0, 1, 0]), refused("cuts", X, [-1, 0]))
of("pad", case(X, [2, 1]), case(X, [0, 0, 1, 1], "reflect"))
of("pad", refused("with other channels", X, [1, 1], "reflect"))

# --- joins, picks and writes ---
of("cat concat concatenate", case([X, X], -1), case([X, PLAIN], -1), case([PLAIN, X, X], 2))
of("cat concat concatenate", coarse(TIED, [X, X], 1), case([X, PLAIN], 1), case([HEADS, HEADS], 3))
of("stack", case([X, X], 0), case([X, PLAIN], -1), case([X, X], 2), case([HEADS, HEADS], 1))
of("index.Tensor", case(X, [None, ROWS]), case(X, [ROWS.clamp(max=1), ROWS]))
of("index.Tensor", case(X, [None, None, Constant(PICKED)]), case(X, [torch.tensor([[0, 1]])]))
of("index.Tensor", refused("only at run time", X, [None, None, PICKED]))
of("index.Tensor", refused("by a mask", X, [torch.tensor([True, False])]))
of("index.Tensor", refused("takes indices", PLAIN, [BOOLS]))
of("index_select", case(X, 1, ROWS), case(X, -1, Constant(PICKED)))
of("index_select", refused("only at run time", X, -1, PICKED))
of("gather", case(X, 1, ROWS.expand(4, 2).t().expand(2, 2, 4)))
of("gather", refused("only at run time", X, 2, PICKED.expand(2, 3, 3)))
of("take_along_dim", case(X, ROWS.expand(4, 2).t().expand(2, 2, 4), 1))
of("take_along_dim", refused("only at run time", X, PICKED.expand(2, 3, 3), 2))
of(
    "index_copy index_copy_",
    case(X, 1, ROWS, PLAIN[:, :2]),
    case(PLAIN, 1, ROWS, Channels((2, 2, 4))),
)
of("index_copy index_copy_", coarse(TIED, X, 1, ROWS, Channels((2, 2, 4))))
of("index_copy index_copy_", refused("over channels", X, 2, ROWS, Channels((2, 3, 2))))
of("slice_scatter", case(X, PLAIN[:, :2], 1, 0, 2), case(PLAIN, Channels((2, 2, 4)), 1, 1))
of("slice_scatter", coarse(TIED, X, Channels((2, 2, 4)), 1, 1))
of("slice_scatter", refused("over channels", X, PLAIN[..., :2], 2, 0, 2))
of("select_scatter", case(X, PLAIN[:, 0], 1, 2), case(PLAIN, Channels((2, 4)), 1, 2))
of("select_scatter", coarse(TIED, X, Channels((2, 4)), 1, 0))
of("select_scatter", refused("over channels", X, PLAIN[..., 0], 2, 1))
of("copy copy_", case(X, PLAIN), case(PLAIN, X), case(X, X), case(PLAIN, ROW))
of("index_put index_put_", case(X, [None, ROWS], PLAIN[:, :2]))
of("index_put index_put_", case(PLAIN, [None, ROWS], Channels((2, 2, 4))))
of("index_put index_put_", coarse(TIED, X, [None, ROWS], Channels((2, 2, 4))))
of("index_put index_put_", case(PLAIN, [ROWS.clamp(max=1), ROWS], Channels((2, 4))))
of("index_put index_put_", refused("adds channels", X, [None, ROWS], PLAIN[:, :2], True))
of("index_put index_put_", refused("over channels", X, [None, None, ROWS], PLAIN[..., :2]))

# --- norms and reductions ---
of("softmax.int log_softmax.int cumsum cumprod", case(X, -1), case(X, 1), case(HEADS, 3))
of("_softmax _log_softmax", case(X, -1, False), case(X, 1, False), case(HEADS, 3, False))
of("sort argsort", case(X, -1), case(X, 1), case(HEADS, 3))
of("sort.stable argsort.stable", case(X, stable=True, dim=-1), case(X, stable=True, dim=1))
of("topk", case(X, 2, -1), case(X, 2, 1), case(HEADS, 2, 3))
of("argmax", case(X, -1), case(X, 1), case(X), case(X, -1, True))
of("layer_norm rms_norm", case(X, [4]), case(X, [3, 4]), case(MIDDLE, [3]))
of("layer_norm", case(X, [4], PLAIN[0, 0], PLAIN[0, 1]))
of("layer_norm", refused("weights", PLAIN, [4], ROW))
of("group_norm", case(MIDDLE, 1), coarse("groups are taken for one", MIDDLE, 2))
of("sum mean max amax amin", case(X), case(FIRST))
of("sum.dim_IntList mean.dim amax amin logsumexp", case(X, [-1]), case(X, [0, 1]))
of("sum.dim_IntList mean.dim amax amin logsumexp", case(HEADS, [2], True), case(HEADS, [3], True))
of("prod.dim_int max.dim min.dim", case(X, -1), case(X, 1), case(HEADS, 3, True))
of("var.dim", case(X, [-1]), case(X, [1], False, True))
of("var.correction std.correction var_mean.correction", case(X, [-1]), case(X, [1], keepdim=True))
of("linalg_vector_norm", case(X), case(X, 2, [-1]), case(X, 2, [1], True))
of("norm.ScalarOpt_dim", case(X, 2, [-1]), case(X, 2, [1], True))
of("any.dim all.dim", case(BOOLS, -1), case(BOOLS, 1, True))
of("any all", case(Channels((4,), dtype=torch.bool)))

# --- products ---
of("matmul", case(HEADS, KEYS_T), case(PLAIN[:1, None, :, :3], HEADS), case(HEADS, PLAIN.mT))
of("matmul", case(X, PLAIN[0].mT), refused("a vector", X, ROW))
of("bmm", case(X, MIDDLE), case(PLAIN[:, :, :3], X), case(PLAIN, MIDDLE))
of("bmm", case(Channels((2, 3, 4), (0, 2)), Channels((2, 4, 3), (0, 1))))
of("mm", case(Channels((3, 4)), PLAIN[0].mT), case(PLAIN[0], Channels((4, 5))))
of("addmm", case(PLAIN[0], PLAIN[0, :, :3], Channels((3, 4))), case(ROW, PLAIN[0, :, :3], PLAIN[1]))
of("addmm", case(ROW, PLAIN[0, :, :3], Channels((3, 4))))
of("baddbmm", case(PLAIN[..., :3], X, MIDDLE), case(X, PLAIN[..., :3], X))
of("addbmm", case(PLAIN[0], PLAIN[..., :3], X), case(Channels((3, 4)), PLAIN[..., :3], PLAIN))
of("addbmm", case(PLAIN[0, :, :3], X, MIDDLE))
of(
    "linear",
    case(X, PLAIN[0]),
    case(PLAIN, Channels((5, 4), (0,))),
    case(PLAIN, PLAIN[0], Channels((3,))),
)
of("linear", case(PLAIN, Channels((5, 4), (1,)), Channels((5,))))
of(
    "einsum",
    case("bhte,bhse->bhts", [HEADS, HEADS]),
    case("bhts,bshd->bthd", [PLAIN[:1, None, :, :3], Channels((1, 3, 1, 4))]),
)
of(
    "einsum",
    case("...td,...sd->...ts", [HEADS, HEADS]),
    case("ij,jk->k", [PLAIN[0], Channels((4, 3))]),
)
of("einsum", refused("without an output", "ij,jk", [PLAIN[0], Channels((4, 3))]))
of("einsum", refused("diagonal", "ii,ij->j", [PLAIN[0, :, :3], Channels((3, 4))]))
of("scaled_dot_product_attention", case(HEADS, HEADS, HEADS), case(X, X, X))
of("scaled_dot_product_attention", case(PLAIN[:1, None], PLAIN[:1, None], Channels((1, 1, 3, 4))))
of("scaled_dot_product_attention", case(HEADS, HEADS, PLAIN[:1, None].expand(1, 2, 3, 4)))
of(
    "scaled_dot_product_attention",
    case(Channels((1, 4, 3, 2), (1, 3)), *[Channels((1, 2, 3, 2), (1, 3))] * 2, enable_gqa=True),
    case(
        PLAIN[:1, None].expand(1, 2, 3, 4),
        *[PLAIN[:1, None].expand(1, 2, 3, 4)] * 2,
        Channels((2, 3, 3), (0,)),
    ),
)


def flex_arguments() -> tuple[Any, ...]:
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 3, 3, device="cpu")
    return (lambda score, b, h, q, k: score, mask.as_tuple(), 0.5, {}, (), ())


def all_cases() -> Iterator[Any]:
    for name, cases in CASES.items():
        packet, overload = name.split(".")
        op = getattr(getattr(aten, packet), overload)
        for number, each in enumerate(cases):
            yield pytest.param(op, each, id=f"{name}-{number}")


def test_every_op_of_the_table_has_a_case() -> None:
    tested = {param.values[0] for param in all_cases()}
    tested.add(torch.ops.higher_order.flex_attention)
    assert tested == set(RULES)


@pytest.mark.parametrize(("op", "each"), all_cases())
def test_the_labels_are_what_running_the_op_shows(op: Any, each: Case) -> None:
    run = Run(op, each.args, each.kwargs)
    if each.refused:
        with pytest.raises(Mixes, match=each.refused):
            run.apply_rule()
        return
    run.apply_rule()
    torch.use_deterministic_algorithms("empty" in str(op))  # then it is filled, and can be read
    try:
        run.measure()
    finally:
        torch.use_deterministic_algorithms(False)
    run.assert_sound()
    if not each.coarse:
        run.assert_exact()


def with_one_input(trait: Trait) -> list[Any]:
    """Cases of ops of that trait; their first argument has channels."""
    cases = [param for param in all_cases() if has(param.values[0], trait)]
    return [
        p for p in cases if not p.values[1].refused and isinstance(p.values[1].args[0], Channels)
    ]


def applied(op: Any, each: Case) -> tuple[Tensor, list[Tensor], fx.Node]:
    """An input, the outputs, and a node of the op."""
    x = each.args[0].draw(torch.Generator().manual_seed(0))
    args = [x if isinstance(arg, Channels) else arg for arg in each.args]
    out = op(*args, **each.kwargs)
    graph = fx.Graph()
    node = graph.call_function(op, (graph.placeholder("x"), *each.args[1:]), each.kwargs)
    node.meta["val"] = out
    return x, list(out) if isinstance(out, list | tuple) else [out], node


@pytest.mark.parametrize(("op", "each"), with_one_input(Trait.COPY | Trait.CAST | Trait.DROPOUT))
def test_copies_and_casts_have_the_values(op: Any, each: Case) -> None:
    x, (out,), _ = applied(op, each)
    assert out.shape == x.shape and torch.allclose(out.double(), x, rtol=1e-6)
    assert not has(op, Trait.COPY) or (out.dtype == x.dtype and torch.equal(out, x))


@pytest.mark.parametrize(("op", "each"), with_one_input(Trait.RESHAPE | Trait.AXIS))
def test_reshapes_have_the_values_in_order(op: Any, each: Case) -> None:
    x, (out,), _ = applied(op, each)
    assert torch.equal(out.flatten(), x.flatten())
    assert not has(op, Trait.AXIS) or [s for s in out.shape if s > 1] == [
        s for s in x.shape if s > 1
    ]


@pytest.mark.parametrize(("op", "each"), with_one_input(Trait.TRANSPOSE))
def test_transposes_have_the_order_of_their_trait(op: Any, each: Case) -> None:
    x, (out,), node = applied(op, each)
    assert torch.equal(out, x.permute(order_of(node)))


@pytest.mark.parametrize(("op", "each"), with_one_input(Trait.PART | Trait.ALIAS))
def test_parts_are_in_the_first_inputs_memory(op: Any, each: Case) -> None:
    x, outputs, _ = applied(op, each)
    assert all(
        out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for out in outputs
    )
    assert not has(op, Trait.EQUAL_PARTS) or len({out.dim() for out in outputs}) == 1


ROW_CHOICES: dict[Any, tuple[Any, ...]] = {
    aten.index.Tensor: ([ROWS],),
    aten.index_select.default: (1, ROWS),
    aten.repeat_interleave.self_int: (2, 1),
    aten.repeat.default: ([2, 1, 1, 1],),
    aten.unsqueeze.default: (0,),
    aten.squeeze.dim: (2,),
}


def test_row_choices_of_a_mask_are_the_mask_of_the_chosen_rows() -> None:
    x = torch.randn(3, 3, 1, 4)
    rows = torch.arange(9).reshape(3, 3, 1, 1)
    for op, args in ROW_CHOICES.items():
        assert torch.equal(op(x, *args), x.flatten(0, -2)[op(rows, *args)[..., 0]]), op
    assert set(ROW_CHOICES) == {op for op in RULES if has(op, Trait.ROW_CHOICE)}


def test_flex_attention() -> None:
    op = torch.ops.higher_order.flex_attention
    run = Run(op, (HEADS, HEADS, HEADS, *map(Opaque, flex_arguments())), {})
    run.apply_rule()
    run.measure()
    run.assert_sound()
    assert len(set(run.classes)) == 2  # a class for each head

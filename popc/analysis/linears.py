"""Recognise linears: ``y = x Wᵀ + b`` with a stored W, one for all rows of x or one per expert."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import fx

from popc import compat
from popc.analysis.capture import Captured, identity
from popc.analysis.propagation import argument, is_tensor, order_of, shape
from popc.analysis.rules.traits import Trait, has
from popc.ops import dequantize
from popc.quant import dequantized

aten = torch.ops.aten


class Step(NamedTuple):
    """An op that leads from a parameter to a part of it, as plain data.

    Attributes:
        op: the op's ``str``.
        args: what it takes after the tensor; ``kwargs``: likewise, as pairs.
    """

    op: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()


class Position(NamedTuple):
    """Where a linear is in its graph.

    Attributes:
        graph: the number of the captured graph.
        place: how many linears come before it.
        use: how many of these have the same weight, and ``uses``: how many linears of the graph do,
            itself included. Weights are the same if they are the same values in memory.
    """

    graph: int
    place: int
    use: int
    uses: int


@dataclass(frozen=True)
class Weight:
    """A linear's weight: a parameter, or a view of a part of one.

    Attributes:
        node: the value in the graph, ``[N, K]`` or ``[K, N]``; with experts ``[E, N, K]`` or
            ``[E, K, N]``.
        parameter: the graph input behind it.
        out_dim: the dim of N, the output channels.
        path: the nodes that lead from ``parameter`` to ``node``.
        identity: the same for this part of this parameter in every graph: the parameter's number,
            then the :class:`Step` of each node of ``path``.
    """

    node: fx.Node
    parameter: fx.Node
    out_dim: int
    path: tuple[fx.Node, ...]
    identity: tuple[Any, ...]

    @property
    def in_dim(self) -> int:
        """The dim of K, the input channels."""
        first = len(shape(self.node)) - 2
        return 2 * first + 1 - self.out_dim

    @property
    def is_quantized(self) -> bool:
        """Whether ``node`` is the whole of a quantised weight, just as it is dequantised."""
        return self.node.target is dequantize

    @property
    def has_channel_planes(self) -> bool:
        """Whether it is quantised and stored channel-major, so that it can be read by grade."""
        return self.is_quantized and bool(self.node.args[4] == 1)

    @property
    def element_bytes(self) -> float:
        """Bytes of one element; of a quantised weight its scales count too."""
        if self.path and self.path[0].target is dequantize:
            stored = [n.meta["val"] for n in self.path[0].all_input_nodes]
            size = sum(value.numel() * value.element_size() for value in stored)
            return float(size / self.path[0].meta["val"].numel())
        return int(self.node.meta["val"].element_size())

    @property
    def bytes(self) -> int:
        """Bytes of the whole weight, all experts."""
        return round(int(self.node.meta["val"].numel()) * self.element_bytes)

    def replayed(self, parameter: torch.Tensor) -> torch.Tensor:
        """What ``node`` is for a given tensor in the place of ``parameter``: a view of it."""
        return replayed(self.identity, parameter)


@dataclass(frozen=True)
class Experts:
    """Which expert's weight each row of x meets.

    ``form`` is ``"offsets"`` (rows are sorted by expert; ``selector [E]`` holds where each one's
    rows end), ``"index"`` (``selector [S]`` is each row's expert) or ``"batch"`` (x is
    ``[E, n, K]``).
    """

    count: int
    form: str
    selector: fx.Node | None


@dataclass(frozen=True)
class Linear:
    """A linear: it writes an axis of output channels and contracts one of input channels.

    Attributes:
        x: its input; ``x_dim`` is the dim that is contracted.
        y_dim: the dim of the output channels in ``node``.
        bias: ``[N]``, or None; experts' biases are ops of their own.
        experts: set where W is a stack of experts.
        position: set by :func:`all_linears`.
    """

    node: fx.Node
    x: fx.Node
    x_dim: int
    y_dim: int
    weight: Weight
    bias: fx.Node | None = None
    experts: Experts | None = None
    position: Position | None = None

    @property
    def inputs(self) -> int:
        """Number of input channels."""
        return int(shape(self.weight.node)[self.weight.in_dim])

    @property
    def outputs(self) -> int:
        """Number of output channels."""
        return int(shape(self.weight.node)[self.weight.out_dim])

    @property
    def has_flat_rows(self) -> bool:
        """Whether its rows can be laid out as ``[S, K]`` without a transpose."""
        stacked = self.experts is not None and self.experts.form == "batch"
        return not stacked or (self.x_dim == 2 and len(shape(self.x)) == 3)


@dataclass(frozen=True)
class _Form:
    """Where a linear-like op holds its operands."""

    x: int
    weight: int
    bias: int | None
    out_dim: int


_FORMS: dict[Any, _Form] = {
    aten.linear.default: _Form(x=0, weight=1, bias=2, out_dim=0),
    aten.addmm.default: _Form(x=1, weight=2, bias=0, out_dim=1),
    aten.mm.default: _Form(x=0, weight=1, bias=None, out_dim=1),
    aten.matmul.default: _Form(x=0, weight=1, bias=None, out_dim=1),
}

# Ops that only select or rename a part of a weight: looking through them finds the parameter.
_VIEWS = Trait.ALIAS | Trait.PART | Trait.TRANSPOSE


def as_linear(node: fx.Node, captured: Captured) -> Linear | None:
    """``node`` as a linear, or None."""
    form = _FORMS.get(node.target)
    if form is not None:
        linear = _as_plain(node, captured, form)
        if linear is not None:
            return linear
    if node.target in grouped_ops():
        return _as_grouped(node, captured)
    if has(node, Trait.MATMUL):
        return _as_batched(node, captured)
    return None


def uses_of_weights(linears: Iterable[Linear]) -> dict[fx.Node, int]:
    """For each linear's node, how many before it have the same weight, in graph order."""
    seen: Counter[tuple[Any, ...]] = Counter()
    uses = {}
    for linear in linears:
        uses[linear.node] = seen[linear.weight.identity]
        seen[linear.weight.identity] += 1
    return uses


def all_linears(captured: Captured) -> list[Linear]:
    """Every linear of a graph, in its order, each with its position."""
    nodes = [node for node in captured.gm.graph.nodes if node.op == "call_function"]
    linears = list(filter(None, (as_linear(node, captured) for node in nodes)))
    weights = [_values_of(linear.weight, captured) for linear in linears]
    uses, before = Counter(weights), Counter[Hashable]()
    positioned = []
    for place, (linear, weight) in enumerate(zip(linears, weights, strict=True)):
        position = Position(captured.number, place, before[weight], uses[weight])
        positioned.append(replace(linear, position=position))
        before[weight] += 1
    return positioned


def view_of(tensor: torch.Tensor) -> Hashable:
    """The same for views of the same values, transposed or not; None where there are no values."""
    try:
        sizes = zip(tensor.shape, tensor.stride(), strict=True)
        return tensor.data_ptr(), tuple(sorted(pair for pair in sizes if pair[0] > 1))
    except (RuntimeError, NotImplementedError):  # as in a vmap, which is no product of a weight
        return None


def _values_of(weight: Weight, captured: Captured) -> Hashable:
    """The same for weights with the same values in memory, be they two parameters."""
    real = captured.parameters[weight.parameter]
    named = {*captured.wrapped, *captured.quantized}
    if weight.parameter in named or real.device.type == "meta":
        return weight.identity
    return view_of(replayed(weight.identity, real)) or weight.identity


def replayed(weight: tuple[Any, ...], parameter: torch.Tensor) -> torch.Tensor:
    """The part of ``parameter`` that a weight of this identity is, with its memory."""
    value: Any = parameter.detach() if parameter.is_floating_point() else parameter
    for step in weight[1:]:
        if step.op == str(dequantize):
            sizes, row_dim, planes, dtype = step.args
            value = dequantized(value, sizes, row_dim, planes, dtype, bits=8)
            continue
        value = _op_named(step.op)(value, *step.args, **dict(step.kwargs))
    return value


def _op_named(name: str) -> Any:
    """The op whose ``str`` is ``name``."""
    if name == str(operator.getitem):
        return operator.getitem
    namespace, packet, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


def _as_plain(node: fx.Node, captured: Captured, form: _Form) -> Linear | None:
    x, stored = node.args[form.x], node.args[form.weight]
    bias = node.args[form.bias] if form.bias is not None and len(node.args) > form.bias else None
    if not is_tensor(x) or not is_tensor(stored) or node.kwargs:
        return None
    weight = _as_weight(stored, captured, form.out_dim, 2)  # type: ignore[arg-type]
    if weight is None or (bias is not None and (not is_tensor(bias) or len(shape(bias)) != 1)):
        return None
    last = len(shape(node)) - 1
    return Linear(node, x, len(shape(x)) - 1, last, weight, bias)  # type: ignore[arg-type]


def grouped_ops() -> list[compat.OpOverload]:
    """Grouped matmul ``(x [S, K], w [E, K, N], offsets [E])``: torch's, and those of its schema."""
    return [op for op in (aten._grouped_mm.default, compat.grouped_mm_fallback()) if op is not None]


def _as_grouped(node: fx.Node, captured: Captured) -> Linear | None:
    x, stored, offsets = (*node.args[:2], argument(node, "offs"))
    if not (is_tensor(x) and is_tensor(stored) and is_tensor(offsets)):
        return None
    if argument(node, "bias") is not None or len(shape(x)) != 2:
        return None
    weight = _as_weight(stored, captured, 2, 3)  # type: ignore[arg-type]
    if weight is None:
        return None
    experts = Experts(int(shape(weight.node)[0]), "offsets", offsets)
    return Linear(node, x, 1, 1, weight, None, experts)  # type: ignore[arg-type]


def _as_batched(node: fx.Node, captured: Captured) -> Linear | None:
    """bmm with a stack of weights, whole or picked by index, on either side."""
    a, b = node.args[:2]
    if not (is_tensor(a) and is_tensor(b)) or len(shape(a)) != 3 or len(shape(b)) != 3:
        return None
    for x, stored, x_dim, y_dim in ((a, b, 2, 2), (b, a, 1, 1)):
        out_dim = 2 if stored is b else 1
        picked, swapped = _untransposed(stored)  # type: ignore[arg-type]
        if picked.target is aten.index.Tensor and len(picked.args[1]) == 1:  # type: ignore[arg-type]
            base, selector = picked.args[0], picked.args[1][0]  # type: ignore[index]
        elif picked.target is aten.index_select.default and picked.args[1] == 0:
            base, selector = picked.args[0], picked.args[2]
        else:
            weight = _as_weight(stored, captured, out_dim, 3)  # type: ignore[arg-type]
            if weight is not None:
                experts = Experts(int(shape(weight.node)[0]), "batch", None)
                return Linear(node, x, x_dim, y_dim, weight, None, experts)  # type: ignore[arg-type]
            continue
        weight = _as_weight(base, captured, 3 - out_dim if swapped else out_dim, 3)  # type: ignore[arg-type]
        # One row of x for each picked weight.
        single = shape(x)[3 - x_dim] == 1
        if weight is not None and single and len(shape(selector)) == 1:
            experts = Experts(int(shape(weight.node)[0]), "index", selector)  # type: ignore[arg-type]
            return Linear(node, x, x_dim, y_dim, weight, None, experts)  # type: ignore[arg-type]
    return None


def _swaps_last(node: fx.Node) -> bool:
    """Whether ``node`` swaps the last two dims of its input and does nothing else."""
    rank = len(shape(node))
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    return has(node, Trait.TRANSPOSE) and rank >= 2 and order_of(node) == swapped


def _untransposed(node: fx.Node) -> tuple[fx.Node, bool]:
    swapped = False
    while _swaps_last(node):
        node, swapped = node.all_input_nodes[0], not swapped
    return node, swapped


def is_view_of_weight(node: fx.Node) -> bool:
    """Whether ``node`` only selects, renames or picks parts of a weight, as a linear's does."""
    return has(node, _VIEWS | Trait.INDEX) or _is_cast_to_itself(node)


def _is_cast_to_itself(node: fx.Node) -> bool:
    return node.target is aten.to.dtype and (
        node.meta["val"].dtype == node.all_input_nodes[0].meta["val"].dtype
    )


def _as_weight(node: fx.Node, captured: Captured, out_dim: int, rank: int) -> Weight | None:
    """``node`` as a part of a parameter; ``out_dim`` is the dim of its output channels."""
    if len(shape(node)) != rank:
        return None
    stored, swapped = _untransposed(node)
    if swapped:
        out_dim = 2 * rank - 3 - out_dim
    path: list[fx.Node] = []
    source = stored
    while source not in captured.parameters:
        if source.target is dequantize:
            path.insert(0, source)
            source = source.args[0]  # type: ignore[assignment]
            continue
        known = has(source, _VIEWS) or _is_cast_to_itself(source)
        if source.op != "call_function" or not known or len(source.all_input_nodes) != 1:
            return None
        path.insert(0, source)
        (source,) = source.all_input_nodes
    key = (identity(captured.parameters[source]), *map(_as_step, path))
    return Weight(stored, source, out_dim, tuple(path), key)


def _as_step(node: fx.Node) -> Step:
    if node.target is dequantize:  # its scales are found by what it reads
        return Step(str(node.target), _as_tuples(node.args[3:7]))
    kwargs = tuple((name, _as_tuples(value)) for name, value in node.kwargs.items())
    return Step(str(node.target), _as_tuples(node.args[1:]), kwargs)


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value

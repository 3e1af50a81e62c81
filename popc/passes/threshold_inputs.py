"""Threshold pass: a linear reads the input channels that matter to this token, and no others.

Dense:  ``y = x Wᵀ``.
Pruned: ``y = threshold_linear(x, W, norm, threshold, center, base)``, ``base = center Wᵀ``.
A channel that is not read is taken to be its center: see :mod:`popc.ops.measure`. The choice is
made within the op, where x is at hand; C++ kernels make it once for all linears that read x.
Of quantised weights, stored channel-major, the op is ``graded_linears``: it also chooses how many
bits of a channel are read.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from functools import partial, reduce
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from popc import sessions
from popc.analysis.capture import Captured
from popc.analysis.input_groups import InputGroup
from popc.analysis.linears import Linear
from popc.analysis.mutation import writes_first
from popc.analysis.propagation import shape
from popc.ops import (
    count_active_channels,
    count_expert_grades,
    count_grades,
    graded_experts,
    graded_linears,
    quantized_linear,
    select_kernel,
    threshold_linear,
    threshold_linears,
)
from popc.passes.base import UNCHANGED, Binding, Call, PassResult
from popc.passes.builder import GraphBuilder, add_input, append_output, finish, replace
from popc.passes.experts import expert_of_rows, flat_input, shaped_output
from popc.passes.region_binding import InputGroupBinding, weights_of
from popc.passes.segments import InputState, add_scale, input_state, segment_offsets
from popc.planning.rewrite_plan import RewritePlan

aten = torch.ops.aten


def threshold_inputs(captured: Captured, work: RewritePlan) -> PassResult:
    """Let the linears of ``work.pruned_inputs`` read what matters to each token."""
    groups, config = work.pruned_inputs, work.config
    if not groups:
        return UNCHANGED
    binding = _Thresholds(captured, work)
    rewrite_linears(captured, groups, config.scope, config.count)
    return PassResult(len(groups), binding)


class _Thresholds(Binding[InputState]):
    """Feeds scales, thresholds, centers and what the linears make of these."""

    prunes = True
    owners: Sequence[InputGroupBinding]

    def __init__(self, captured: Captured, work: RewritePlan) -> None:
        config = work.config
        self.owners = [InputGroupBinding.of(group, captured) for group in work.pruned_inputs]
        self.policies = [config.input_policy(group.kind) for group in work.pruned_inputs]
        self.scope, self.budgets = config.scope, work.budgets
        self.outputs = int(config.count)
        self.by_grade = any(group.is_quantized for group in work.pruned_inputs)

    def state(self, args: Sequence[Any]) -> InputState:
        return input_state(self.owners, self.policies, args)

    def feed(self, call: Call, state: InputState) -> Sequence[Tensor] | None:
        budget = self.budgets.of(sessions.budget_of_call())
        fed = call.session.inputs.feed(
            state, state.owners, self.scope, budget, state.scale, call.batch
        )
        if fed is None:
            return None
        if fed.missing:
            call.warn_dense(f"{fed.missing} of {len(fed.groups)} inputs of linears")
        if fed.base is None:
            fed.base = self._base(call.args, state.scale, fed.center)
        low = [state.low_scale] if self.by_grade else []
        return state.scale, *low, fed.thresholds, fed.center, fed.base

    def absorb(self, call: Call, state: InputState, outputs: Sequence[Tensor]) -> None:
        for read in outputs:
            call.session.inputs.count(state.owners, read)

    def _base(self, args: Sequence[Any], scale: Tensor, center: Tensor) -> Tensor:
        """What the linears make of the centers, float32 ``[S, ΣN]``: most are 0, and not read."""
        parts = []
        offsets = segment_offsets([owner.group for owner in self.owners])
        for owner, (start, stop) in zip(self.owners, offsets, strict=True):
            x = center[:, start:stop]
            like = owner.group.x.meta["val"].dtype
            for stored in () if owner.group.experts else owner.stored:
                weight = *stored.held(args), None, stored.outputs, 1, stored.planes
                wide = x.to(torch.promote_types(like, x.dtype))
                parts.append(quantized_linear(wide, *weight).float())
            if not owner.stored:
                parts += _of_centers(owner, args, x, scale[start:stop])
        return torch.cat([center.new_zeros(len(center), 0), *parts], 1)


def _of_centers(
    owner: InputGroupBinding, args: Sequence[Any], center: Tensor, norm: Tensor
) -> Iterator[Tensor]:
    for linear, weight in weights_of(owner.group.linears, owner.weights, args):
        x = center.to(weight.dtype)
        op = select_kernel(threshold_linear, x, weight)
        yield op(x, weight, None, norm, norm.new_zeros(1), linear.weight.out_dim).float()


def rewrite_linears(
    captured: Captured, groups: Sequence[InputGroup], scope: str, counting: bool
) -> None:
    """Rewrite the linears of ``groups``; the graph gains these inputs.

    - ``popc_scale`` float32 ``[ΣK]``: ``‖W[:, c]‖`` over the linears of a group, as
      :mod:`popc.passes.segments` has it.
    - ``popc_low_scale`` likewise, of low planes, if a group's weights are quantised.
    - ``popc_threshold`` float32 ``[G, S]``; S is 1, or B for ``scope="sequence"``.
    - ``popc_center`` float32 ``[S, ΣK]``, group by group, but for those of experts.
    - ``popc_base`` float32 ``[S, ΣN]``: what the linears make of it, one after the other.

    With ``counting`` it also gains an output, int64 ``[G]``: how many channels each group reads; if
    a group's weights are quantised, int64 ``[G, 2]``: of how many it reads high and low planes.
    """
    graph = captured.gm.graph
    by_grade = any(group.is_quantized for group in groups)
    norms = add_scale(captured, groups)
    low_norms = add_scale(captured, groups, "popc_low_scale") if by_grade else None
    lead = 1 if scope == "batch" else shape(groups[0].x)[0]
    with captured.fake_mode:
        thresholds = torch.empty((len(groups), lead), device=groups[0].x.meta["val"].device)
        plain = [group for group in groups if not group.experts]
        width = sum(group.width for group in plain)
        centers = torch.empty((lead, width), device=thresholds.device)
        outputs = sum(linear.outputs for group in plain for linear in group.linears)
        bases = torch.empty((lead, outputs), device=thresholds.device)
    thresholds_in = add_input(captured, "popc_threshold", thresholds)
    center_in = add_input(captured, "popc_center", centers)
    base_in = add_input(captured, "popc_base", bases)
    inputs = norms, low_norms, thresholds_in, center_in
    position = {node: i for i, node in enumerate(graph.nodes)}
    writes = [i for node, i in position.items() if writes_first(node)]
    done = 0
    read: list[fx.Node] = []
    for i, (group, channels) in enumerate(zip(groups, segment_offsets(groups), strict=True)):
        with graph.inserting_before(group.linears[0].node):
            builder = GraphBuilder(captured, group.linears[0].node)
            fed = _parts_of(builder, group, inputs, i, channels)
            if counting:
                read.append(_count(builder, group, fed, by_grade))
        if group.experts:
            for linear in group.linears:
                _read_experts(captured, linear, fed)
            continue
        for linears in _joinable(group, position, writes):
            with graph.inserting_before(linears[0].node):
                builder = GraphBuilder(captured, linears[0].node)
                start, done = done, done + sum(linear.outputs for linear in linears)
                base = builder.call(aten.slice.Tensor, base_in, 1, start, done)
                rewrite = _read_by_grade if group.is_quantized else _rewrite_group
                rewrite(builder, group.x, linears, fed, base)
    if counting:
        append_output(captured, aten.stack.default, read)
    finish(captured)


class _Fed(NamedTuple):
    """A group's parts of the inputs of :func:`rewrite_linears`.

    All of its ops read these. ``low_norm`` is None unless its weights are quantised, ``center`` for
    experts.
    """

    norm: fx.Node
    low_norm: fx.Node | None
    threshold: fx.Node
    center: fx.Node | None


def _parts_of(
    builder: GraphBuilder,
    group: InputGroup,
    inputs: tuple[fx.Node, fx.Node | None, fx.Node, fx.Node],
    number: int,
    channels: tuple[int, int],
) -> _Fed:
    """The parts of the ``number``-th group, made at ``builder``'s place.

    Args:
        inputs: norms, low norms, thresholds and centers of all groups.
        channels: where the group's start and stop.
    """
    norms, low_norms, thresholds, centers = inputs
    norm = builder.call(aten.slice.Tensor, norms, 0, *channels)
    low_norm = center = None
    if group.is_quantized:
        low_norm = builder.call(aten.slice.Tensor, low_norms, 0, *channels)
    threshold = builder.call(aten.select.int, thresholds, 0, number)
    if not group.experts:
        center = builder.call(aten.slice.Tensor, centers, 1, *channels)
    return _Fed(norm, low_norm, threshold, center)


def _count(builder: GraphBuilder, group: InputGroup, fed: _Fed, by_grade: bool) -> fx.Node:
    """What a group reads; ``by_grade``: as int64 ``[2]``, where others of the graph are."""
    norm, low_norm, threshold, center = fed
    if group.experts:
        rows = _rows_of_experts(builder, group.linears[0])
        return builder.call(count_expert_grades, *rows, norm, low_norm, threshold)
    if group.is_quantized:
        return builder.call(count_grades, group.x, norm, low_norm, threshold, center)
    count = builder.call(count_active_channels, group.x, norm, threshold, center)
    return builder.call(aten.stack.default, [count, count]) if by_grade else count


def _rows_of_experts(builder: GraphBuilder, linear: Linear) -> tuple[fx.Node, fx.Node]:
    """x as ``[S, K]``, and the expert of each row."""
    return flat_input(builder, linear), expert_of_rows(builder, linear)


def _read_experts(captured: Captured, linear: Linear, fed: _Fed) -> None:
    """Of each row's expert, what ``linear`` reads by the threshold of its group."""
    packed, scale, zero, _, _, planes = linear.weight.node.args[:6]
    with captured.gm.graph.inserting_before(linear.node):
        builder = GraphBuilder(captured, linear.node)
        x, expert = _rows_of_experts(builder, linear)
        weight = packed, scale, zero, expert, fed.norm, fed.low_norm, fed.threshold
        y = builder.call(graded_experts, x, *weight, linear.outputs, planes)
        replace(linear.node, shaped_output(builder, linear, y))


def _read_by_grade(
    builder: GraphBuilder, x: fx.Node, linears: Sequence[Linear], fed: _Fed, base: fx.Node
) -> None:
    """As :func:`_rewrite_group`, of quantised weights."""
    if len(linears) == 1:
        (linear,) = linears
        packed, scale, zero, _, _, planes = linear.weight.node.args[:6]
        op = select_kernel(graded_linears, x.meta["val"], packed.meta["val"])  # type: ignore[union-attr]
        if op != graded_linears:
            weight = packed, scale, zero, linear.outputs, planes, linear.bias
            builder.change(linear.node, op, x, *weight, *fed, base)
            return
    stored = [linear.weight.node.args for linear in linears]
    packed, scales, zeros = ([args[i] for args in stored] for i in range(3))
    outputs = [linear.outputs for linear in linears]
    planes = [args[5] for args in stored]
    biases = [linear.bias for linear in linears]
    weights = packed, scales, zeros, outputs, planes, biases
    _give_parts(builder, builder.call(graded_linears, x, *weights, *fed, base), x, linears)


def _rewrite_group(
    builder: GraphBuilder, x: fx.Node, linears: Sequence[Linear], fed: _Fed, base: fx.Node
) -> None:
    """``linears`` become one op, which stands where the first of them is.

    Args:
        base: float32 ``[S, ΣN]``, of these linears.
    """
    norm, _, threshold, center = fed
    if len(linears) == 1:
        (linear,) = linears
        weight = linear.weight
        op = select_kernel(threshold_linear, x.meta["val"], weight.node.meta["val"])
        inputs = (x, weight.node, linear.bias, norm, threshold, weight.out_dim)
        builder.change(linear.node, op, *inputs, center, base)
        return
    weights = [linear.weight.node for linear in linears]
    biases = [linear.bias for linear in linears]
    out_dims = [linear.weight.out_dim for linear in linears]
    y = builder.call(threshold_linears, x, weights, biases, norm, threshold, out_dims, center, base)
    _give_parts(builder, y, x, linears)


def _give_parts(builder: GraphBuilder, y: fx.Node, x: fx.Node, linears: Sequence[Linear]) -> None:
    """Each linear becomes a view of its part of ``y [T · ΣN]``, linear after linear."""
    lead = [builder.size(x, dim) for dim in range(len(shape(x)) - 1)]
    parts = [y]
    if len(linears) > 1:
        tokens = reduce(partial(_product, builder), lead, 1)
        stops = accumulate((linear.outputs for linear in linears), initial=0)
        bounds = pairwise([_product(builder, tokens, stop) for stop in stops])
        parts = [builder.call(aten.slice.Tensor, y, 0, *bound) for bound in bounds]
    for linear, part in zip(linears, parts, strict=True):
        builder.change(linear.node, aten.view.default, part, [*lead, linear.outputs])


def _product(builder: GraphBuilder, a: Any, b: Any) -> Any:
    """Of two sizes, each a number or a node."""
    if isinstance(a, int):
        a, b = b, a
    if isinstance(a, int):
        return a * b
    if isinstance(b, int) and b < 2:
        return a if b else 0
    return builder.call(operator.mul, a, b)


def _joinable(
    group: InputGroup, position: dict[fx.Node, int], writes: Sequence[int]
) -> list[list[Linear]]:
    """The group's linears, those together that one op can take: where the first of them stands.

    For that nothing may be written in between, and what they read must be there already, or be
    no more than a view of a parameter, which is then brought there. Triton has an op for each.

    Args:
        position: of each node in the graph; kept true for those that are brought elsewhere.
        writes: the positions at which something is written.
    """
    op = graded_linears if group.is_quantized else threshold_linear
    weight = group.linears[0].weight.node
    read_by_op = weight.args[0] if group.is_quantized else weight
    if select_kernel(op, group.x.meta["val"], read_by_op.meta["val"]) != op:  # type: ignore[union-attr]
        return [[linear] for linear in group.linears]
    joined = [[group.linears[0]]]
    for linear in group.linears[1:]:
        first = joined[-1][0].node
        path = () if group.is_quantized else linear.weight.path  # planes are the graph's inputs
        read = [*path, *([] if linear.bias is None else [linear.bias])]
        late = [node for node in read if position[node] > position[first]]
        written = any(position[first] <= write < position[linear.node] for write in writes)
        if written or any(node not in linear.weight.path for node in late):
            joined.append([linear])
            continue
        for node in late:
            first.prepend(node)
            position[node] = position[first]
        joined[-1].append(linear)
    return joined

"""Threshold pass: a linear reads the input channels that matter to this token, and no others.

Dense:  ``y = x Wᵀ``.
Pruned: ``y = threshold_linear(x, W, norm, threshold, center, base)``, ``base = center Wᵀ``.
A channel that is not read is taken to be its center: see :mod:`popc.ops.measure`. The choice is
made within the op, where x is at hand; C++ kernels make it once for all linears that read x.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from popc import sessions
from popc.analysis.capture import Captured
from popc.analysis.input_groups import InputGroup
from popc.analysis.linears import Linear
from popc.analysis.mutation import writes_first
from popc.analysis.propagation import shape
from popc.ops import count_active_channels, select_kernel, threshold_linear, threshold_linears
from popc.passes.base import UNCHANGED, Binding, Call, PassResult
from popc.passes.builder import GraphBuilder, add_input, append_output, finish
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
        return state.scale, fed.thresholds, fed.center, fed.base

    def absorb(self, call: Call, state: InputState, outputs: Sequence[Tensor]) -> None:
        for read in outputs:
            call.session.inputs.count(state.owners, read)

    def _base(self, args: Sequence[Any], scale: Tensor, center: Tensor) -> Tensor:
        """What the linears make of the centers, float32 ``[S, ΣN]``: most are 0, and not read."""
        parts = []
        offsets = segment_offsets([owner.group for owner in self.owners])
        for owner, (start, stop) in zip(self.owners, offsets, strict=True):
            norm = scale[start:stop]
            for linear, weight in weights_of(owner.group.linears, owner.weights, args):
                x = center[:, start:stop].to(weight.dtype)
                op = select_kernel(threshold_linear, x, weight)
                y = op(x, weight, None, norm, norm.new_zeros(1), linear.weight.out_dim)
                parts.append(y.float())
        return torch.cat(parts, 1)


def rewrite_linears(
    captured: Captured, groups: Sequence[InputGroup], scope: str, counting: bool
) -> None:
    """Rewrite the linears of ``groups``; the graph gains four inputs.

    - ``popc_scale`` float32 ``[ΣK]``: ``‖W[:, c]‖`` over the linears of a group, group by group.
    - ``popc_threshold`` float32 ``[G, S]``; S is 1, or B for ``scope="sequence"``.
    - ``popc_center`` float32 ``[S, ΣK]``, group by group.
    - ``popc_base`` float32 ``[S, ΣN]``: what the linears make of it, one after the other.

    With ``counting`` it also gains an output, int64 ``[G]``: how many channels each group reads.
    """
    graph = captured.gm.graph
    norms = add_scale(captured, groups)
    lead = 1 if scope == "batch" else shape(groups[0].x)[0]
    with captured.fake_mode:
        thresholds = torch.empty((len(groups), lead), device=groups[0].x.meta["val"].device)
        centers = torch.empty((lead, segment_offsets(groups)[-1][1]), device=thresholds.device)
        outputs = sum(linear.outputs for group in groups for linear in group.linears)
        bases = torch.empty((lead, outputs), device=thresholds.device)
    thresholds_in = add_input(captured, "popc_threshold", thresholds)
    center_in = add_input(captured, "popc_center", centers)
    base_in = add_input(captured, "popc_base", bases)
    fed = norms, thresholds_in, center_in, base_in
    position = {node: i for i, node in enumerate(graph.nodes)}
    writes = [i for node, i in position.items() if writes_first(node)]
    done = 0
    read: list[fx.Node] = []
    for i, (group, (start, _)) in enumerate(zip(groups, segment_offsets(groups), strict=True)):
        if counting:
            with graph.inserting_before(group.linears[0].node):
                builder = GraphBuilder(captured, group.linears[0].node)
                read.append(builder.call(count_active_channels, group.x, *fed[:3], i, start))
        for linears in _joinable(group, position, writes):
            with graph.inserting_before(linears[0].node):
                builder = GraphBuilder(captured, linears[0].node)
                _rewrite_group(builder, group.x, linears, fed, (i, start, done))
            done += sum(linear.outputs for linear in linears)
    if counting:
        append_output(captured, aten.stack.default, read)
    finish(captured)


def _rewrite_group(
    builder: GraphBuilder,
    x: fx.Node,
    linears: Sequence[Linear],
    fed: tuple[fx.Node, fx.Node, fx.Node, fx.Node],
    offsets: tuple[int, int, int],
) -> None:
    """``linears`` become one op, which stands where the first of them is.

    Args:
        fed: norms, thresholds, centers and bases of all groups.
        offsets: where the group's part of them begins: its number, first channel and first output.
    """
    norm, threshold, center, base = fed
    if len(linears) == 1:
        (linear,) = linears
        weight = linear.weight
        op = select_kernel(threshold_linear, x.meta["val"], weight.node.meta["val"])
        inputs = (x, weight.node, linear.bias, norm, threshold, weight.out_dim)
        builder.change(linear.node, op, *inputs, center, base, *offsets)
        return
    weights = [linear.weight.node for linear in linears]
    biases = [linear.bias for linear in linears]
    out_dims = [linear.weight.out_dim for linear in linears]
    results = builder.call(
        threshold_linears, x, weights, biases, norm, threshold, out_dims, center, base, *offsets
    )
    for i, linear in enumerate(linears):
        builder.change(linear.node, operator.getitem, results, i)


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
    x = group.x.meta["val"]
    if (
        select_kernel(threshold_linear, x, group.linears[0].weight.node.meta["val"])
        != threshold_linear
    ):
        return [[linear] for linear in group.linears]
    joined = [[group.linears[0]]]
    for linear in group.linears[1:]:
        first = joined[-1][0].node
        read = [*linear.weight.path, *([] if linear.bias is None else [linear.bias])]
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

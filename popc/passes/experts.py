"""Experts' rows as ``[S, K]``, whatever form the model gives them, and which expert each meets."""

from __future__ import annotations

import torch
from torch import fx

from popc.analysis.linears import Linear
from popc.passes.builder import GraphBuilder

aten = torch.ops.aten


def flat_input(builder: GraphBuilder, linear: Linear) -> fx.Node:
    """The linear's input, ``[S, K]``."""
    assert linear.experts is not None
    if linear.experts.form == "index":
        return builder.call(aten.squeeze.dim, linear.x, 3 - linear.x_dim)
    if linear.experts.form == "batch":
        return builder.call(aten.reshape.default, linear.x, [-1, linear.inputs])
    return linear.x


def expert_of_rows(builder: GraphBuilder, linear: Linear) -> fx.Node:
    """The expert of each row, int64 ``[S]``."""
    experts = linear.experts
    assert experts is not None
    device = linear.x.meta["val"].device
    if experts.form == "index":
        assert experts.selector is not None
        return builder.call(aten.to.dtype, experts.selector, torch.int64)
    if experts.form == "batch":
        each = builder.call(aten.arange.default, experts.count, device=device)
        column = builder.call(aten.unsqueeze.default, each, 1)
        # Where the weights stand first, as in bmm(W, x), x's tokens are its last dim.
        rows = builder.size(linear.x, 3 - linear.x_dim)
        spread = builder.call(aten.expand.default, column, [experts.count, rows])
        return builder.call(aten.reshape.default, spread, [-1])
    rows = builder.size(linear.x, 0)
    positions = builder.call(aten.arange.default, rows, device=device)
    expert = builder.call(aten.searchsorted.Tensor, experts.selector, positions, right=True)
    # Rows after the last expert's belong to none; the model drops what they give.
    return builder.call(aten.clamp.default, expert, None, experts.count - 1)


def shaped_output(builder: GraphBuilder, linear: Linear, y: fx.Node) -> fx.Node:
    """``y [S, N]`` in the shape of the linear's own output."""
    assert linear.experts is not None
    if linear.experts.form == "index":
        return builder.call(aten.unsqueeze.default, y, 3 - linear.y_dim)
    if linear.experts.form == "batch":
        sizes = [linear.experts.count, -1, linear.outputs]
        return builder.call(aten.reshape.default, y, sizes)
    return y

"""Experts' rows as ``[S, K]``, whatever form the model gives them, and which expert each meets."""

from __future__ import annotations

import torch
from torch import fx

from popc.analysis.linears import Linear
from popc.analysis.propagation import shape
from popc.passes.builder import GraphBuilder

aten = torch.ops.aten


def flat_input(emit: GraphBuilder, linear: Linear) -> fx.Node:
    """The linear's input, ``[S, K]``."""
    assert linear.experts is not None
    if linear.experts.form == "index":
        return emit.call(aten.squeeze.dim, linear.x, 3 - linear.x_dim)
    if linear.experts.form == "batch":
        return emit.call(aten.reshape.default, linear.x, [-1, linear.inputs])
    return linear.x


def expert_of_rows(emit: GraphBuilder, linear: Linear) -> fx.Node:
    """The expert of each row, int64 ``[S]``."""
    experts = linear.experts
    assert experts is not None
    device = linear.x.meta["val"].device
    if experts.form == "index":
        assert experts.selector is not None
        return emit.call(aten.to.dtype, experts.selector, torch.int64)
    if experts.form == "batch":
        each = emit.call(aten.arange.default, experts.count, device=device)
        column = emit.call(aten.unsqueeze.default, each, 1)
        # Where the weights stand first, as in bmm(W, x), x's tokens are its last dim.
        rows = emit.size(linear.x, 3 - linear.x_dim)
        spread = emit.call(aten.expand.default, column, [experts.count, rows])
        return emit.call(aten.reshape.default, spread, [-1])
    rows = emit.size(linear.x, 0)
    places = emit.call(aten.arange.default, rows, device=device)
    found = emit.call(aten.searchsorted.Tensor, experts.selector, places, right=True)
    # Rows after the last expert's belong to none; the model drops what they give.
    return emit.call(aten.clamp.default, found, None, experts.count - 1)


def shaped_output(emit: GraphBuilder, linear: Linear, y: fx.Node) -> fx.Node:
    """``y [S, N]`` in the shape of the linear's own output."""
    assert linear.experts is not None
    if linear.experts.form == "index":
        return emit.call(aten.unsqueeze.default, y, 3 - linear.y_dim)
    if linear.experts.form == "batch":
        sizes = [linear.experts.count, -1, linear.outputs]
        return emit.call(aten.reshape.default, y, sizes)
    return y


def can_flatten(linear: Linear) -> bool:
    """Whether the rows of the linear can be laid out as ``[S, K]`` without a transpose."""
    return (
        linear.experts is None
        or linear.experts.form != "batch"
        or (linear.x_dim == 2 and len(shape(linear.x)) == 3)
    )

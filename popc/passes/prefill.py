"""Prefill pass: the graph stays dense and gains one output, each channel's sum of squares.

``Σ_t h_{t,c}²`` over the valid tokens is the statistic of arXiv 2602.06822's importance
``I_c = ‖down[:, c]‖ · ‖h_{·,c}‖₂``. It is summed in float64, so that sums over chunks add up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from popc.analysis.capture import Captured
from popc.analysis.plan import Region
from popc.analysis.rules import shape
from popc.analysis.tokens import mask_of, valid_tokens
from popc.passes.emit import Emitter, finish, map_arguments

aten = torch.ops.aten


def add_statistics(captured: Captured, regions: Sequence[Region], scope: str) -> None:
    """Append the output ``[S, ΣF]`` float64, the regions' statistics side by side.

    S is 1 for ``scope="batch"`` and the batch size for ``"sequence"``.
    """
    graph = captured.gm.graph
    output = graph.output_node()
    validity: dict[fx.Node, fx.Node] = {}
    sums = []
    with graph.inserting_before(output):
        for region in regions:
            mask = mask_of(region, graph)
            if mask is not None and mask not in validity:
                validity[mask] = _emit_validity(captured, mask)
            valid = validity[mask] if mask is not None else None
            sums.append(_emit_sum(captured, region, valid, scope))
        packed = Emitter(captured, output).call(aten.cat.default, sums, -1)
    (values,) = output.args
    output.args = ((*values, packed),)  # type: ignore[misc]
    finish(captured)


def _emit_validity(captured: Captured, mask: fx.Node) -> fx.Node:
    """``valid_tokens`` as nodes: traced once on the mask's fake value and spliced in."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with captured.fake_mode:
        traced = make_fx(valid_tokens)(mask.meta["val"])
    emit = Emitter(captured, mask)
    copied: dict[fx.Node, fx.Node] = {}
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            copied[node] = mask
        elif node.op == "output":
            return copied[node.args[0]]
        else:
            args, kwargs = map_arguments(node.args, node.kwargs, copied.__getitem__)
            copied[node] = emit.call(node.target, *args, **kwargs)
    raise AssertionError("a graph has an output")


def _by_token(emit: Emitter, region: Region) -> fx.Node:
    """h as ``[B, T, F]``, where batch and token axes can be told apart."""
    if len(shape(region.hidden)) == len(shape(region.grid)):
        return region.hidden
    sizes = [
        size if isinstance(size, int) else emit.call(aten.sym_size.int, region.grid, dim)
        for dim, size in enumerate(shape(region.grid)[:2])
    ]
    return emit.call(aten.reshape.default, region.hidden, [*sizes, region.channels])


def _emit_sum(captured: Captured, region: Region, valid: fx.Node | None, scope: str) -> fx.Node:
    """Nodes for ``Σ h²`` of one region, ``[S, F]``."""
    emit = Emitter(captured, region.hidden)
    hidden = emit.call(aten.to.dtype, _by_token(emit, region), torch.float64)
    squares = emit.call(aten.mul.Tensor, hidden, hidden)
    if valid is not None:
        # where, not a product: a NaN in a padding token must not reach the statistic.
        chosen = emit.call(aten.unsqueeze.default, valid, -1)
        zero = emit.call(aten.zeros_like.default, squares)
        squares = emit.call(aten.where.self, chosen, squares, zero)
    rank = len(shape(hidden))
    tokens = list(range(rank - 1)) if scope == "batch" else list(range(1, rank - 1))
    total = emit.call(aten.sum.dim_IntList, squares, tokens)
    return total if scope == "sequence" else emit.call(aten.unsqueeze.default, total, 0)

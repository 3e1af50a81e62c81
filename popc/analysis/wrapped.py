"""Weights that are no plain tensors, as quantised and distributed ones, and the linears of them.

Nothing is known here of the formats: a linear is what multiplies an activation by such a weight,
or by what the program makes of such weights alone, whatever function does it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from popc.analysis.capture import Captured
from popc.analysis.linears import as_linear
from popc.analysis.plan import Skipped
from popc.analysis.propagation import is_tensor
from popc.analysis.provenance import source_of, where


def wrapped_linears(captured: Captured) -> dict[fx.Node, str]:
    """Each linear whose weight is no plain tensor, in graph order, with the weight's type."""
    types = {node: type(tensor).__name__ for node, tensor in captured.wrapped.items()}
    linears: dict[fx.Node, str] = {}
    if not types:
        return linears
    for node in captured.gm.graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        sources = [source for source in node.all_input_nodes if _holds_tensors(source)]
        weights = [source for source in sources if source in types]
        others = [s for s in sources if s not in types and not _is_fixed(s, captured)]
        if weights and not others:
            types[node] = types[weights[0]]
        elif any(is_tensor(w) and w.meta["val"].dim() > 1 for w in weights):
            activations = [s for s in others if is_tensor(s) and s.meta["val"].is_floating_point()]
            if activations and as_linear(node, captured) is None:
                linears[node] = types[weights[0]]
    return linears


def refusal(node: fx.Node, kind: str) -> Skipped:
    """The linear ``node``, whose weight is a ``kind``, is left alone."""
    return Skipped(where(node), why(kind), op_name(node), source_of(node), "subclass")


def why(kind: str) -> str:
    """The reason for which a linear with such a weight is refused."""
    return f"its weight is a {kind}: popc reads plain tensors alone yet"


def op_name(node: fx.Node) -> str:
    """The op as people know it; functions and methods of Python's have no schema."""
    has_schema = hasattr(node.target, "_schema")
    return str(node.target if has_schema else getattr(node.target, "__name__", node.target))


def _holds_tensors(node: fx.Node) -> bool:
    value: Any = node.meta.get("val")
    return isinstance(value, torch.Tensor | tuple | list)


def _is_fixed(node: fx.Node, captured: Captured) -> bool:
    """Whether it is the same in every call: a plain parameter, or a constant of the program."""
    return node in captured.parameters or node.op == "get_attr"

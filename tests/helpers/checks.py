"""What every pass must leave true."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn


class _Checked(fx.Interpreter):
    """Runs a graph and compares every value with the node's ``meta["val"]``."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor) and n.op != "output":
            fake = n.meta["val"]
            assert (value.shape, value.dtype) == (fake.shape, fake.dtype), n.format_node()
        return value


def checked(gm: fx.GraphModule, *inputs: Any) -> Any:
    """Run ``gm``; check each node's value."""
    gm.graph.lint()
    with torch.no_grad():
        return _Checked(gm).run(*inputs)


def outputs_of(y: Tensor, x: Tensor, outputs: Sequence[int]) -> list[Tensor]:
    """``[..., N]`` of each linear, of what an op gives for several that read ``x [..., K]``."""
    lead = x.shape[:-1]
    return [
        part.view(*lead, n)
        for part, n in zip(y.split([lead.numel() * n for n in outputs]), outputs, strict=True)
    ]


def assert_meta_is_true(gm: fx.GraphModule, module: nn.Module, *inputs: Any) -> Any:
    """Run ``gm``, captured from ``module``, with its parameters lifted; check each node's value."""
    return checked(gm, *module.parameters(), *module.buffers(), *inputs)

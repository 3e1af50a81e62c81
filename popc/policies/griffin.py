"""GRIFFIN: ``policy="griffin"``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from popc.policies.base import FixedUnits

aten = torch.ops.aten


class Griffin(FixedUnits):
    """GRIFFIN (arXiv 2404.01365): the prompt's mask, by its flocking statistic.

    Each token's activations are scaled to length 1, ``Z̄ = Z / ‖Z‖`` (section 4.1), and a channel's
    statistic is the l2 norm of its column of Z̄; the top ``k`` are kept for the whole generation.
    """

    name = "griffin"

    def measured(self, emit: Any, h: Any) -> Any:
        """``h`` in float32, each token divided by its norm."""
        wide = emit.call(aten.to.dtype, h, torch.float32)
        norm = emit.call(aten.linalg_vector_norm.default, wide, 2, [-1], True)
        norm = emit.call(aten.clamp_min.default, norm, torch.finfo(torch.float32).tiny)
        return emit.call(aten.div.Tensor, wide, norm)

    def importance(self, squares: Tensor, norm: Tensor, *more: Tensor) -> Tensor:
        """The norm of a unit's share of each token, float64 ``[S, U]``; the weights don't count."""
        return squares.sqrt()

"""Quantised weights, read at as many bits as each token needs: ``policy="graded"``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from popc.policies.allocation import Allocation, Budget, GroupSpec, allocate
from popc.policies.base import InputPolicy


class Graded(InputPolicy):
    """Of each input channel a token reads nothing, the high plane alone, or both planes.

    The score of a channel is that of :class:`popc.policies.Threshold`, ``s_c = |x_c - mean_c| ·
    ‖W[:, c]‖``. Left out, it costs ``s_c²`` of squared error; read by its high plane alone, ``κ_c²
    s_c²``, with ``κ_c = ‖W4[:, c] - W[:, c]‖ / ‖W[:, c]‖``; and a reading costs λ for each byte. So
    a threshold ``t² = λ · b4`` gives both grades of a group of linears, b4 and b8 being the bytes
    of the high plane and of both: the high plane is read where ``s_c² (1 - κ_c²) > t²``, the low
    one too where ``s_c² κ_c² > t² (b8 - b4) / b4``. Where the high plane alone is never worth its
    bytes, both are read where ``s_c² > λ · b8``.

    Weights that are not quantised, or have one plane, are read as by ``"threshold"``.
    """

    name = "graded"

    def scale(self, norm: Tensor) -> Tensor:
        """``norm`` itself, as by ``"threshold"``."""
        return norm

    def scales(self, norm: Tensor, error: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """The square roots of what stands before ``(x_c - mean_c)²`` where it is compared to t²."""
        high = torch.clamp(1 - error, min=share)
        low = error * (share / (1 - share))
        return norm * high.sqrt(), norm * low.sqrt()

    def allocate(
        self, histograms: Tensor, groups: Sequence[GroupSpec], budget: Budget
    ) -> Allocation:
        """The budget shared out by the scores of the prompt: see :func:`allocate`."""
        return allocate(histograms, groups, budget, graded=True)

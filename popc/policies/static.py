"""One mask for all prompts, from a calibration text: ``policy="wanda_sp"`` and ``"flap"``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from popc.policies.base import FixedUnits, output_norm

if TYPE_CHECKING:
    from popc.analysis.findings import Region

aten = torch.ops.aten


class Wanda(FixedUnits):
    """Wanda-sp: one mask for all prompts, from a calibration text.

    The score is Wanda's (arXiv 2306.11695), ``‖W[:, c]‖ · ‖X_c‖``, summed over channels as FLAP's
    authors do for their baseline (arXiv 2312.11983, section 4).
    """

    name = "wanda_sp"
    calibrated = True

    def importance(self, squares: Tensor, norm: Tensor, *more: Tensor) -> Tensor:
        """The norm of what a unit adds to the output, float64 ``[S, U]``."""
        return output_norm(squares, norm)


class Flap(FixedUnits):
    """FLAP (arXiv 2312.11983): channels that hardly vary give way to their mean.

    The score is the variance of a channel times ``‖W[:, c]‖²`` (equation 4), over a
    calibration text; the output gains ``Σ W[:, c] · mean(X_c)`` of the pruned channels
    (equation 5).
    Every region keeps the same share, the paper's ``UL``.
    """

    name = "flap"
    targets = ("mlp",)
    parts = 3
    calibrated = compensates = True

    def values(self, emit: Any, h: Any, region: Region) -> tuple[Any, ...]:
        """``h``, ``h + 1`` and ones, float32 ``[..., K]``."""
        # Sums of squares alone are measured: (h + 1)² - h² = 2h + 1 tells the mean.
        wide = emit.call(aten.to.dtype, h, torch.float32)
        one = emit.call(aten.ones_like.default, wide)
        return wide, emit.call(aten.add.Tensor, wide, 1.0), one

    def importance(self, squares: Tensor, norm: Tensor, *more: Tensor) -> Tensor:
        """A unit's variance times its weights' norm squared, float64 ``[S, U]``."""
        variance = squares / more[1] - self.mean(squares, *more).square()
        return variance * norm.double().square()

    def mean(self, *squares: Tensor) -> Tensor:
        """Each column's mean over tokens, float64 ``[S, K]``."""
        plain, shifted, count = squares
        return (shifted - plain - count) / (2 * count)

    def refuses(self, region: Region) -> str | None:
        """Regions whose mean has no single weight to be added through."""
        if region.one_pass:
            return "its one pass scores its own tokens, and takes no mask from another text"
        if region.experts or region.columns.shape[1] > 1:
            return "a mean is added for single channels of one weight alone"
        return None

"""A threshold for each linear: ``policy="threshold"``, the default."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from popc.policies.allocation import Allocation, Budget, GroupSpec, allocate
from popc.policies.base import InputPolicy


class Threshold(InputPolicy):
    """Each linear reads the input channels whose score for this very token exceeds a threshold.

    The score ``|x_c - mean_c| · ‖W[:, c]‖`` is Wanda's (arXiv 2306.11695), on single tokens;
    thresholds are TEAL's idea (arXiv 2408.14690), and what is not read counts as its mean, SCAP's
    (arXiv 2412.07174); but both are taken from the prompt: no calibration. See
    :mod:`popc.passes.threshold_inputs` and, for how a budget becomes thresholds,
    :mod:`popc.policies.allocation`.
    """

    name = "threshold"

    def scale(self, norm: Tensor) -> Tensor:
        """``norm`` itself: a channel's score is its distance from the mean times that."""
        return norm

    def allocate(
        self, histograms: Tensor, groups: Sequence[GroupSpec], budget: Budget
    ) -> Allocation:
        """The budget shared out by the scores of the prompt: see :func:`allocate`."""
        return allocate(histograms, groups, budget)

"""How much each group of linears may leave unread, from what the prompt showed.

What a group loses with a token are the scores ``(|x_c - mean_c| · ‖W[:, c]‖)²`` of the channels
left out, which count as their means (see :func:`popc.ops.measure.centers`): the squared error of
its output, as far as the columns of W are orthogonal. All groups are given the same error ε
relative to a typical token's ``Σ_c``, so a group whose input is concentrated on few channels reads
fewer. ε is raised until the bytes that the prompt's tokens would have read meet the budget; or it
is given, and each prompt reads what it needs.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from popc.ops.measure import BINS, edges

# The weight of a group's own need in its share; the rest is the mean over groups alike. The needs
# of single layers differ by more than what following them is worth.
NEED_WEIGHT = 0.5
MIN_SHARE = 0.05  # share of channels that is read at least
READ_ALL = -1.0  # a threshold that every score exceeds
_LN_ERROR = (-40.0, 4.0)
_STEPS = 50


@dataclass(frozen=True)
class GroupSpec:
    """A group: its K channels, its weights' bytes, and what groups that do the same have alike."""

    width: int
    bytes: int
    alike: Hashable


@dataclass(frozen=True)
class Allocation:
    """Thresholds of scores, float32 ``[G]``; expected shares of channels read, ``[G]``; and ε."""

    thresholds: Tensor
    shares: Tensor
    error: float


@dataclass(frozen=True)
class Budget:
    """``share`` of all groups' bytes, to be read; or, with an ``error``, what that needs.

    Then at least ``least`` of them are read.
    """

    share: float
    error: float | None = None
    least: float = MIN_SHARE


def allocate(histograms: Tensor, groups: Sequence[GroupSpec], budget: Budget) -> Allocation:
    """Thresholds for G groups, whose scores were counted, float64 ``[G, BINS + 1]``.

    See :mod:`popc.ops.measure`.
    """
    curves = _Curves(histograms, groups)
    target = budget.share
    if budget.error is not None:
        shares = curves.shares(budget.error, in_each=True)
        if curves.read(shares) >= budget.least:
            return Allocation(curves.thresholds(shares), shares, budget.error)
        target = budget.least
    low, high = _LN_ERROR
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if curves.read(curves.shares(math.exp(middle))) > target:
            low = middle
        else:
            high = middle
    shares = curves.shares(math.exp(high))
    return Allocation(curves.thresholds(shares), shares, math.exp(high))


def at_shares(histograms: Tensor, groups: Sequence[GroupSpec], shares: Tensor) -> Allocation:
    """The thresholds by which groups read ``shares`` of their channels, float64 ``[G]``."""
    return Allocation(_Curves(histograms, groups).thresholds(shares), shares, float("nan"))


class _Curves:
    """For each group, the share of its scores below each bin, and the error of leaving them out."""

    def __init__(self, histograms: Tensor, groups: Sequence[GroupSpec]) -> None:
        counted = histograms.detach().double().cpu()
        bins = edges()
        in_range = bins[1:].isfinite()  # the last bins are of infinities and NaN: always read
        self.low, self.high = bins[:-1][in_range], bins[1:][in_range]
        middle = (self.low * self.high).sqrt().where(self.low > 0, self.high / 2)
        scores = counted[:, :BINS].sum(1, keepdim=True).clamp(min=1)
        counts = counted[:, :BINS][:, in_range] / scores
        self.below = _cumulative(counts)
        width = torch.tensor([[float(group.width)] for group in groups])
        # A geometric mean over tokens: a few outsized ones do not lift it.
        typical = (counted[:, BINS:] * width / scores).exp()
        self.error = _cumulative(counts * width * middle) / typical
        self.bytes = torch.tensor([float(group.bytes) for group in groups])
        classes = list(dict.fromkeys(group.alike for group in groups))
        self.class_of = torch.tensor([classes.index(group.alike) for group in groups])
        self.class_size = torch.bincount(self.class_of).double()

    def shares(self, error: float, in_each: bool = False) -> Tensor:
        """The shares of channels to read ``[G]`` for an error of ``error``, on average over groups
        alike; ``in_each``: in each of them."""
        errors = torch.full((len(self.error), 1), error, dtype=torch.float64)
        needed = 1 - _interpolate(self.error, errors, self.below)[:, 0]
        total = torch.zeros_like(self.class_size).index_add(0, self.class_of, needed)
        mean = total / self.class_size
        shares = NEED_WEIGHT * needed + (1 - NEED_WEIGHT) * mean[self.class_of]
        return (torch.maximum(shares, needed) if in_each else shares).clamp(MIN_SHARE, 1.0)

    def read(self, shares: Tensor) -> float:
        """The share of all bytes."""
        return float((shares * self.bytes).sum() / self.bytes.sum())

    def thresholds(self, shares: Tensor) -> Tensor:
        """Float32 ``[G]``: scores ``|x_c| · ‖W[:, c]‖`` that ``shares`` of the prompt's exceed."""
        bins = torch.arange(self.below.shape[1], dtype=torch.float64).expand_as(self.below)
        position = _interpolate(self.below, (1 - shares)[:, None], bins)[:, 0]
        i = position.long().clamp(max=len(self.low) - 1)
        part = position - i
        low, high = self.low[i], self.high[i]
        ratio = high / low.clamp(min=torch.finfo(torch.float32).tiny)
        squared = (low * ratio**part).where(low > 0, high * part)
        return squared.sqrt().float()


def _cumulative(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values.cumsum(1), (1, 0))


def _interpolate(x: Tensor, at: Tensor, y: Tensor) -> Tensor:
    """``y`` where ascending ``x`` reaches ``at``, row by row; linear between points."""
    i = torch.searchsorted(x, at).clamp(1, x.shape[1] - 1)
    x0, x1 = x.gather(1, i - 1), x.gather(1, i)
    y0, y1 = y.gather(1, i - 1), y.gather(1, i)
    part = ((at - x0) / (x1 - x0).clamp(min=1e-300)).clamp(0, 1)
    return y0 + part * (y1 - y0)

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

# How far a group's share follows its own need; the rest is the mean over groups alike. The needs of
# single layers differ by more than what following them is worth.
OWN = 0.5
LEAST = 0.05  # share of channels that is read at least
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
    least: float = LEAST


def allocate(histograms: Tensor, demands: Sequence[GroupSpec], budget: Budget) -> Allocation:
    """Thresholds for G groups, whose scores were counted, float64 ``[G, BINS + 1]``.

    See :mod:`popc.ops.measure`.
    """
    curves = _Curves(histograms, demands)
    share = budget.share
    if budget.error is not None:
        found = curves.shares(budget.error, at_least_own=True)
        if curves.read(found) >= budget.least:
            return Allocation(curves.thresholds(found), found, budget.error)
        share = budget.least
    low, high = _LN_ERROR
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if curves.read(curves.shares(math.exp(middle))) > share:
            low = middle
        else:
            high = middle
    found = curves.shares(math.exp(high))
    return Allocation(curves.thresholds(found), found, math.exp(high))


def at_shares(histograms: Tensor, groups: Sequence[GroupSpec], shares: Tensor) -> Allocation:
    """The thresholds by which groups read ``shares`` of their channels, float64 ``[G]``."""
    return Allocation(_Curves(histograms, groups).thresholds(shares), shares, float("nan"))


class _Curves:
    """For each group, the share of its scores below each bin, and the error of leaving them out."""

    def __init__(self, histograms: Tensor, demands: Sequence[GroupSpec]) -> None:
        held = histograms.detach().double().cpu()
        ends = edges()
        finite = ends[1:].isfinite()  # the last bins are of infinities and NaN: always read
        self.low, self.high = ends[:-1][finite], ends[1:][finite]
        middle = (self.low * self.high).sqrt().where(self.low > 0, self.high / 2)
        scores = held[:, :BINS].sum(1, keepdim=True).clamp(min=1)
        counts = held[:, :BINS][:, finite] / scores
        self.below = _cumulated(counts)
        width = torch.tensor([[float(demand.width)] for demand in demands])
        # A geometric mean over tokens: a few outsized ones do not lift it.
        typical = (held[:, BINS:] * width / scores).exp()
        self.error = _cumulated(counts * width * middle) / typical
        self.bytes = torch.tensor([float(demand.bytes) for demand in demands])
        classes = list(dict.fromkeys(demand.alike for demand in demands))
        self.member = torch.tensor([classes.index(demand.alike) for demand in demands])
        self.size = torch.bincount(self.member).double()

    def shares(self, error: float, at_least_own: bool = False) -> Tensor:
        """The shares of channels to read ``[G]`` for an error of ``error``, on average over groups
        alike; ``at_least_own``: in each of them."""
        given = torch.full((len(self.error), 1), error, dtype=torch.float64)
        own = 1 - _at(self.error, given, self.below)[:, 0]
        mean = torch.zeros_like(self.size).index_add(0, self.member, own) / self.size
        shares = OWN * own + (1 - OWN) * mean[self.member]
        return (torch.maximum(shares, own) if at_least_own else shares).clamp(LEAST, 1.0)

    def read(self, shares: Tensor) -> float:
        """The share of all bytes."""
        return float((shares * self.bytes).sum() / self.bytes.sum())

    def thresholds(self, shares: Tensor) -> Tensor:
        """Float32 ``[G]``: scores ``|x_c| · ‖W[:, c]‖`` that ``shares`` of the prompt's exceed."""
        bins = torch.arange(self.below.shape[1], dtype=torch.float64).expand_as(self.below)
        place = _at(self.below, (1 - shares)[:, None], bins)[:, 0]
        at = place.long().clamp(max=len(self.low) - 1)
        part = place - at
        low, high = self.low[at], self.high[at]
        ratio = high / low.clamp(min=torch.finfo(torch.float32).tiny)
        squared = (low * ratio**part).where(low > 0, high * part)
        return squared.sqrt().float()


def _cumulated(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values.cumsum(1), (1, 0))


def _at(x: Tensor, given: Tensor, y: Tensor) -> Tensor:
    """``y`` where ascending ``x`` reaches ``given``, row by row; linear between points."""
    place = torch.searchsorted(x, given).clamp(1, x.shape[1] - 1)
    x0, x1 = x.gather(1, place - 1), x.gather(1, place)
    y0, y1 = y.gather(1, place - 1), y.gather(1, place)
    part = ((given - x0) / (x1 - x0).clamp(min=1e-300)).clamp(0, 1)
    return y0 + part * (y1 - y0)

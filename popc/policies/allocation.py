"""How much each group of linears may leave unread, from what the prompt showed.

What a group loses with a token are the scores ``(|x_c - mean_c| · ‖W[:, c]‖)²`` of the channels
left out, which count as their means (see :func:`popc.ops.measure.centers`): the squared error of
its output, as far as the columns of W are orthogonal. All groups are given the same error ε
relative to a typical token's ``Σ_c``, so a group whose input is concentrated on few channels reads
fewer. ε is raised until the bytes that the prompt's tokens would have read meet the budget; or it
is given, and each prompt reads what it needs.

Of quantised weights a channel can be read at a lower grade, by its high plane alone: see
:mod:`popc.policies.graded`. One threshold of a group then stands for both of its grades, and its
error and the bytes that it reads are functions of that threshold alone.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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


class HighPlane(NamedTuple):
    """What it is to read of quantised weights the high plane alone.

    Attributes:
        share: of the bytes of both planes, ``0 < share < 1``; scales are counted with the high one.
        error: ``Σ_c κ_c² ‖W[:, c]‖² / Σ_c ‖W[:, c]‖²``: see :mod:`popc.policies.graded`.
    """

    share: float
    error: float


@dataclass(frozen=True)
class GroupSpec:
    """A group: its K channels, its weights' bytes, and what groups that do the same have alike.

    Attributes:
        high: None where weights are not quantised, or have one plane.
        has_centers: whether a channel that is not read counts as its mean; else as 0.
    """

    width: int
    bytes: int
    alike: Hashable
    high: HighPlane | None = None
    has_centers: bool = True


@dataclass(frozen=True)
class Allocation:
    """Thresholds of scores, float32 ``[G]``; expected shares of bytes read, ``[G]``; and ε.

    Of weights that are not read by grade, the share of bytes is that of channels.
    """

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


def allocate(
    histograms: Tensor, groups: Sequence[GroupSpec], budget: Budget, graded: bool = False
) -> Allocation:
    """Thresholds for G groups, whose scores were counted, float64 ``[G, BINS + 1]``.

    See :mod:`popc.ops.measure`.

    Args:
        graded: whether channels of quantised weights are read by grade, as by
            :class:`popc.policies.Graded`: the scores that were counted are those of high planes.
    """
    if budget.error is None and budget.share >= 1:
        every = torch.ones(len(groups), dtype=torch.float64)
        return Allocation(torch.full_like(every, READ_ALL).float(), every, 0.0)
    curves = _Curves(histograms, groups, graded)
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
    """For each group, by a threshold at the edge of each bin: the share of its bytes that is not
    read, ``unread``, and the ``error`` of that."""

    def __init__(
        self, histograms: Tensor, groups: Sequence[GroupSpec], graded: bool = False
    ) -> None:
        counted = histograms.detach().double().cpu()
        bins = edges()
        in_range = bins[1:].isfinite()  # the last bins are of infinities and NaN: always read
        self.low, self.high = bins[:-1][in_range], bins[1:][in_range]
        middle = (self.low * self.high).sqrt().where(self.low > 0, self.high / 2)
        scores = counted[:, :BINS].sum(1, keepdim=True).clamp(min=1)
        counts = counted[:, :BINS][:, in_range] / scores
        below = _cumulative(counts)
        width = torch.tensor([[float(group.width)] for group in groups])
        # A geometric mean over tokens: a few outsized ones do not lift it.
        typical = (counted[:, BINS:] * width / scores).exp()
        error = _cumulative(counts * width * middle) / typical
        if graded and any(group.high is not None for group in groups):
            self.unread, self.error = _by_grade(below, error, groups, self.low, self.high)
        else:
            self.unread, self.error = below, error
        self.bytes = torch.tensor([float(group.bytes) for group in groups])
        classes = list(dict.fromkeys(group.alike for group in groups))
        self.class_of = torch.tensor([classes.index(group.alike) for group in groups])
        self.class_size = torch.bincount(self.class_of).double()

    def shares(self, error: float, in_each: bool = False) -> Tensor:
        """The shares of bytes to read ``[G]`` for an error of ``error``, on average over groups
        alike; ``in_each``: in each of them."""
        errors = torch.full((len(self.error), 1), error, dtype=torch.float64)
        needed = 1 - _interpolate(self.error, errors, self.unread)[:, 0]
        total = torch.zeros_like(self.class_size).index_add(0, self.class_of, needed)
        mean = total / self.class_size
        shares = NEED_WEIGHT * needed + (1 - NEED_WEIGHT) * mean[self.class_of]
        return (torch.maximum(shares, needed) if in_each else shares).clamp(MIN_SHARE, 1.0)

    def read(self, shares: Tensor) -> float:
        """The share of all bytes."""
        return float((shares * self.bytes).sum() / self.bytes.sum())

    def thresholds(self, shares: Tensor) -> Tensor:
        """Float32 ``[G]``: thresholds of scores by which the prompt's tokens read ``shares``."""
        bins = torch.arange(self.unread.shape[1], dtype=torch.float64).expand_as(self.unread)
        position = _interpolate(self.unread, (1 - shares)[:, None], bins)[:, 0]
        i = position.long().clamp(max=len(self.low) - 1)
        part = position - i
        low, high = self.low[i], self.high[i]
        ratio = high / low.clamp(min=torch.finfo(torch.float32).tiny)
        squared = (low * ratio**part).where(low > 0, high * part)
        return squared.sqrt().float()


def ratio_of_scores(high: HighPlane) -> float:
    """How many times the squared score of its low plane that of its high plane is, on average, 1
    at least: see :meth:`popc.policies.Graded.scales`."""
    low = high.error * high.share / (1 - high.share)
    return max(1.0, max(1 - high.error, high.share) / max(low, 1e-30))


def _by_grade(
    below: Tensor, error: Tensor, groups: Sequence[GroupSpec], low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """The share of bytes unread and the error, ``[G, P]``, of both grades together.

    Args:
        below, error: ``[G, P]``, by what squared scores of high planes fall below each edge.
        low, high: where bins begin and end, ``[P - 1]``.
    """
    edge = torch.cat((low, high[-1:])).expand_as(below).contiguous()
    planes = [group.high or HighPlane(1.0, 0.0) for group in groups]
    ratio = [1.0 if group.high is None else ratio_of_scores(group.high) for group in groups]
    at = edge * torch.tensor(ratio, dtype=torch.float64)[:, None]
    of_high = torch.tensor([[plane.share] for plane in planes], dtype=torch.float64)
    coarse = torch.tensor([[plane.error] for plane in planes], dtype=torch.float64)
    low_below, low_error = (_interpolate(edge, at, curve) for curve in (below, error))
    return of_high * below + (1 - of_high) * low_below, error + coarse * (low_error - error)


def _cumulative(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values.cumsum(1), (1, 0))


def _interpolate(x: Tensor, at: Tensor, y: Tensor) -> Tensor:
    """``y`` where ascending ``x`` reaches ``at``, row by row; linear between points."""
    i = torch.searchsorted(x, at).clamp(1, x.shape[1] - 1)
    x0, x1 = x.gather(1, i - 1), x.gather(1, i)
    y0, y1 = y.gather(1, i - 1), y.gather(1, i)
    part = ((at - x0) / (x1 - x0).clamp(min=1e-300)).clamp(0, 1)
    return y0 + part * (y1 - y0)

"""The kinds of policies: of units, which a prompt ranks, and of inputs, which each token chooses.

A policy of one's own is a class of either kind with a name, in one short file:
:func:`popc.register_policy` makes it known to :class:`popc.Config` and the command line.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from popc.analysis.findings import Region
    from popc.analysis.plan import RegionRecord
    from popc.policies.allocation import Allocation, Budget, GroupSpec

# For what only has units: experts, and encoders, whose one pass reads all weights anyway.
UNITS_BY_DEFAULT = "pop"


@dataclass(frozen=True)
class Counts:
    """Static unit counts of one region (arXiv 2602.06822, section 3: partition).

    ``retained + candidate`` units are computed at decode, of which ``active`` are kept. A unit is
    a channel of an MLP, or a KV group of attention heads.
    """

    retained: int
    candidate: int
    active: int

    @property
    def live(self) -> int:
        """|R| + |C|: the units that a decode step computes."""
        return self.retained + self.candidate


class Policy:
    """What all kinds have in common; by itself it prunes nothing.

    Attributes:
        name: by which :class:`popc.Config` knows it.
        targets: kinds of targets that it prunes if none are given.
        calibrated: a calibration text is measured, not the prompt.
        units: the name of the policy that prunes units where this one has none.
    """

    name = "dense"
    targets: tuple[str, ...] = ()
    calibrated = False
    units = UNITS_BY_DEFAULT

    def prunes_units(self, region: Region | RegionRecord) -> bool:
        """Whether it prunes the units of a region, not the inputs of its linears."""
        return False

    @property
    def prunes_inputs(self) -> bool:
        """Whether it prunes input channels of linears."""
        return False


class Dense(Policy):
    """Nothing is pruned."""


class UnitPolicy(Policy, ABC):
    """Units of a region: what a prompt measures of them, how it ranks them, what tokens re-choose.

    Attributes:
        parts: how many values :meth:`values` measures.
        staged: a decode step scores a region's first factor: see :class:`popc.policies.Staged`.
        compensates: what pruned units give on average, :meth:`mean`, is added to the output.
    """

    targets: tuple[str, ...] = ("mlp", "experts")
    parts = 1
    staged = compensates = False

    def prunes_units(self, region: Region | RegionRecord) -> bool:
        """Whether units of ``region`` are pruned: of every one."""
        return True

    @abstractmethod
    def counts(self, units: int, sparsity: float, candidate: float) -> Counts:
        """How many of ``units`` are retained, candidates and active: Python numbers, so static."""

    @abstractmethod
    def importance(self, squares: Tensor, norm: Tensor, *more: Tensor) -> Tensor:
        """The rank of units, larger first, float64 ``[S, U]``.

        Args:
            squares: the sums over tokens and a unit's columns, float64 ``[S, U]``.
            norm: ``‖W[:, columns]‖`` of what contracts them, float32 ``[U]``, or ``[E, U]``.
            more: as ``squares``, of the second value and those after it.
        """

    def measured(self, emit: Any, h: Any) -> Any:
        """The value whose squares are summed over the prompt's tokens, made of h ``[..., K]``.

        Args:
            emit: a :class:`popc.passes.builder.GraphBuilder`; ``emit.call(op, ...)`` adds a node.
            h: the node of what the consumers read.
        """
        return h

    def values(self, emit: Any, h: Any, region: Region) -> tuple[Any, ...]:
        """``parts`` nodes to measure, for policies that need more than one, or other than h.

        Args:
            region: the :class:`popc.analysis.findings.Region`, with the nodes of its graph.
        """
        return (self.measured(emit, h),)

    def scale(self, norm: Tensor, *squares: Tensor) -> Tensor:
        """The factor of a token's ``|h|`` in its score, ``[U]``, ``[E, U]``, ``[S, U]``.

        Args:
            squares: of each value, as :meth:`importance` takes them.
        """
        return norm

    def mean(self, *squares: Tensor) -> Tensor:
        """With ``compensates``: h's mean over tokens, from the sums of each column ``[S, K]``."""
        raise NotImplementedError

    def refuses(self, region: Region) -> str | None:
        """Why it can't prune a :class:`popc.analysis.findings.Region`; None if it can."""
        return None


class InputPolicy(Policy):
    """Input channels of linears: each token reads those whose score exceeds a threshold.

    The score of a channel is ``|x_c - mean_c| · scale_c``. Channels that are not read count as
    their mean over the prompt. Needs one weight for all tokens, or quantised ones, and a decode
    phase: other experts, and encoders, are pruned by the policy ``units``.
    """

    targets = ("mlp", "attention", "experts", "other")

    def prunes_units(self, region: Region | RegionRecord) -> bool:
        """Whether units of ``region`` are pruned: where inputs can't be."""
        return region.one_pass or (bool(region.experts) and not region.by_grade)

    @property
    def prunes_inputs(self) -> bool:
        """True: it prunes the inputs of linears."""
        return True

    @abstractmethod
    def scale(self, norm: Tensor) -> Tensor:
        """What ``|x_c - mean_c|`` is multiplied with, float32 ``[K]``, positive.

        Args:
            norm: ``‖W[:, c]‖`` over all linears that read x, float32 ``[K]``.
        """

    def scales(self, norm: Tensor, error: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Of quantised weights: what ``|x_c - mean_c|`` is multiplied with for each of two grades.

        A channel's high plane is read where the first product exceeds the threshold; its low plane
        too where the second one does as well. By default both planes are read, or nothing.

        Args:
            norm: ``‖W[:, c]‖`` over all linears that read x, float32 ``[K]``.
            error: κ_c², what reading the high plane alone costs: ``‖W4[:, c] - W[:, c]‖²`` by
                ``‖W[:, c]‖²``, float32 ``[K]``; 0 of weights that have one plane.
            share: what the high plane takes of the bytes of both, scales included.

        Returns:
            Both float32 ``[K]``. Scores that the prompt counts are those of the first.
        """
        scale = self.scale(norm)
        return scale, scale

    @abstractmethod
    def allocate(
        self, histograms: Tensor, groups: Sequence[GroupSpec], budget: Budget
    ) -> Allocation:
        """A threshold for each group of linears, so that together they read ``budget``.

        Args:
            histograms: how the scores of the prompt's tokens are distributed in each group,
                float64 ``[G, BINS + 1]``: see :mod:`popc.ops.measure`.
        """


def active_units(units: int, sparsity: float) -> int:
    """How many of ``units`` a decode step keeps: ``round((1 - r)·U)``, and one at least."""
    return max(1, round((1 - sparsity) * units))


def output_norm(squares: Tensor, norm: Tensor) -> Tensor:
    """``‖W[:, u]‖ · sqrt(Σ_t h²)``, float64: how much units add to the output, over the prompt."""
    return squares.sqrt() * norm.double()


class FixedUnits(UnitPolicy):
    """Policies of units by which no token re-chooses."""

    def counts(self, units: int, sparsity: float, candidate: float) -> Counts:
        """No candidates: the active units are those of the prompt."""
        active = active_units(units, sparsity)
        return Counts(active, 0, active)

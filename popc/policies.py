"""Policies: what a prefill measures, how units are ranked by it, and what each token may re-choose.

A policy of units is a small class: see :class:`Policy`, whose own methods are the paper's.
:func:`register` makes one known by its name, to :class:`popc.Config` and the command line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from popc.errors import ConfigError


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
    """POP (arXiv 2602.06822): retained, candidate and pruned units by the prompt's importance.

    γ = 0 is its ablation with a mask that the prompt fixes, γ = 1 the one that re-scores every unit
    with each token.

    Attributes:
        name: by which :class:`popc.Config` knows it.
        targets: kinds that it prunes if none are given.
        parts: how many values :meth:`values` measures.
        staged: a decode step scores a region's first factor: see :class:`Staged`.
        calibrated: a text given beforehand is measured, not the prompt.
        compensates: what pruned units give on average, :meth:`mean`, is added to the output.
    """

    name = "pop"
    targets: tuple[str, ...] = ("mlp", "experts")
    parts = 1
    staged = calibrated = compensates = False

    def counts(self, units: int, sparsity: float, candidate: float) -> Counts:
        """How many of ``units`` are retained, candidates and active: Python numbers, so static.

        ``active = round((1 - r)·U)``; R is the top ``(1 - r - γ/2)·U`` and C the next ``γ·U``,
        both cut so that ``retained <= active <= retained + candidate <= units``. With more γ, R
        never grows and R ∪ C never shrinks, so a token never keeps less of its score.
        """
        active = _active(units, sparsity)
        retained = min(max(0, round((1 - sparsity - candidate / 2) * units)), active)
        # γ·U candidates, where R can't shrink any further, and γ = 1 has all of them.
        live = max(round((1 - sparsity + candidate / 2) * units), round(candidate * units), active)
        live = min(units, live)
        return Counts(retained, live - retained, active)

    def measured(self, emit: Any, h: Any) -> Any:
        """The value whose squares are summed over the prompt's tokens, made of h ``[..., K]``.

        Args:
            emit: a :class:`popc.passes.builder.Emitter`; ``emit.call(op, ...)`` adds a node.
            h: the node of what the consumers read.
        """
        return h

    def values(self, emit: Any, h: Any, region: Any) -> tuple[Any, ...]:
        """``parts`` nodes to measure, for policies that need more than one, or other than h.

        Args:
            region: the :class:`popc.Region`.
        """
        return (self.measured(emit, h),)

    def importance(self, squares: Tensor, norm: Tensor, *more: Tensor) -> Tensor:
        """The rank of units, larger first, float64 ``[S, U]``.

        Args:
            squares: the sums over tokens and a unit's columns, float64 ``[S, U]``.
            norm: ``‖W[:, columns]‖`` of what contracts them, float32 ``[U]``, or ``[E, U]``.
            more: as ``squares``, of the second value and those after it.
        """
        return squares.sqrt() * norm.double()

    def scale(self, norm: Tensor, *squares: Tensor) -> Tensor:
        """What a token's ``|h|`` is multiplied with to score it, ``[U]``, ``[E, U]``, ``[S, U]``.

        Args:
            squares: of each value, as :meth:`importance` takes them.
        """
        return norm

    def mean(self, *squares: Tensor) -> Tensor:
        """With ``compensates``: h's mean over tokens, from the sums of each column ``[S, K]``."""
        raise NotImplementedError

    def refuses(self, region: Any) -> str | None:
        """Why it can't prune a :class:`popc.Region`; None if it can."""
        return None


class _Fixed(Policy):
    """Policies by which no token re-chooses."""

    def counts(self, units: int, sparsity: float, candidate: float) -> Counts:
        active = _active(units, sparsity)
        return Counts(active, 0, active)


class Griffin(_Fixed):
    """GRIFFIN (arXiv 2404.01365): the prompt's mask, by its flocking statistic.

    Each token's activations are scaled to length 1, ``Z̄ = Z / ‖Z‖`` (section 4.1), and a channel's
    statistic is the l2 norm of its column of Z̄; the top ``k`` are kept for the whole generation.
    """

    name = "griffin"

    def measured(self, emit: Any, h: Any) -> Any:
        aten = torch.ops.aten
        wide = emit.call(aten.to.dtype, h, torch.float32)
        norm = emit.call(aten.linalg_vector_norm.default, wide, 2, [-1], True)
        norm = emit.call(aten.clamp_min.default, norm, torch.finfo(torch.float32).tiny)
        return emit.call(aten.div.Tensor, wide, norm)

    def importance(self, squares: Tensor, norm: Tensor, *more: Tensor) -> Tensor:
        return squares.sqrt()


class Staged(Policy):
    """A gate first: only the channels where it is large are computed any further.

    ``g = act(x gateᵀ)`` is computed on the live channels and scored by
    ``|g_c| · ‖down[:, c]‖ · rms(up_c)``, the last factor over the prompt's tokens; of ``up`` and
    ``down`` only the chosen channels are read. The idea is CATS' (arXiv 2404.08763), with the
    weights' norms and the prompt in place of calibrated thresholds.

    Args:
        pruned: the share of channels that POP's importance leaves out with the prompt.
    """

    targets = ("mlp",)
    parts = 2
    staged = True

    def __init__(self, name: str, pruned: float) -> None:
        self.name, self.pruned = name, pruned

    def counts(self, units: int, sparsity: float, candidate: float) -> Counts:
        active = _active(units, sparsity)
        return Counts(0, max(active, units - round(self.pruned * units)), active)

    def values(self, emit: Any, h: Any, region: Any) -> tuple[Any, ...]:
        # Without a gate it is refused; but in an encoder's one pass h is at hand, and scored.
        return h, h if region.gate is None else region.gate.other

    def scale(self, norm: Tensor, *squares: Tensor) -> Tensor:
        return (norm.double() * squares[1].sqrt()).float()

    def refuses(self, region: Any) -> str | None:
        if region.one_pass or region.gate is not None:
            return None
        return "its channels are no product of a gate's and another linear's"


class Wanda(_Fixed):
    """Wanda-sp: one mask for all prompts, from a text given beforehand.

    The score is Wanda's (arXiv 2306.11695), ``‖W[:, c]‖ · ‖X_c‖``, summed over channels as FLAP's
    authors do for their baseline (arXiv 2312.11983, section 4).
    """

    name = "wanda_sp"
    calibrated = True


class Flap(Wanda):
    """FLAP (arXiv 2312.11983): channels that hardly vary give way to their mean.

    The score is the variance of a channel times ``‖W[:, c]‖²`` (equation 4), over a text given
    beforehand; the output gains ``Σ W[:, c] · mean(X_c)`` of the pruned channels (equation 5).
    Every region keeps the same share, the paper's ``UL``.
    """

    name = "flap"
    targets = ("mlp",)
    parts = 3
    compensates = True

    def values(self, emit: Any, h: Any, region: Any) -> tuple[Any, ...]:
        # Sums of squares alone are measured: (h + 1)² - h² = 2h + 1 tells the mean.
        aten = torch.ops.aten
        wide = emit.call(aten.to.dtype, h, torch.float32)
        one = emit.call(aten.ones_like.default, wide)
        return wide, emit.call(aten.add.Tensor, wide, 1.0), one

    def importance(self, squares: Tensor, norm: Tensor, *more: Tensor) -> Tensor:
        variance = squares / more[1] - self.mean(squares, *more).square()
        return variance * norm.double().square()

    def mean(self, *squares: Tensor) -> Tensor:
        plain, shifted, count = squares
        return (shifted - plain - count) / (2 * count)

    def refuses(self, region: Any) -> str | None:
        if region.one_pass:
            return "its one pass scores its own tokens, and takes no mask from another text"
        if region.experts or region.columns.shape[1] > 1:
            return "a mean is added for single channels of one weight alone"
        return None


class Contraction(Policy):
    """Each linear reads the input channels whose score for this very token exceeds a threshold.

    The score ``|x_c - mean_c| · ‖W[:, c]‖`` is Wanda's (arXiv 2306.11695), on single tokens;
    thresholds are TEAL's idea (arXiv 2408.14690), and what is not read counts as its mean, SCAP's
    (arXiv 2412.07174); but both are taken from the prompt: no calibration. It has no units: see
    ``popc/passes/threshold_inputs.py`` and, for how a budget becomes thresholds,
    ``popc/planning/allocation.py``. Experts, and encoders, whose one pass reads all weights
    anyway, are pruned by POP under it.
    """

    name = "contraction"
    targets = ("mlp", "attention", "experts", "other")


class Dense(Policy):
    """Nothing is pruned."""

    name = "dense"
    targets = ()


def _active(units: int, sparsity: float) -> int:
    return max(1, round((1 - sparsity) * units))


_known: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        Contraction(),
        Policy(),
        Griffin(),
        Staged("staged", 0.0),
        Staged("staged_pruned", 0.1),
        Wanda(),
        Flap(),
        Dense(),
    )
}


def register(policy: Policy) -> None:
    """Make a policy of one's own known by its name.

    Raises:
        ConfigError: it is no :class:`Policy`, or the name is taken.
    """
    if not isinstance(policy, Policy):
        raise ConfigError("policy", policy, "an instance of a popc.Policy")
    if policy.name in _known and type(_known[policy.name]) is not type(policy):
        raise ConfigError("policy", policy.name, f"a name other than {', '.join(_known)}")
    _known[policy.name] = policy


def names() -> tuple[str, ...]:
    return tuple(_known)


def get(name: str) -> Policy:
    """The policy of that name, as registered."""
    return _known[name]

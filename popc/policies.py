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
    """

    name = "pop"
    targets: tuple[str, ...] = ("mlp", "experts")

    def counts(self, units: int, sparsity: float, candidate: float) -> Counts:
        """How many of ``units`` are retained, candidates and active: Python numbers, so static.

        ``active = round((1 - r)·U)``; R is the top ``(1 - r - γ/2)·U`` and C the next ``γ·U``,
        both cut so that ``retained <= active <= retained + candidate <= units``.
        """
        active = max(1, round((1 - sparsity) * units))
        retained = min(max(0, round((1 - sparsity - candidate / 2) * units)), active)
        live = min(units, max(active, retained + round(candidate * units)))
        return Counts(retained, live - retained, active)

    def measured(self, emit: Any, h: Any) -> Any:
        """The value whose squares are summed over the prompt's tokens, made of h ``[..., K]``.

        Args:
            emit: a :class:`popc.passes.emit.Emitter`; ``emit.call(op, ...)`` adds a node.
            h: the node of what the consumers read.
        """
        return h

    def importance(self, squares: Tensor, norm: Tensor) -> Tensor:
        """The rank of units, larger first, float64 ``[S, U]``.

        Args:
            squares: the sums over tokens and a unit's columns, float64 ``[S, U]``.
            norm: ``‖W[:, columns]‖`` of what contracts them, float32 ``[U]``, or ``[E, U]``.
        """
        return squares.sqrt() * norm.double()


class Griffin(Policy):
    """GRIFFIN (arXiv 2404.01365): the prompt's mask, by its flocking statistic.

    Each token's activations are scaled to length 1, ``Z̄ = Z / ‖Z‖`` (section 4.1), and a channel's
    statistic is the l2 norm of its column of Z̄; the top ``k`` are kept for the whole generation.
    """

    name = "griffin"

    def counts(self, units: int, sparsity: float, candidate: float) -> Counts:
        active = max(1, round((1 - sparsity) * units))
        return Counts(active, 0, active)

    def measured(self, emit: Any, h: Any) -> Any:
        aten = torch.ops.aten
        wide = emit.call(aten.to.dtype, h, torch.float32)
        norm = emit.call(aten.linalg_vector_norm.default, wide, 2, [-1], True)
        norm = emit.call(aten.clamp_min.default, norm, torch.finfo(torch.float32).tiny)
        return emit.call(aten.div.Tensor, wide, norm)

    def importance(self, squares: Tensor, norm: Tensor) -> Tensor:
        return squares.sqrt()


class Contraction(Policy):
    """Each linear reads the input channels whose score for this very token exceeds a threshold.

    The score ``|x_c| · ‖W[:, c]‖`` is Wanda's (arXiv 2306.11695), on single tokens; thresholds are
    TEAL's idea (arXiv 2408.14690), but taken from the prompt: no calibration. It has no units: see
    ``popc/passes/contract.py`` and, for how a budget becomes thresholds, ``popc/budget.py``.
    Experts, and encoders, whose one pass reads all weights anyway, are pruned by POP under it.
    """

    name = "contraction"
    targets = ("mlp", "attention", "experts", "other")


class Dense(Policy):
    """Nothing is pruned."""

    name = "dense"
    targets = ()


_known: dict[str, Policy] = {p.name: p for p in (Contraction(), Policy(), Griffin(), Dense())}


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

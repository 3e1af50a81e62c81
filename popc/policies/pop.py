"""POP, the paper's policy: ``policy="pop"``."""

from __future__ import annotations

from torch import Tensor

from popc.policies.base import Counts, UnitPolicy, active_units, output_norm


class Pop(UnitPolicy):
    """POP (arXiv 2602.06822): retained, candidate and pruned units by the prompt's importance.

    γ = 0 is its ablation with a mask that the prompt fixes, γ = 1 the one that re-scores every unit
    with each token.
    """

    name = "pop"

    def counts(self, units: int, sparsity: float, candidate: float) -> Counts:
        """``active = round((1 - r)·U)``; R is the top ``(1 - r - γ/2)·U`` and C the next ``γ·U``,
        both cut so that ``retained <= active <= retained + candidate <= units``. With more γ, R
        never grows and R ∪ C never shrinks, so a token never keeps less of its score.
        """
        active = active_units(units, sparsity)
        retained = min(max(0, round((1 - sparsity - candidate / 2) * units)), active)
        # γ·U candidates, where R can't shrink any further, and γ = 1 has all of them.
        live = max(round((1 - sparsity + candidate / 2) * units), round(candidate * units), active)
        live = min(units, live)
        return Counts(retained, live - retained, active)

    def importance(self, squares: Tensor, norm: Tensor, *more: Tensor) -> Tensor:
        """The paper's ``I_c = ‖down[:, c]‖ · ‖h_{·,c}‖₂``."""
        return output_norm(squares, norm)

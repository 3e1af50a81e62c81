"""A gate first, then what it lets through: ``policy="staged"`` and ``"staged_pruned"``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from popc.policies.base import Counts, UnitPolicy, active_units, output_norm

if TYPE_CHECKING:
    from popc.analysis.findings import Region


class Staged(UnitPolicy):
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
        """All but the share ``pruned`` are candidates; each token picks the active ones."""
        active = active_units(units, sparsity)
        return Counts(0, max(active, units - round(self.pruned * units)), active)

    def importance(self, squares: Tensor, norm: Tensor, *more: Tensor) -> Tensor:
        """As POP: the norm of what a unit adds to the output, float64 ``[S, U]``."""
        return output_norm(squares, norm)

    def values(self, emit: Any, h: Any, region: Region) -> tuple[Any, ...]:
        """``h``, and what the gate is multiplied with."""
        # Without a gate it is refused; but in an encoder's one pass h is at hand, and scored.
        return h, h if region.gate is None else region.gate.other

    def scale(self, norm: Tensor, *squares: Tensor) -> Tensor:
        """What a token's gate value is multiplied with to score a unit, float32 ``[S, U]``."""
        return (norm.double() * squares[1].sqrt()).float()

    def refuses(self, region: Region) -> str | None:
        """Regions without a gate have nothing to score candidates by."""
        if region.one_pass or region.gate is not None:
            return None
        return "its channels are no product of a gate's and another linear's"

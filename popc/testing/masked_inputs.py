"""The oracle of policies of inputs: an eager model whose linears see what a decode step reads.

It takes from popc which products these are and the thresholds of a session; scores it computes by
itself, and what a channel is read as.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from popc.analysis.plan import Plan
from popc.config import Config
from popc.testing.dequantized import Readings, squared_errors
from popc.testing.oracle import experts_of, spread
from popc.testing.products import Observer, Watched, linears_of


class MaskedInputs(Watched):
    """Policies of inputs, with known thresholds: in one-token calls each linear's input is masked.

    Args:
        plan, traced: see :class:`popc.testing.oracle.MaskedAnywhere`.
        thresholds: float32 ``[S]`` by the key of the linears' input: what scores
            ``|x_c - center_c| · scale_c`` must exceed for a channel to be read.
        centers: float32 ``[S, K]``, likewise: what others are taken to be.
        config: whose policies say what ``‖W[:, c]‖`` scales scores with.
        readings: of each linear, likewise, where channels are read by grade.

    Attributes:
        masked: how many values were not read in full.
        margin: how near a score was to its threshold, relative to that.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        thresholds: Mapping[Hashable, Tensor],
        centers: Mapping[Hashable, Tensor],
        config: Config,
        observer: Observer | None = None,
        traced: Plan | None = None,
        readings: Mapping[Hashable, Sequence[Readings]] | None = None,
    ) -> None:
        groups = [group for group in plan.inputs if group.key in thresholds]
        super().__init__(model, groups, traced or plan, observer)
        self.thresholds, self.centers, self.readings = thresholds, centers, readings or {}
        self.scales: dict[Hashable, tuple[Tensor, Tensor]] = {}  # of both grades
        for group in groups:
            policy, norm = config.input_policy(group.kind), self.norms[group.key]
            read = self.readings.get(group.key, ())
            if any(one.low_bytes for one in read):
                self.scales[group.key] = policy.scales(norm, *squared_errors(read, norm))
            else:
                self.scales[group.key] = (policy.scale(norm),) * 2
        self._coarse: dict[
            Hashable, Tensor
        ] = {}  # what reading high planes alone adds to a product
        self.margin = float("inf")
        self.masked = 0
        self.decoding = False

    def treat(self, owner: Any, number: int, x: Tensor, selector: Any) -> Tensor:
        """``x`` with the inputs that a decode step leaves out set to their means."""
        if not self.decoding:
            return x
        limits, scales = self.thresholds[owner.key].double(), self.scales[owner.key]
        known = self.centers.get(owner.key, limits.new_zeros(1, x.shape[-1]))  # experts have none
        center, moved = spread(known.to(x.dtype), x), x.detach().double() - spread(known, x)
        limit = limits.repeat_interleave(x.numel() // x.shape[-1] // len(limits))
        limit = limit.view(*x.shape[:-1], 1)
        expert = experts_of(x, selector) if linears_of(owner)[0].experts else None
        if expert is not None:
            high_scale, low_scale = (scale[expert].view(x.shape) for scale in scales)
            scales = high_scale, low_scale
        high, low = (self._exceeds(moved.abs() * scale, limit) for scale in scales)
        self.masked += int((~(high & low)).sum())
        if owner.key in self.readings:
            coarse = self.readings[owner.key][number].coarse.double()
            by_high = torch.where(high & ~low, moved, 0.0)
            self._coarse[owner.key, number] = (
                by_high @ coarse.mT
                if expert is None
                else torch.einsum("sk,snk->sn", by_high.view(len(expert), -1), coarse[expert])
            )
        return torch.where(high, x, center)

    def _exceeds(self, score: Tensor, limit: Tensor) -> Tensor:
        gap = ((score - limit).abs() / limit.clamp(min=1e-30)).min()
        self.margin = min(self.margin, float(gap))
        return (score > limit) | score.isnan()

    def finished(self, keys: Sequence[Hashable], out: Tensor) -> Tensor:
        """``out`` as it is where some channels are read by their high planes alone."""
        for key in keys:
            if key in self._coarse:
                out = out + self._coarse.pop(key).view(out.shape).to(out.dtype)
        return out

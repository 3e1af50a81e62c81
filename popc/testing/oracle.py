"""The oracle: the model as it is, eager, with h of inactive units set to zero.

Written from the papers' text. It intercepts every product that consumes a region, whatever
op the model uses for it, and takes from popc only which products these are, and which columns make
up a unit. Of policies of inputs: :mod:`popc.testing.masked_inputs`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from popc.analysis.plan import Plan, RegionRecord
from popc.config import Config
from popc.policies import Policy, Pop, UnitPolicy
from popc.testing.products import Observer, Watched


def masked_dense(
    model: nn.Module, plan: Plan, partition: Mapping[Hashable, Tensor]
) -> Callable[..., Any]:
    """``model``, called eagerly, with h of the units zero that ``partition`` leaves out.

    Args:
        plan: of :func:`popc.analyze`, for this very model.
        partition: which units are active, bool ``[U]``, or ``[B, U]`` for each sequence, or
            ``[E, U]`` of experts, by :attr:`popc.Region.key`. Other regions stay whole.
    """
    regions = [region for region in plan.regions if region.key in partition]
    watched = _ByPartition(model, regions, plan, partition)

    def call(*args: Any, **kwargs: Any) -> Any:
        watched.begin()
        with watched, torch.no_grad():
            return model(*args, **kwargs)

    return call


class _ByPartition(Watched):
    def __init__(
        self,
        model: nn.Module,
        regions: Sequence[RegionRecord],
        plan: Plan,
        partition: Mapping[Hashable, Tensor],
    ) -> None:
        super().__init__(model, regions, plan)
        self.partition = partition

    def treat(self, owner: Any, number: int, x: Tensor, selector: Any) -> Tensor:
        mask = _by_column(self.partition[owner.key], owner, x)
        if owner.experts:
            return x * mask[experts_of(x, selector)].view(x.shape)
        return x * (mask if mask.dim() == 1 else spread(mask, x))


def _by_column(active: Tensor, region: RegionRecord, x: Tensor) -> Tensor:
    """Ones for active units' columns and for columns of no unit, ``[..., K]``."""
    columns = torch.from_numpy(region.columns)
    mask = torch.ones(*active.shape[:-1], x.shape[-1], dtype=x.dtype)
    flat = active.to(x.dtype).repeat_interleave(columns.shape[1], -1)
    mask[..., columns.flatten()] = flat
    return mask


def spread(mask: Tensor, x: Tensor) -> Tensor:
    """``mask [S, K]`` for each row of x, ``[..., K]``."""
    if len(mask) == 1:
        return mask[0]
    return mask.repeat_interleave(x.numel() // mask.numel(), 0).view(x.shape)


def experts_of(x: Tensor, selector: Any) -> Tensor:
    """The expert of each row: picked, by where each one's rows end, or one after another."""
    if x.dim() == 3:
        return torch.arange(x.shape[0]).repeat_interleave(x.shape[1])
    if selector.dtype == torch.int32:
        return torch.searchsorted(selector, torch.arange(x.shape[0]), right=True)
    return selector


class _Eager:
    """In place of a graph's builder: an op of values, computed at once."""

    def call(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``op(*args, **kwargs)``."""
        return op(*args, **kwargs)


def covers(policy: Policy) -> bool:
    """Whether :class:`MaskedAnywhere` can make the choices of a policy of units.

    It measures one value made of h, of the prompt itself.
    """
    if not isinstance(policy, UnitPolicy):
        return True
    own_values = type(policy).values is not UnitPolicy.values
    return not (own_values or policy.calibrated or policy.staged or policy.compensates)


class MaskedAnywhere(Watched):
    """A policy's choice of units: measured in the first call, masked in later ones.

    Encoders, which run in one pass, are masked at once.

    POP's is computed from the paper's text, another policy's by its methods.

    Args:
        plan: of :func:`popc.analyze`, for this very model.
        traced: likewise, where ``plan`` is of a compiled model, whose graphs were rewritten.

    Attributes:
        active: what the last call chose, bool ``[S, U]`` by region key (not of experts).
        masked: how many columns were zeroed so far.
        margin: how near a choice was: the least relative distance between the scores of the last
            unit taken and the first one left, where they are not equal. Where it is within the
            rounding of float32, popc may have chosen otherwise.
        remembers: whether heads whose keys a decode step left out stay out.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        config: Config,
        observer: Observer | None = None,
        traced: Plan | None = None,
    ) -> None:
        regions = [
            r for r in plan.regions if config.prunes_units(r) and r.kind in config.target_kinds
        ]
        super().__init__(model, regions, traced or plan, observer)
        self.config, self.measuring = config, True
        self.valid: Tensor | None = None
        self.batch = 1
        self.squares: dict[Any, Tensor] = {}
        self.living: dict[Any, Tensor] = {}  # units in the cache
        self.active: dict[Any, Tensor] = {}
        self.masks: dict[Any, Tensor | None] = {}
        self.remembers = True
        self.masked = 0
        self.margin = float("inf")

    def forked(self) -> MaskedAnywhere:
        """A copy with the same statistics."""
        other = copy.copy(self)
        other.squares, other.living = dict(self.squares), dict(self.living)
        return other

    def repeat(self, times: int) -> None:
        """Each sequence is there ``times`` times, as a prefix of several continuations."""
        if self.config.scope == "sequence":
            for statistics in (self.squares, self.living):
                for key, rows in statistics.items():
                    statistics[key] = rows.repeat_interleave(times, 0)

    def begin(self, measuring: bool = True, valid: Tensor | None = None, batch: int = 1) -> None:
        """A new forward call.

        Args:
            measuring: whether it is of a prompt.
            valid: bool ``[B, T]``, False at padding.
            batch: B, where rows of all sequences come as one, and ``scope="sequence"``.
        """
        super().begin()
        self.measuring, self.valid, self.batch = measuring, valid, batch

    def treat(self, owner: Any, number: int, x: Tensor, selector: Any) -> Tensor:
        """``x`` masked; the first of the weights that read h chooses for all."""
        if number == 0:
            norm = self.norms[owner.key]
            columns = torch.from_numpy(owner.columns)
            norm = norm[..., columns].square().sum(-1).sqrt()  # [U], or [E, U]
            if owner.experts:
                self.masks[owner.key] = self._of_experts(owner, x, norm, experts_of(x, selector))
            else:
                self.masks[owner.key] = self._of_units(owner, x, norm)
        mask = self.masks[owner.key]
        if mask is None:
            return x
        self.masked += int((mask == 0).sum()) if number == 0 else 0
        return x * mask

    def _of_units(self, region: RegionRecord, x: Tensor, norm: Tensor) -> Tensor | None:
        """What to multiply x with, ``[..., K]``; None: nothing."""
        key = region.key
        measures = self.measuring and not region.one_pass
        energy = self._energy(region, self._measured(region, x) if measures else x, measures)
        if measures:
            living = self.living.get(key)
            if living is not None:
                energy = energy * living
            self.squares[key] = self.squares.get(key, 0) + energy
            return None if living is None else spread(_by_column(living, region, x), x)
        if key not in self.squares and not region.one_pass:
            return None
        total = energy if region.one_pass else self.squares[key]
        each = [self._choose(region, s, total[s], energy[s], norm) for s in range(len(energy))]
        if region.cached and self.remembers and not region.one_pass:
            lives = [self._live(region, s, total[s], norm) for s in range(len(energy))]
            self.living[key] = torch.stack(lives)
        self.active[key] = torch.stack(each)
        return spread(_by_column(self.active[key], region, x), x)

    def _policy(self, region: RegionRecord) -> UnitPolicy | None:
        """The region's policy; None where it is POP."""
        policy = self.config.unit_policy(region.kind)
        return None if type(policy) is Pop else policy

    def _measured(self, region: RegionRecord, x: Tensor) -> Tensor:
        """What a prompt measures of h."""
        policy = self._policy(region)
        return x if policy is None else policy.measured(_Eager(), x.detach())

    def _energy(self, region: RegionRecord, x: Tensor, measures: bool) -> Tensor:
        """``Σ h²`` over tokens that are no padding, ``[S, U]``."""
        rows = x.detach().double().square()[..., torch.from_numpy(region.columns)].sum(-1)
        of_tokens = self.valid is not None and rows.numel() == self.valid.numel() * region.units
        if self.valid is not None and measures and of_tokens:
            rows = rows.view(*self.valid.shape, region.units).where(self.valid[..., None], 0)
        if self.config.scope == "batch":
            return rows.reshape(1, -1, region.units).sum(1)
        sequences = x.shape[0] if x.dim() == 3 else self.batch
        return rows.reshape(sequences, -1, region.units).sum(1)

    def _of_experts(
        self, region: RegionRecord, x: Tensor, norm: Tensor, expert: Tensor
    ) -> Tensor | None:
        columns = torch.from_numpy(region.columns)
        h = self._measured(region, x) if self.measuring else x
        rows = h.detach().double().reshape(-1, x.shape[-1]).square()[:, columns].sum(-1)
        if self.measuring:
            if self.valid is not None and not len(rows) % self.valid.numel():
                valid = self.valid.flatten()
                # Picked, each token's experts stand side by side; in stacks, all tokens do.
                times = len(rows) // len(valid)
                valid = valid.repeat(times) if x.dim() == 3 else valid.repeat_interleave(times)
                rows = rows.where(valid[:, None], 0)
            zero = torch.zeros(region.experts, rows.shape[1], dtype=rows.dtype)
            old = self.squares.get(region.key, zero)
            self.squares[region.key] = old.index_add(0, expert, rows)
            return None
        masks = []
        for row, e in zip(rows, expert.tolist(), strict=True):
            total = self.squares[region.key][e]
            active = self._choose(region, 0, total, row, norm[e])
            masks.append(active if bool((total > 0).any()) else torch.ones_like(active))
        return _by_column(torch.stack(masks), region, x).view(x.shape)

    def _cuts(self, region: RegionRecord) -> tuple[int, int, int]:
        """|R|, |R| + |C| and k, as the paper has them, within what there is."""
        r, gamma, units = self.config.sparsity, self.config.candidate, region.units
        policy = self._policy(region)
        if policy is not None:
            counts = policy.counts(units, r, gamma)
            return counts.retained, counts.live, counts.active
        active = max(1, round((1 - r) * units))
        retained = min(max(0, round((1 - r - gamma / 2) * units)), active)
        live = max(active, round((1 - r + gamma / 2) * units), round(gamma * units))
        return retained, min(units, live), active

    def _ranked(self, region: RegionRecord, s: int, total: Tensor, norm: Tensor) -> Tensor:
        policy = self._policy(region)
        importance = total.sqrt() * norm if policy is None else policy.importance(total, norm)
        importance = importance.double().nan_to_num(nan=0.0)
        if region.key in self.living:
            importance = importance.masked_fill(~self.living[region.key][s], -1)
        ranked, order = importance.sort(descending=True, stable=True)
        retained, live, _ = self._cuts(region)
        for cut in (retained, live):
            self._note(ranked, cut)
        return order

    def _live(self, region: RegionRecord, s: int, total: Tensor, norm: Tensor) -> Tensor:
        _, live, _ = self._cuts(region)
        order = self._ranked(region, s, total, norm)
        return torch.zeros(region.units, dtype=torch.bool).scatter(0, order[:live], True)

    def _choose(
        self, region: RegionRecord, s: int, total: Tensor, now: Tensor, norm: Tensor
    ) -> Tensor:
        """Bool ``[U]``."""
        retained, live, active = self._cuts(region)
        if region.one_pass:
            retained, live = 0, region.units
            pool = torch.arange(region.units)
            kept = pool[:0]
        else:
            order = self._ranked(region, s, total, norm)
            kept, pool = order[:retained], order[retained:live].sort().values
        policy = self._policy(region)
        if policy is not None and not region.one_pass:
            norm = policy.scale(norm, total)
        score = ((total if region.one_pass else now).sqrt() * norm)[pool]
        ranked, best = score.sort(descending=True, stable=True)
        self._note(ranked, active - retained)
        chosen = torch.zeros(region.units, dtype=torch.bool)
        chosen[torch.cat((kept, pool[best[: active - retained]]))] = True
        return chosen

    def _note(self, ranked: Tensor, cut: int) -> None:
        """How near the last one taken is to the first one left."""
        if 0 < cut < len(ranked) and ranked[cut - 1] > ranked[cut]:
            gap = (ranked[cut - 1] - ranked[cut]) / ranked[cut - 1].abs()
            self.margin = min(self.margin, float(gap))

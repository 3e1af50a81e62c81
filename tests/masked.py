"""The masked-dense oracle for any model: eager, with h of the inactive units set to zero.

It watches every product with a weight that contracts a region, whatever op the model uses for it,
and knows of popc only which columns make up a unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import popc
from popc.analysis.capture import identity

# Each op's operands: x, W, and the dim of W that is contracted (from the right).
PRODUCTS = {
    F.linear: (0, 1, -1),
    torch.addmm: (1, 2, -2),
    torch.mm: (0, 1, -2),
    torch.matmul: (0, 1, -2),
    Tensor.matmul: (0, 1, -2),
    Tensor.__matmul__: (0, 1, -2),
    torch.bmm: (0, 1, -2),
    F.grouped_mm: (0, 1, -2),
    torch._grouped_mm: (0, 1, -2),
}


class MaskedAnywhere(TorchFunctionMode):
    """Measures in the first call, masks in later ones; one-pass regions mask at once."""

    def __init__(
        self, model: nn.Module, regions: Sequence[popc.Region], config: popc.Config
    ) -> None:
        super().__init__()
        self.config, self.measuring = config, True
        owners = {identity(p): p for p in model.parameters()}
        self.regions: dict[int, list[popc.Region]] = {}
        for region in regions:
            if region.kind in config.targets:
                weight = owners[region.key[0][0][0]]
                self.regions.setdefault(weight.untyped_storage().data_ptr(), []).append(region)
        self.squares: dict[Any, Tensor] = {}
        self.calls: dict[Any, int] = {}
        self.remembers = True
        self.living: dict[Any, Tensor] = {}  # units whose keys and values the cache holds
        self.picked: dict[int, tuple[Tensor, Tensor, Any]] = {}
        self.masked = 0

    def begin(self, measuring: bool) -> None:
        """A new forward call."""
        self.measuring, self.calls = measuring, {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is Tensor.__getitem__ and self._watched(args[0]):
            picked = func(*args, **kwargs)
            self.picked[id(picked)] = (picked, args[0], args[1])
            return picked
        if func is torch.bmm and id(args[0]) in self.picked:
            _, weight, ids = self.picked[id(args[0])]  # bmm(W[ids], x[..., None])
            x = self._masked(args[1].squeeze(-1), weight, -1, ids)
            return func(args[0], x[..., None])
        if func in PRODUCTS and len(args) > PRODUCTS[func][1]:
            x_at, w_at, dim = PRODUCTS[func]
            x, weight = args[x_at], args[w_at]
            if weight.data_ptr() == weight.untyped_storage().data_ptr():
                x = self._masked(x, weight, dim, kwargs.get("offs", (*args, None, None)[2]))
                args = (*args[:x_at], x, *args[x_at + 1 :])
            return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _watched(self, weight: Tensor) -> list[popc.Region]:
        return self.regions.get(weight.untyped_storage().data_ptr(), [])

    def _masked(self, x: Tensor, weight: Tensor, dim: int, selector: Any) -> Tensor:
        found = self._watched(weight)
        if found:
            number = self.calls[found[0].key[0]] = self.calls.get(found[0].key[0], -1) + 1
            for region in found:
                if region.key[1] == number:
                    x = self._treat(region, x, weight, dim, selector)
        return x

    def _treat(self, region, x: Tensor, weight: Tensor, dim: int, selector: Any) -> Tensor:
        columns = torch.from_numpy(region.columns)
        wide = weight.detach().double().movedim(dim, -1)
        norm = wide.square().sum(-2)[..., columns].sum(-1).sqrt()  # [U], or [E, U]
        if not region.experts:
            energy = x.detach().double().square()[..., columns].sum(-1).flatten(0, -2)  # [rows, U]
            if self.measuring and region.key in self.living:
                keep = torch.ones(x.shape[-1], dtype=x.dtype)
                keep[columns[~self.living[region.key]].flatten()] = 0
                x, energy = x * keep, energy * self.living[region.key]
            if self.measuring and not region.one_pass:
                self.squares[region.key] = self.squares.get(region.key, 0) + energy.sum(0)
                return x
            if region.key not in self.squares and not region.one_pass:
                return x
            total = energy.sum(0) if region.one_pass else self.squares[region.key]
            return x * self._mask(region, total, energy.sum(0), norm, x)
        expert = self._experts(x, selector)
        rows = x.detach().double().reshape(-1, x.shape[-1]).square()[:, columns].sum(-1)
        if self.measuring:
            zero = torch.zeros(region.experts, rows.shape[1], dtype=rows.dtype)
            old = self.squares.get(region.key, zero)
            self.squares[region.key] = old.index_add(0, expert, rows)
            return x
        masks = []
        for row, e in zip(rows, expert.tolist(), strict=True):
            total = self.squares[region.key][e]
            seen = bool((total > 0).any())
            one = torch.ones(x.shape[-1])
            masks.append(self._mask(region, total, row, norm[e], x) if seen else one)
        return x * torch.stack(masks).view(x.shape).to(x.dtype)

    def _experts(self, x: Tensor, selector: Any) -> Tensor:
        """The expert of each row: picked, by where each one's rows end, or one after another."""
        if x.dim() == 3:
            return torch.arange(x.shape[0]).repeat_interleave(x.shape[1])
        if selector.dtype == torch.int32:
            return torch.searchsorted(selector, torch.arange(x.shape[0]), right=True)
        return selector

    def _mask(self, region, total: Tensor, now: Tensor, norm: Tensor, x: Tensor) -> Tensor:
        """Ones for the active units' columns and for columns of no unit."""
        units, r, gamma = region.units, self.config.sparsity, self.config.candidate
        active = max(1, round((1 - r) * units))
        retained = max(0, round((1 - r - gamma / 2) * units))
        candidates = round(gamma * units)
        retained = min(retained, active)
        live = min(units, max(active, retained + candidates))
        importance = total.sqrt() * norm
        if region.key in self.living:
            importance = importance.masked_fill(~self.living[region.key], -1)
        rank = importance.sort(descending=True, stable=True).indices
        if region.one_pass:
            chosen = rank[:active]
        else:
            if region.cached and self.remembers:
                self.living[region.key] = torch.zeros(units, dtype=torch.bool)
                self.living[region.key][rank[:live]] = True
            pool = rank[retained:live].sort().values
            score = (now.sqrt() * norm)[pool]
            best = pool[score.sort(descending=True, stable=True).indices][: active - retained]
            chosen = torch.cat([rank[:retained], best])
        mask = torch.ones(x.shape[-1], dtype=x.dtype)
        columns = torch.from_numpy(region.columns)
        mask[columns.flatten()] = 0
        mask[columns[chosen].flatten()] = 1
        self.masked += int((mask == 0).sum())
        return mask

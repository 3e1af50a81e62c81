"""The masked-dense oracle: a plain eager model with h of the inactive channels set to zero.

Written from the paper's text, without popc: forward hooks on the ``down`` linears, no graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class MaskedDense:
    """Hooks that measure at prefill and mask at decode.

    ``valid`` ``[B, T]`` bool tells padding apart in the next prefill; None means all are valid.
    """

    def __init__(
        self,
        model: nn.Module,
        downs: Sequence[nn.Linear],
        sparsity: float,
        candidate: float,
        scope: str = "batch",
    ) -> None:
        self.model, self.scope = model, scope
        self.sparsity, self.candidate = sparsity, candidate
        self.squares: dict[nn.Module, Tensor] = {}
        self.active: dict[nn.Module, Tensor] = {}
        self.valid: Tensor | None = None
        self.handles = [down.register_forward_pre_hook(self._hook) for down in downs]

    def __call__(self, ids: Tensor, valid: Tensor | None = None, **kwargs: object):
        self.valid, self.shape = valid, ids.shape
        with torch.no_grad():
            return self.model(ids, **kwargs)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, down: nn.Linear, args: tuple[Tensor]) -> tuple[Tensor]:
        (h,) = args
        by_token = h.view(*self.shape, -1)  # OPT flattens batch and tokens
        if self.shape[1] > 1:
            squares = by_token.double() ** 2
            if self.valid is not None:
                squares = squares * self.valid[..., None]
            total = squares.sum(1)
            if self.scope == "batch":
                total = total.sum(0, keepdim=True)
            self.squares[down] = self.squares.get(down, 0) + total
            return args
        return ((by_token * self._mask(down, by_token[:, 0])[:, None]).view(h.shape),)

    def _mask(self, down: nn.Linear, h: Tensor) -> Tensor:
        size = h.shape[-1]
        active = round((1 - self.sparsity) * size)
        retained = round((1 - self.sparsity - self.candidate / 2) * size)
        live = round((1 - self.sparsity + self.candidate / 2) * size)
        # GPT-2 stores its weights [in, out].
        norm = down.weight.float().norm(dim=0 if down.weight.shape[1] == size else 1)
        score = h.float().norm(dim=0, keepdim=True) if self.scope == "batch" else h.float().abs()
        rows = []
        for squares, now in zip(self.squares[down], score * norm, strict=True):
            rank = (squares.sqrt() * norm.double()).sort(descending=True).indices
            pool = rank[retained:live]
            best = pool[now[pool].sort(descending=True).indices][: active - retained]
            mask = torch.zeros(size, dtype=h.dtype)
            mask[rank[:retained]] = 1
            mask[best] = 1
            rows.append(mask)
        self.active[down] = torch.stack(rows)
        return self.active[down].expand(h.shape)


def llama_downs(model: nn.Module) -> list[nn.Linear]:
    return [layer.mlp.down_proj for layer in model.model.layers]


# Products with planes: kernels take what rows are multiplied with for integers of 15 bits, in units
# of the largest of a group of rows.
PLANES = 1e-3


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value of ``b``."""
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())

"""Candidate selection: which candidates one decoded token keeps (arXiv 2602.06822, decode stage).

``popc::select_candidates(h, norm, index, retained, active) -> (h_active, active_index)``

``h [..., 1, n]`` holds the channels ``index`` (``[n]`` or ``[B, n]``), the first ``retained`` of
them R and the rest C; ``norm`` is the float32 ``‖down[:, c]‖`` of each entry of ``index``. Kept are
R and the ``active - retained`` candidates with the largest ``‖down[:, c]‖ · |h_c|``, in the order
in which ``index`` names them. Of equal scores the first wins, and NaN counts as largest, so that
it shows in the output as it would in the dense model.
"""

from __future__ import annotations

import torch
from torch import Tensor

torch.library.define(
    "popc::select_candidates",
    "(Tensor h, Tensor norm, Tensor index, int retained, int active) -> (Tensor, Tensor)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)

select_candidates = torch.ops.popc.select_candidates.default


@torch.library.impl("popc::select_candidates", "CompositeExplicitAutograd")
def _select_candidates(
    h: Tensor, norm: Tensor, index: Tensor, retained: int, active: int
) -> tuple[Tensor, Tensor]:
    # One list for the batch is scored on the batch's l2 norm, one per sequence on its own token.
    tokens = tuple(range(h.dim() - 1)) if index.dim() == 1 else tuple(range(1, h.dim() - 1))
    wide = torch.promote_types(h.dtype, torch.float32)
    size = torch.linalg.vector_norm(h[..., retained:], dim=tokens, dtype=wide).float()
    order = torch.argsort(size * norm[..., retained:], dim=-1, descending=True, stable=True)
    kept = order[..., : active - retained].sort(dim=-1).values + retained
    always = torch.arange(retained, device=h.device).expand(*kept.shape[:-1], retained)
    position = torch.cat((always, kept), dim=-1)
    if index.dim() == 1:
        return h.index_select(-1, position), index.index_select(0, position)
    spread = position.unflatten(0, (-1, *([1] * (h.dim() - 2)))).expand(*h.shape[:-1], active)
    return h.gather(-1, spread), index.gather(-1, position)


@torch.library.register_fake("popc::select_candidates")
def _select_candidates_fake(
    h: Tensor, norm: Tensor, index: Tensor, retained: int, active: int
) -> tuple[Tensor, Tensor]:
    return h.new_empty((*h.shape[:-1], active)), index.new_empty((*index.shape[:-1], active))

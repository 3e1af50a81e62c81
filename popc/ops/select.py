"""Selection: which candidates one decoded token keeps (arXiv 2602.06822, decode stage).

``popc::select_units(h, norm, columns, retained, active) -> active_columns``

``columns`` int64 ``[n, m]`` lists the channels of h ``[..., K]`` that belong to each of n units,
the first ``retained`` of them R and the rest C; ``norm`` float32 ``[n]`` is ``‖W[:, columns]‖`` of
the weight that contracts them. Kept are R and the ``active - retained`` candidates with the largest
``‖W[:, columns]‖ · ‖h[columns]‖₂``, in the order in which they are listed; returned are their
columns, ``[active · m]``. With ``[B, n, m]`` and ``[B, n]`` each sequence has lists of its own, and
so has the answer. Of equal scores the first wins, and NaN counts as largest, so that it shows in
the output as it would in the dense model.
"""

from __future__ import annotations

import torch
from torch import Tensor

torch.library.define(
    "popc::select_units",
    "(Tensor h, Tensor norm, Tensor columns, int retained, int active) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)

torch.library.define(
    "popc::select_units_reference",
    "(Tensor h, Tensor norm, Tensor columns, int retained, int active) -> Tensor",
)

select_units = torch.ops.popc.select_units.default


def _select_units(h: Tensor, norm: Tensor, columns: Tensor, retained: int, active: int) -> Tensor:
    # One list for the batch is scored on the batch's l2 norm, one per sequence on its own token.
    shared = columns.dim() == 2
    h = h.reshape(1 if shared else h.shape[0], -1, h.shape[-1])
    norm, columns = (norm[None], columns[None]) if shared else (norm, columns)
    candidates = columns[:, retained:]
    wide = torch.promote_types(h.dtype, torch.float32)
    spread = candidates.flatten(1)[:, None].expand(-1, h.shape[1], -1)
    values = h.gather(-1, spread).unflatten(-1, candidates.shape[1:])
    size = torch.linalg.vector_norm(values, dim=(1, 3), dtype=wide).float()
    order = torch.argsort(size * norm[:, retained:], dim=-1, descending=True, stable=True)
    kept = order[:, : active - retained].sort(dim=-1).values
    chosen = candidates.gather(1, kept[..., None].expand(-1, -1, columns.shape[-1]))
    out = torch.cat((columns[:, :retained], chosen), dim=1).flatten(1)
    return out[0] if shared else out


torch.library.impl("popc::select_units_reference", "CompositeExplicitAutograd", _select_units)
torch.library.impl("popc::select_units", "CompositeExplicitAutograd", _select_units)


@torch.library.register_fake("popc::select_units")
def _select_units_fake(
    h: Tensor, norm: Tensor, columns: Tensor, retained: int, active: int
) -> Tensor:
    return columns.new_empty((*columns.shape[:-2], active * columns.shape[-1]))

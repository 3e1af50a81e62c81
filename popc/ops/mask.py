"""What an attention adds to its scores for a mask of bools.

- ``popc::additive_mask(mask, dtype)``: 0 where ``mask`` is true, -inf elsewhere, of the same shape.

It is an op so that Inductor makes the numbers once: a ``where`` it computes anew for each reader.
"""

from __future__ import annotations

import torch
from torch import Tensor

torch.library.define("popc::additive_mask", "(Tensor mask, ScalarType dtype) -> Tensor")

additive_mask = torch.ops.popc.additive_mask.default


def _additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    added = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return added.masked_fill_(mask.logical_not(), -float("inf"))


torch.library.impl("popc::additive_mask", "CompositeExplicitAutograd", _additive_mask)


@torch.library.register_fake("popc::additive_mask")
def _additive_mask_fake(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return mask.new_empty(mask.shape, dtype=dtype)

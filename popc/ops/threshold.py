"""A linear that reads only the input channels that matter to the token at hand.

``popc::threshold_linear(x, weight, bias, norm, threshold, out_dim)``: ``x [..., K] -> [..., N]``.
Channel c of a token counts if ``|x_c| · norm_c > threshold``; a NaN counts, so that it shows in the
output as it would in the dense model. ``norm`` float32 ``[K]`` is ``‖W[:, c]‖`` (any score may
stand there), ``threshold`` float32 ``[1]``, or ``[B]`` with one for each sequence. What is read of
the weight is what at least one token of the batch counts; each token has its own channels, so a
token's result does not depend on the batch that it is in. It is TEAL's magnitude pruning
(arXiv 2408.14690, section 4) with Wanda's score (arXiv 2306.11695, equation 1).

The implementation here is plain ATen and serves every device; it is the reference for kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor norm, Tensor threshold, int out_dim) -> Tensor"
)
torch.library.define("popc::threshold_linear", _SCHEMA, tags=(torch.Tag.needs_fixed_stride_order,))
torch.library.define("popc::threshold_linear_reference", _SCHEMA)

threshold_linear = torch.ops.popc.threshold_linear.default


def counts(x: Tensor, norm: Tensor, threshold: Tensor) -> Tensor:
    """Bool, of the shape of ``x [..., K]``: which channels count for each token."""
    limit = threshold.reshape(-1, *([1] * (x.dim() - 1)))
    return ~(x.abs().float() * norm <= limit)


def _threshold_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor, threshold: Tensor, out_dim: int
) -> Tensor:
    kept = torch.where(counts(x, norm, threshold), x, torch.zeros_like(x))
    return linear(kept, weight if out_dim == 0 else weight.t(), bias)


torch.library.impl("popc::threshold_linear", "CompositeExplicitAutograd", _threshold_linear)
torch.library.impl(
    "popc::threshold_linear_reference", "CompositeExplicitAutograd", _threshold_linear
)


@torch.library.register_fake("popc::threshold_linear")
def _threshold_linear_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor, threshold: Tensor, out_dim: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[out_dim]))

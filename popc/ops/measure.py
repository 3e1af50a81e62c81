"""What a prefill measures: sums that add over chunks and leave padding out.

- ``popc::sum_squares(h, valid) -> float64 [B, K]``: ``Σ_t h²`` of ``h [B, T, K]``.
- ``popc::measure_inputs(x, norm, valid, known)``, of ``x [S, T, K]``, S sequences or all in one:

  - its moments, float64 ``[S, 2K + 1]``: ``Σ_t x``, ``Σ_t x²`` and how many tokens, added to what
    is known, of the same shape;
  - its histogram, float64 ``[S, BINS + 1]``: how many of the scores
    ``((x_c - center_c) · norm_c)²`` fall into each bin, by the centers of these moments, and last
    the sum over tokens of the logarithm of their sum over channels. Of ``n >= 2 · SAMPLE`` tokens
    only each ``n // SAMPLE``-th is counted, so many times: quantiles need no more.

- ``popc::centers(moments) -> float32 [S, K]``: what a channel that is not read is taken to be, its
  mean if it is steady, else 0. It is the mode-centering of SCAP (arXiv 2412.07174), by each
  prompt's own means.

``valid`` bool ``[B, T]`` or None: padding tokens count for nothing, whatever they hold. A bin is a
quarter of an octave: the exponent of a float32 and the first two bits of its fraction.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A channel may stand for its mean where the mean's square exceeds this share of the variance. A few
# outsized tokens lift the mean, but the variance far more.
STEADY = 0.1
_SHIFT = 21
BINS = 1 << 10  # 8 bits of exponent, 2 of fraction; scores have no sign
SAMPLE = 256  # tokens

torch.library.define("popc::sum_squares", "(Tensor h, Tensor? valid) -> Tensor")
torch.library.define("popc::centers", "(Tensor moments) -> Tensor")
torch.library.define(
    "popc::measure_inputs",
    "(Tensor x, Tensor norm, Tensor? valid, Tensor known) -> (Tensor, Tensor)",
)

sum_squares = torch.ops.popc.sum_squares.default
centers = torch.ops.popc.centers.default
measure_inputs = torch.ops.popc.measure_inputs.default


def edges() -> Tensor:
    """Float64 ``[BINS + 1]``: where bins begin; the last ones are infinite or no numbers."""
    bits = torch.arange(BINS, dtype=torch.int32) << _SHIFT
    values = bits.view(torch.float32).double()
    return torch.cat((values, values.new_tensor([float("inf")])))


def _sum_squares(h: Tensor, valid: Tensor | None) -> Tensor:
    squares = h.double().square()
    if valid is not None:
        # where, not a product: a NaN in a padding token must not reach the statistic.
        squares = torch.where(valid[..., None], squares, 0.0)
    return squares.sum(1)


def _centers(moments: Tensor) -> Tensor:
    count = moments[:, -1:]
    sums, squares = moments[:, :-1].chunk(2, -1)
    mean = sums / count
    variance = (squares - sums * mean) / (count - 1)
    steady = (mean.square() > STEADY * variance) & (count > 1)  # NaN is not
    return torch.where(steady, mean, 0.0).float()


def _measure_inputs(
    x: Tensor, norm: Tensor, valid: Tensor | None, known: Tensor
) -> tuple[Tensor, Tensor]:
    if valid is None:
        valid = x.new_ones(x.shape[:2], dtype=torch.bool)
    wide = torch.where(valid[..., None], x.double(), 0.0)
    count = valid.double().sum(1, keepdim=True)
    moments = known + torch.cat((wide.sum(1), wide.square().sum(1), count), 1)
    return moments, _histogram(x, norm, _centers(moments), valid)


def _histogram(x: Tensor, norm: Tensor, center: Tensor, valid: Tensor) -> Tensor:
    rank = valid.cumsum(1)
    every = (valid.sum(1, keepdim=True) // SAMPLE).clamp(min=1)
    times = torch.where(valid & (rank % every == 0), every, 0).double()
    scores = ((x.float() - center[:, None]) * norm).square()
    place = (scores.view(torch.int32) >> _SHIFT) & (BINS - 1)
    out = x.new_zeros((len(x), BINS + 1), dtype=torch.float64)
    out.scatter_add_(1, place.flatten(1).long(), times[..., None].expand(scores.shape).flatten(1))
    totals = scores.sum(-1).double().clamp(min=torch.finfo(torch.float32).tiny).log()
    out[:, -1] = torch.where(totals.isfinite() & (times > 0), totals * times, 0.0).sum(1)
    return out


torch.library.impl("popc::sum_squares", "CompositeExplicitAutograd", _sum_squares)
torch.library.impl("popc::centers", "CompositeExplicitAutograd", _centers)
torch.library.impl("popc::measure_inputs", "CompositeExplicitAutograd", _measure_inputs)


@torch.library.register_fake("popc::sum_squares")
def _sum_squares_fake(h: Tensor, valid: Tensor | None) -> Tensor:
    return h.new_empty((h.shape[0], h.shape[2]), dtype=torch.float64)


@torch.library.register_fake("popc::centers")
def _centers_fake(moments: Tensor) -> Tensor:
    return moments.new_empty((moments.shape[0], moments.shape[1] // 2), dtype=torch.float32)


@torch.library.register_fake("popc::measure_inputs")
def _measure_inputs_fake(
    x: Tensor, norm: Tensor, valid: Tensor | None, known: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(known), known.new_empty((known.shape[0], BINS + 1))

"""What a prefill measures: sums that add over chunks and leave padding out.

- ``popc::sum_squares(h, valid) -> float64 [B, K]``: ``Σ_t h²`` of ``h [B, T, K]``.
- ``popc::moments(x, valid, known) -> float64 [S, 2K + 1]``: ``Σ_t x``, ``Σ_t x²`` and how many
  tokens, of ``x [B, T, K]``, added to what is known, of the same shape; S is B, or 1 where all
  sequences are summed. Without ``known`` each has its own.
- ``popc::centers(moments) -> float32 [S, K]``: what a channel that is not read is taken to be, its
  mean if it is steady, else 0. It is the mode-centering of SCAP (arXiv 2412.07174), by each
  prompt's own means.
- ``popc::score_histogram(x, norm, center, valid) -> float64 [S, BINS + 1]``: how many of the scores
  ``((x_c - center_c) · norm_c)²`` fall into each bin, and last the sum over tokens of the logarithm
  of their sum over channels; ``center`` float32 ``[S, K]``, S being B, or 1 for all sequences.

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

torch.library.define("popc::sum_squares", "(Tensor h, Tensor? valid) -> Tensor")
torch.library.define("popc::moments", "(Tensor x, Tensor? valid, Tensor? known=None) -> Tensor")
torch.library.define("popc::centers", "(Tensor moments) -> Tensor")
torch.library.define(
    "popc::score_histogram", "(Tensor x, Tensor norm, Tensor center, Tensor? valid) -> Tensor"
)

sum_squares = torch.ops.popc.sum_squares.default
moments = torch.ops.popc.moments.default
centers = torch.ops.popc.centers.default
score_histogram = torch.ops.popc.score_histogram.default


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


def _moments(x: Tensor, valid: Tensor | None, known: Tensor | None = None) -> Tensor:
    wide = x.double()
    count = torch.full((x.shape[0], 1), x.shape[1], dtype=torch.float64, device=x.device)
    if valid is not None:
        wide = torch.where(valid[..., None], wide, 0.0)
        count = valid.double().sum(1, keepdim=True)
    found = torch.cat((wide.sum(1), wide.square().sum(1), count), 1)
    return found if known is None else known + found.sum_to_size(known.shape)


def _centers(moments: Tensor) -> Tensor:
    count = moments[:, -1:]
    sums, squares = moments[:, :-1].chunk(2, -1)
    mean = sums / count
    variance = (squares - sums * mean) / (count - 1)
    return torch.where(mean.square() > STEADY * variance, mean, 0.0).float()  # NaN is not steady


def _score_histogram(x: Tensor, norm: Tensor, center: Tensor, valid: Tensor | None) -> Tensor:
    scores = ((x.float() - center[:, None]) * norm).square()
    counted = torch.ones(x.shape[:2], dtype=torch.float64, device=x.device)
    if valid is not None:
        counted = valid.double()
    place = (scores.view(torch.int32) >> _SHIFT) & (BINS - 1)
    out = torch.zeros((x.shape[0], BINS + 1), dtype=torch.float64, device=x.device)
    weight = counted[..., None].expand(scores.shape)
    out.scatter_add_(1, place.flatten(1).long(), weight.flatten(1))
    totals = scores.sum(-1).double().clamp(min=torch.finfo(torch.float32).tiny).log()
    finite = totals.isfinite() & (counted > 0)
    out[:, -1] = torch.where(finite, totals, 0.0).sum(1)
    return out.sum_to_size((center.shape[0], BINS + 1))


torch.library.impl("popc::sum_squares", "CompositeExplicitAutograd", _sum_squares)
torch.library.impl("popc::moments", "CompositeExplicitAutograd", _moments)
torch.library.impl("popc::centers", "CompositeExplicitAutograd", _centers)
torch.library.impl("popc::score_histogram", "CompositeExplicitAutograd", _score_histogram)


@torch.library.register_fake("popc::sum_squares")
def _sum_squares_fake(h: Tensor, valid: Tensor | None) -> Tensor:
    return h.new_empty((h.shape[0], h.shape[2]), dtype=torch.float64)


@torch.library.register_fake("popc::moments")
def _moments_fake(x: Tensor, valid: Tensor | None, known: Tensor | None = None) -> Tensor:
    rows = x if known is None else known
    return x.new_empty((rows.shape[0], 2 * x.shape[2] + 1), dtype=torch.float64)


@torch.library.register_fake("popc::centers")
def _centers_fake(moments: Tensor) -> Tensor:
    return moments.new_empty((moments.shape[0], moments.shape[1] // 2), dtype=torch.float32)


@torch.library.register_fake("popc::score_histogram")
def _score_histogram_fake(x: Tensor, norm: Tensor, center: Tensor, valid: Tensor | None) -> Tensor:
    return x.new_empty((center.shape[0], BINS + 1), dtype=torch.float64)

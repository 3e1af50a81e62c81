"""What a prefill measures: sums that add over chunks and leave padding out.

- ``popc::sum_squares(h, valid) -> float64 [B, K]``: ``Σ_t h²`` of ``h [B, T, K]``.
- ``popc::measure_inputs(x, norm, valid, known)``, of ``x [B, T, K]`` and ``norm`` float32 ``[K]``.
  ``known`` is float64 ``[S, 2K + 1]``: S is B, or 1 where all sequences are measured as one.

  - Moments, float64 ``[S, 2K + 1]``: ``Σ_t x``, ``Σ_t x²`` and the number of tokens, those of
    ``known`` included.
  - A histogram, float64 ``[S, BINS + 1]``: how many of the scores ``((x_c - center_c) · norm_c)²``
    fall into each bin, and last the sum over tokens of the logarithm of their sum over channels.

- ``popc::centers(moments) -> float32 [S, K]``: what a channel that is not read is taken to be, its
  mean if it is steady, else 0. It is the mode-centering of SCAP (arXiv 2412.07174), by each
  prompt's own means.

``valid`` bool ``[B, T]`` or None: padding tokens count for nothing, whatever they hold. A bin is a
quarter of an octave: the exponent of a float32 and the first two bits of its fraction.

A token is scored as a decode step in its place would score it: by the centers of the tokens at
earlier positions, in this call and in those before. Of a long prompt only a sample of the tokens
is scored, each counted as many times as it stands for, and which ones depends on a token's number
alone. So the statistics of a prompt are the same, up to rounding, however it is cut into chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A channel may stand for its mean where the mean's square exceeds STEADY + DOUBT / count of the
# variance. A few outsized tokens lift the mean, but the variance far more; and where few tokens
# were seen, the mean must be twice its standard error, or the first token would be a center.
STEADY = 0.1
DOUBT = 4.0
SHIFT = 21
BINS = 1 << 10  # 8 bits of exponent, 2 of fraction; scores have no sign
# Of the first SAMPLE tokens each is scored, then half as many each time their number doubles.
SAMPLE = 128
# The golden ratio as a fraction of 2^32: its multiples are spread evenly, whatever the batch size.
SPREAD = 2654435769
_BLOCK = 1024  # positions that the reference measures at once, as it holds float64 sums for each

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
    bits = torch.arange(BINS, dtype=torch.int32) << SHIFT
    values = bits.view(torch.float32).double()
    return torch.cat((values, values.new_tensor([float("inf")])))


def _sum_squares(h: Tensor, valid: Tensor | None) -> Tensor:
    squares = h.double().square()
    if valid is not None:
        # where, not a product: a NaN in a padding token must not reach the statistic.
        squares = torch.where(valid[..., None], squares, 0.0)
    return squares.sum(1)


def _centers(moments: Tensor) -> Tensor:
    sums, squares = moments[:, :-1].chunk(2, -1)
    return _steady_means(sums, squares, moments[:, -1:])


def _steady_means(sums: Tensor, squares: Tensor, count: Tensor) -> Tensor:
    """Float32 means where they are steady, else 0."""
    mean = sums / count
    variance = (squares - sums * mean) / (count - 1)
    steady = (mean.square() > (STEADY + DOUBT / count) * variance) & (count > 1)  # NaN is not
    return torch.where(steady, mean, 0.0).float()


def _measure_inputs(
    x: Tensor, norm: Tensor, valid: Tensor | None, known: Tensor
) -> tuple[Tensor, Tensor]:
    if valid is None:
        valid = x.new_ones(x.shape[:2], dtype=torch.bool)
    moments = known.clone()
    histogram = known.new_zeros((len(known), BINS + 1))
    for part, marks in zip(x.split(_BLOCK, 1), valid.split(_BLOCK, 1), strict=True):
        moments, counted = _measure_block(part, norm, marks, moments)
        histogram += counted
    return moments, histogram


def _measure_block(x: Tensor, norm: Tensor, valid: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.where(valid[..., None], x.double(), 0.0)
    values = torch.cat((wide, wide.square(), valid[..., None].double()), -1)
    if len(known) == 1:
        values = values.sum(0, keepdim=True)
    seen = torch.cat((known[:, None], known[:, None] + values.cumsum(1)), 1)  # [S, T + 1, 2K + 1]
    before = seen[:, :-1]
    sums, squares = before[..., :-1].chunk(2, -1)
    center = _steady_means(sums, squares, before[..., -1:])
    times = _times(_numbers(valid, before[..., -1].long())) * valid
    return seen[:, -1], _histogram(x, norm, center, times)


def _numbers(valid: Tensor, before: Tensor) -> Tensor:
    """Int64 ``[B, T]``: how many valid tokens come before each, position by position.

    Args:
        before: int64 ``[S, T]``, the number of those at earlier positions.
    """
    if len(before) != 1:
        return before
    return before + valid.cumsum(0) - valid.long()


def _times(number: Tensor) -> Tensor:
    """For how many tokens each counts, int64: 0 for those that are not scored."""
    _, exponent = torch.frexp(number.double())
    every = 1 << (exponent.long() - (SAMPLE.bit_length() - 1)).clamp(min=0)
    turn = number // every
    chosen = ((turn * SPREAD & 0xFFFFFFFF) * every) >> 32
    return torch.where(number % every == chosen, every, 0)


def _histogram(x: Tensor, norm: Tensor, center: Tensor, times: Tensor) -> Tensor:
    """Float64 ``[S, BINS + 1]`` by centers ``[S, T, K]``, of tokens that count ``times [B, T]``."""
    scores = ((x.float() - center) * norm).square()
    place = (scores.view(torch.int32) >> SHIFT) & (BINS - 1)
    by_sequence = (len(center), scores.numel() // max(1, len(center)))
    weights = times.double()[..., None].expand(scores.shape).reshape(by_sequence)
    out = center.new_zeros((len(center), BINS + 1), dtype=torch.float64)
    out.scatter_add_(1, place.long().reshape(by_sequence), weights)
    totals = scores.sum(-1).double().clamp(min=torch.finfo(torch.float32).tiny).log()
    logs = torch.where(totals.isfinite() & (times > 0), totals * times, 0.0).sum(1)
    out[:, -1] = logs.sum() if len(center) == 1 else logs
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

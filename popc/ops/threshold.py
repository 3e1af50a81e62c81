"""A linear that reads only the input channels that matter to the token at hand.

``popc::threshold_linear(x, weight, bias, norm, threshold, out_dim, center, base)``: ``x [..., K] ->
[..., N]``, ``y = keep(x - center) Wᵀ + bias + base``. Channel c of a token counts, and is kept, if
``|x_c - center_c| · norm_c > threshold``; a NaN counts, so that it shows in the output as it would
in the dense model. ``norm`` float32 ``[K]`` is ``‖W[:, c]‖`` (any score may stand there),
``threshold`` float32 ``[1]``, or ``[B]`` with one for each sequence; ``center`` float32 ``[S, K]``
and ``base`` float32 ``[S, N]``, S being 1 or B, are what a channel is taken to be that does not
count, and what the weight makes of that. What is read of the weight is what at least one token of
the batch counts; each token has its own channels, so its result does not depend on the batch that
it is in. It is TEAL's magnitude pruning (arXiv 2408.14690, section 4) with Wanda's score (arXiv
2306.11695, equation 1).

A graph holds the norms, thresholds, centers and bases of all its linears in four tensors, and
slices them for each op. So ops take no offsets, which would differ by layer: layers that are alike
share their code. Rows of ``center`` and ``base`` may lie apart, as parts of longer ones do.

``popc::threshold_linears(x, weights, biases, norm, threshold, out_dims, center, base) ->
[T · ΣN]``: the same for linears that share x ``[..., K]``, of T tokens, and what counts of it. The
outputs of one linear, ``[..., N]`` and contiguous, follow those of the other; so do the parts of
``base [S, ΣN]``. They are one tensor because Inductor's C++ wrapper calls an op that returns a list
through Python. A kernel chooses the channels once, and reads them in all the weights together.

``popc::count_active_channels(x, norm, threshold, center) -> int64 []``: how many channels count for
at least one token.

The implementations here are plain ATen and serve every device; they are the reference for kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor norm, Tensor threshold, int out_dim, "
    "Tensor? center=None, Tensor? base=None) -> Tensor"
)
torch.library.define("popc::threshold_linear", _SCHEMA, tags=(torch.Tag.needs_fixed_stride_order,))
torch.library.define("popc::threshold_linear_reference", _SCHEMA)
torch.library.define(
    "popc::threshold_linears",
    "(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor norm, Tensor threshold, int[] out_dims, "
    "Tensor? center=None, Tensor? base=None) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
torch.library.define(
    "popc::count_active_channels",
    "(Tensor x, Tensor norm, Tensor threshold, Tensor? center=None) -> Tensor",
)

threshold_linear = torch.ops.popc.threshold_linear.default
threshold_linears = torch.ops.popc.threshold_linears.default
count_active_channels = torch.ops.popc.count_active_channels.default


def centered_by(x: Tensor, center: Tensor | None) -> Tensor:
    """x less its center."""
    return x if center is None else x - to_rows(center, x)


def is_counted(centered: Tensor, norm: Tensor, threshold: Tensor) -> Tensor:
    """Bool, of the shape of ``centered [..., K]``: which channels count for each token."""
    limit = threshold.reshape(-1, *([1] * (centered.dim() - 1)))
    return ~(centered.abs().float() * norm <= limit)


def to_rows(values: Tensor, like: Tensor) -> Tensor:
    """``values [S, K]`` as they go with ``like``, which is ``[..., K]`` or ``[B, ..., K]``."""
    return values.reshape(*([-1] * (like.dim() > 1)), *([1] * (like.dim() - 2)), values.shape[-1])


def check_parts(
    x: Tensor,
    norms: Sequence[Tensor],
    threshold: Tensor,
    center: Tensor | None,
    outputs: int = 0,
    base: Tensor | None = None,
) -> None:
    """That norms, thresholds, centers and bases fit x and so many outputs.

    Raises:
        ValueError: they are not.
    """
    inputs = x.shape[-1]
    for norm in norms:
        if tuple(norm.shape) != (inputs,):
            raise ValueError(f"x has {tuple(x.shape)} channels, norm {tuple(norm.shape)}")
    if threshold.dim() > 1:
        raise ValueError(f"thresholds {tuple(threshold.shape)} do not fit x {tuple(x.shape)}")
    for name, values, size in (("center", center, inputs), ("base", base, outputs)):
        if values is not None and (values.dim() != 2 or values.shape[1] != size):
            raise ValueError(f"{name} must be [1 or B, {size}], not {tuple(values.shape)}")


def join_outputs(outputs: Sequence[Tensor]) -> Tensor:
    """What linears give, ``[..., N]`` each, in one dim."""
    return torch.cat([y.flatten() for y in outputs])


def _threshold_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor,
    threshold: Tensor,
    out_dim: int,
    center: Tensor | None = None,
    base: Tensor | None = None,
) -> Tensor:
    check_parts(x, [norm], threshold, center, weight.shape[out_dim], base)
    centered = centered_by(x, center)
    kept = torch.where(is_counted(centered, norm, threshold), centered, 0.0).to(x.dtype)
    y = linear(kept, weight if out_dim == 0 else weight.t(), bias)
    return y if base is None else (y + to_rows(base, y)).to(y.dtype)


def _threshold_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm: Tensor,
    threshold: Tensor,
    out_dims: Sequence[int],
    center: Tensor | None = None,
    base: Tensor | None = None,
) -> Tensor:
    lengths = len(weights), len(biases), len(out_dims)
    if not all(lengths) or len(set(lengths)) > 1:
        counts = "{} weights, {} biases and {} out_dims".format(*lengths)
        raise ValueError(f"popc::threshold_linears: {counts} do not go together")
    outputs = [weight.shape[dim] for weight, dim in zip(weights, out_dims, strict=True)]
    check_parts(x, [norm], threshold, center, sum(outputs), base)
    bases = [None] * len(outputs) if base is None else base.split(outputs, 1)
    linears = zip(weights, biases, out_dims, bases, strict=True)
    return join_outputs(
        [
            _threshold_linear(x, weight, bias, norm, threshold, out_dim, center, part)
            for weight, bias, out_dim, part in linears
        ]
    )


def _count_active_channels(
    x: Tensor, norm: Tensor, threshold: Tensor, center: Tensor | None = None
) -> Tensor:
    check_parts(x, [norm], threshold, center)
    counted = is_counted(centered_by(x, center), norm, threshold)
    return counted.flatten(0, -2).any(0).sum()


for _name in ("popc::threshold_linear", "popc::threshold_linear_reference"):
    torch.library.impl(_name, "CompositeExplicitAutograd", _threshold_linear)
torch.library.impl("popc::threshold_linears", "CompositeExplicitAutograd", _threshold_linears)
torch.library.impl(
    "popc::count_active_channels", "CompositeExplicitAutograd", _count_active_channels
)


@torch.library.register_fake("popc::threshold_linear")
def _threshold_linear_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor,
    threshold: Tensor,
    out_dim: int,
    *others: Any,
    **named: Any,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[out_dim]))


@torch.library.register_fake("popc::threshold_linears")
def _threshold_linears_fake(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm: Tensor,
    threshold: Tensor,
    out_dims: Sequence[int],
    *others: Any,
    **named: Any,
) -> Tensor:
    outputs = [weight.shape[dim] for weight, dim in zip(weights, out_dims, strict=True)]
    return x.new_empty(prod(x.shape[:-1]) * sum(outputs))


@torch.library.register_fake("popc::count_active_channels")
def _count_active_channels_fake(x: Tensor, *others: Any, **named: Any) -> Tensor:
    return x.new_empty((), dtype=torch.int64)

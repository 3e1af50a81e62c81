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
2306.11695, equation 1). Center and base are arguments, not ops around it, as they are parts of long
tensors: Inductor would make a kernel for each offset, layer by layer.

A graph holds the norms, thresholds, centers and bases of all its linears in four tensors. Ops are
given these whole, and where their own part begins: ``norm [ΣK]`` and ``center [S, ΣK]`` from
``channel`` on, ``base [S, ΣN]`` from ``output`` on, ``threshold [G, S]`` at ``group``. Parts made
in the graph would take Inductor's wrapper 0.7 to 1.6 us each, at each token.

``popc::threshold_linears(x, weights, biases, norm, threshold, out_dims, center, base)``: the same
for linears that share x and what counts of it; in ``base`` one linear's part follows the other's. A
kernel chooses the channels once, and reads them in all the weights together.

``popc::count_active_channels(x, norm, threshold, center) -> int64 []``, parts of these likewise:
how many channels count for at least one token.

The implementations here are plain ATen and serve every device; they are the reference for kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

_OFFSETS = "int group=0, int channel=0, int output=0"
_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor norm, Tensor threshold, int out_dim, "
    f"Tensor? center=None, Tensor? base=None, {_OFFSETS}) -> Tensor"
)
torch.library.define("popc::threshold_linear", _SCHEMA, tags=(torch.Tag.needs_fixed_stride_order,))
torch.library.define("popc::threshold_linear_reference", _SCHEMA)
torch.library.define(
    "popc::threshold_linears",
    "(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor norm, Tensor threshold, int[] out_dims, "
    f"Tensor? center=None, Tensor? base=None, {_OFFSETS}) -> Tensor[]",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
torch.library.define(
    "popc::count_active_channels",
    "(Tensor x, Tensor norm, Tensor threshold, Tensor? center=None, int group=0, int channel=0) "
    "-> Tensor",
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


def group_parts(
    x: Tensor,
    outputs: int,
    norm: Tensor,
    threshold: Tensor,
    center: Tensor | None,
    base: Tensor | None,
    group: int,
    channel: int,
    output: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The parts of norms, thresholds, centers and bases that one linear of ``outputs`` reads."""
    width = x.shape[-1]
    norm = norm.narrow(0, channel, width)
    center = None if center is None else center.narrow(1, channel, width)
    base = None if base is None else base.narrow(1, output, outputs)
    return norm, threshold[group] if threshold.dim() > 1 else threshold, center, base


def _threshold_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor,
    threshold: Tensor,
    out_dim: int,
    center: Tensor | None = None,
    base: Tensor | None = None,
    group: int = 0,
    channel: int = 0,
    output: int = 0,
) -> Tensor:
    norm, threshold, center, base = group_parts(
        x, weight.shape[out_dim], norm, threshold, center, base, group, channel, output
    )
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
    group: int = 0,
    channel: int = 0,
    output: int = 0,
) -> list[Tensor]:
    lengths = len(weights), len(biases), len(out_dims)
    if not all(lengths) or len(set(lengths)) > 1:
        counts = "{} weights, {} biases and {} out_dims".format(*lengths)
        raise ValueError(f"popc::threshold_linears: {counts} do not go together")
    results = []
    for weight, bias, out_dim in zip(weights, biases, out_dims, strict=True):
        parts = center, base, group, channel, output
        results.append(_threshold_linear(x, weight, bias, norm, threshold, out_dim, *parts))
        output += weight.shape[out_dim]
    return results


def _count_active_channels(
    x: Tensor,
    norm: Tensor,
    threshold: Tensor,
    center: Tensor | None = None,
    group: int = 0,
    channel: int = 0,
) -> Tensor:
    norm, threshold, center, _ = group_parts(x, 0, norm, threshold, center, None, group, channel, 0)
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
) -> list[Tensor]:
    pairs = zip(weights, out_dims, strict=True)
    return [x.new_empty((*x.shape[:-1], weight.shape[dim])) for weight, dim in pairs]


@torch.library.register_fake("popc::count_active_channels")
def _count_active_channels_fake(x: Tensor, *others: Any, **named: Any) -> Tensor:
    return x.new_empty((), dtype=torch.int64)

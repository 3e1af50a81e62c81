"""Quantised weights that are read by grade, for the tensors that a call of a compiled graph brings.

They are those of :mod:`popc.ops.planes` that are stored channel-major.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakTensorKeyDictionary

from popc import compat, ops
from popc.analysis.linears import Linear
from popc.ops.planes import row_bytes
from popc.policies.allocation import HighPlane

Held = tuple[Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class StoredWeight:
    """A weight ``[N, K]`` in planes, a row for each input channel; or a stack ``[E, N, K]``.

    Attributes:
        positions: which inputs of the graph its planes, scales and zeros are; None for scales and
            zeros where rows hold the scales.
        planes: 2 of 8 bits, 1 of 4.
        experts: E, 0 where weights are not stacked.
    """

    positions: tuple[int, int | None, int | None]
    outputs: int
    inputs: int
    planes: int
    experts: int = 0

    @classmethod
    def of(cls, linear: Linear, position: Mapping[fx.Node, int]) -> StoredWeight:
        """The weight of ``linear``; ``position`` is of each placeholder of the graph."""
        packed, scale, zero, _, _, planes = linear.weight.node.args[:6]
        at = [None if node is None else position[node] for node in (packed, scale, zero)]  # type: ignore[index]
        experts = 0 if linear.experts is None else linear.experts.count
        return cls(tuple(at), linear.outputs, linear.inputs, planes, experts)  # type: ignore[arg-type]

    def held(self, args: Sequence[Any]) -> Held:
        """Its planes, scales and zeros among the graph's inputs."""
        packed, *apart = self.positions
        scale, zero = (None if i is None else args[i] for i in apart)
        return args[packed], scale, zero

    def bytes(self, args: Sequence[Any], planes: int) -> int:
        """What reading so many of its planes takes, scales included."""
        _, *apart = self.held(args)
        rows = row_bytes(self.outputs, planes, scales=apart[0] is None)
        return max(1, self.experts) * self.inputs * rows + sum(
            value.nbytes for value in apart if value is not None
        )


def squared_norms(weights: Sequence[StoredWeight], args: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """``‖W[:, c]‖²`` and ``‖W4[:, c] - W[:, c]‖²`` over all ``weights``, float32 ``[K]`` each.

    W4 is what their high planes alone are read as. Of experts they are ``[E · K]``.
    """
    squares = [_squares(weight, weight.held(args)) for weight in weights]
    norm, error = (torch.stack(parts).sum(0) for parts in zip(*squares, strict=True))
    return norm, error


def high_plane(
    weights: Sequence[StoredWeight], args: Sequence[Any], norm: Tensor, error: Tensor
) -> HighPlane | None:
    """What reading the high planes of ``weights`` is; None if none has a low plane.

    Args:
        norm, error: of :func:`squared_norms`.
    """
    if all(weight.planes == 1 for weight in weights):
        return None
    both = sum(weight.bytes(args, weight.planes) for weight in weights)
    high = sum(weight.bytes(args, 1) for weight in weights)
    total = float(norm.sum())
    return HighPlane(high / both, float(error.sum()) / total if total else 0.0)


# Graphs of many lengths ask for the same ones. With the number of writes to the planes.
_known = WeakTensorKeyDictionary()


def _squares(weight: StoredWeight, held: Held) -> tuple[Tensor, Tensor]:
    packed = held[0]
    writes = compat.writes_to(packed)
    known = _known.get(packed)
    if known is None or known[0] != writes:
        known = _known[packed] = (writes, _of_experts(weight, held))
    squares: tuple[Tensor, Tensor] = known[1]
    return squares


def _of_expert(held: Held, e: int) -> Held:
    packed, scale, zero = held
    return packed[e], None if scale is None else scale[e], None if zero is None else zero[e]


def _of_experts(weight: StoredWeight, held: Held) -> tuple[Tensor, Tensor]:
    """One after the other: what is dequantised at once is no more than one weight."""
    if not weight.experts:
        return _computed(weight, held)
    squares = [_computed(weight, _of_expert(held, e)) for e in range(weight.experts)]
    norm, error = (torch.cat(part) for part in zip(*squares, strict=True))
    return norm, error


def _computed(weight: StoredWeight, held: Held) -> tuple[Tensor, Tensor]:
    stored = [weight.outputs, weight.inputs], 1, weight.planes, torch.float32
    both = ops.dequantize(*held, *stored)
    norm = both.square().sum(0)
    if weight.planes == 1:
        return norm, torch.zeros_like(norm)
    return norm, (ops.dequantize(*held, *stored, 4) - both).square().sum(0)

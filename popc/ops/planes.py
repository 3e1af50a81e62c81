"""The format of quantised weights: rows of 8-bit integers, stored as two planes of nibbles.

A weight ``[..., N, K]`` (outputs, inputs; experts lead) is a stack of rows: one for each input
channel where ``row_dim`` is 1 (channel-major), one for each output channel where it is 0. The
values of a row stand in blocks of 32, the last one filled up with zeros. A value is ``(u - 128) ·
s``: u an integer of 8 bits, s its block's scale, bfloat16. u's high nibbles are one plane, its low
nibbles another, and the high plane alone can be read, as the middle of what it leaves open:
``(16·high + MIDPOINT - 128) · s``. With ``planes=1`` there is no low plane: ``(u - 7.5) · s``, u of
4 bits.

Packed, a row is uint8: the scales of its B blocks, ``2B`` bytes, the high plane, ``16B``, and the
low one, so that what a reading needs is contiguous: 8.5 or 4.5 bits for each weight. In the 16
bytes of a block, nibble j of the little-endian dword i is value ``4j + i``: one shift and mask
gives 4 neighbours, in each lane of a vector register.

Where scales don't follow this, as in weights that torchao has quantised, rows hold the planes alone
and ``w = (u - zero) · scale``, with ``scale`` and ``zero`` float32 ``[..., G, N]`` for G groups of
neighbouring inputs. ``zero`` may be None: 128, or 8 for one plane.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 32
MIDPOINT = 7.5  # what a low nibble is taken to be that is not read
PLANE_BYTES = BLOCK // 2  # of a block
SCALE_BYTES = 2  # of a block
ZERO = {1: 7.5, 2: 128.0}  # by the number of planes, where scales stand in rows
GROUP_ZERO = {1: 8.0, 2: 128.0}  # where they don't and no zero is given
# Of a single plane the scale with the least error is sought: parts of that which fits all values.
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8)


def blocks_of(length: int) -> int:
    """How many blocks a row of ``length`` values has."""
    return (length + BLOCK - 1) // BLOCK


def row_bytes(length: int, planes: int, scales: bool = True) -> int:
    """The bytes of a row of ``length`` values; ``scales``: whether it holds its scales."""
    return blocks_of(length) * (planes * PLANE_BYTES + SCALE_BYTES * scales)


def pack(w: Tensor, row_dim: int, planes: int) -> Tensor:
    """``w [..., N, K]`` quantised: uint8 ``[..., rows, row_bytes]``. The op ``popc::quantize``.

    With two planes the integers are those of torchao's ``quantize_affine``, symmetric, from -127 to
    127, in blocks of 32, given the same scales. The scales differ from those of its
    ``choose_qparams_affine``: they are rounded up to bfloat16, by less than 1/128.
    """
    rows = (w.mT if row_dim == 1 else w).float()
    length = rows.shape[-1]
    padded = torch.nn.functional.pad(rows, (0, blocks_of(length) * BLOCK - length))
    blocks = padded.unflatten(-1, (-1, BLOCK))
    scale, u = _quantize_two_planes(blocks) if planes == 2 else _quantize_one_plane(blocks)
    stored = scale[..., 0].to(torch.bfloat16).contiguous().view(torch.uint8)
    return torch.cat((stored, *(_pack_nibbles(plane) for plane in _planes_of(u, planes))), -1)


def pack_integers(u: Tensor, row_dim: int, planes: int) -> Tensor:
    """Integers ``u [..., N, K]`` as they are, below 256 or, of one plane, below 16, without scales.

    uint8 ``[..., rows, row_bytes]``.
    """
    rows = (u.mT if row_dim == 1 else u).to(torch.uint8)
    length = rows.shape[-1]
    padded = torch.nn.functional.pad(rows, (0, blocks_of(length) * BLOCK - length))
    blocks = padded.unflatten(-1, (-1, BLOCK))
    return torch.cat([_pack_nibbles(plane) for plane in _planes_of(blocks, planes)], -1)


def unpack(
    packed: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    sizes: Sequence[int],
    row_dim: int,
    planes: int,
    dtype: torch.dtype,
    bits: int = 8,
) -> Tensor:
    """The weight of these ``sizes``, ``[..., N, K]``. The op ``popc::dequantize``.

    Args:
        bits: 8 reads all planes, 4 the high one alone.
    """
    length = sizes[-2] if row_dim == 1 else sizes[-1]
    u = _integers(packed, scale is None, length, planes, bits)
    if scale is None:
        head = packed[..., : SCALE_BYTES * blocks_of(length)].contiguous()
        steps = head.view(torch.bfloat16).float().repeat_interleave(BLOCK, -1)[..., :length]
        rows = ((u - ZERO[planes]) * steps).to(dtype)
    else:
        inputs = sizes[-1]
        by_input = [for_inputs(value, inputs) for value in (scale, zero) if value is not None]
        if row_dim == 0:
            by_input = [value.mT for value in by_input]
        offset = by_input[1] if zero is not None else GROUP_ZERO[planes]
        rows = ((u - offset) * by_input[0]).to(dtype)
    return rows.mT if row_dim == 1 else rows


def for_inputs(value: Tensor, inputs: int) -> Tensor:
    """``[..., G, N]`` as ``[..., K, N]``."""
    return value.repeat_interleave(-(-inputs // value.shape[-2]), -2)[..., :inputs, :]


def _integers(packed: Tensor, scales: bool, length: int, planes: int, bits: int) -> Tensor:
    blocks = blocks_of(length)
    start = SCALE_BYTES * blocks * scales
    size = PLANE_BYTES * blocks
    u = _unpack_nibbles(packed[..., start : start + size]).float()
    if planes == 2:
        read = _unpack_nibbles(packed[..., start + size : start + 2 * size]) if bits == 8 else None
        u = 16 * u + (MIDPOINT if read is None else read)
    return u[..., :length]


def _quantize_two_planes(blocks: Tensor) -> tuple[Tensor, Tensor]:
    scale = _round_up(blocks.abs().amax(-1, keepdim=True) / 127)
    u = torch.where(scale > 0, blocks / scale, 0.0).round().clamp(-127, 127) + 128
    return scale, u.to(torch.uint8)


def _quantize_one_plane(blocks: Tensor) -> tuple[Tensor, Tensor]:
    whole = blocks.abs().amax(-1, keepdim=True) / ZERO[1]
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for clip in CLIPS:
        scale = (whole * clip).to(torch.bfloat16).float()
        u = (torch.where(scale > 0, blocks / scale, 0.0) + ZERO[1]).round().clamp(0, 15)
        error = ((u - ZERO[1]) * scale - blocks).square().sum(-1, keepdim=True)
        if best is None:
            best = error, scale, u
        else:
            less = error < best[0]
            new = zip((error, scale, u), best, strict=True)
            error, scale, u = (torch.where(less, one, other) for one, other in new)
            best = error, scale, u
    assert best is not None
    return best[1], best[2].to(torch.uint8)


def _round_up(values: Tensor) -> Tensor:
    """Positive values rounded up to bfloat16."""
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0xFFFF) & -0x10000).view(torch.float32)


def _planes_of(u: Tensor, planes: int) -> tuple[Tensor, ...]:
    return (u >> 4, u & 15) if planes == 2 else (u,)


def _pack_nibbles(values: Tensor) -> Tensor:
    """``[..., B, 32]`` nibbles as ``[..., 16·B]`` bytes."""
    nibbles = values.unflatten(-1, (8, 4))
    pairs = nibbles[..., 0::2, :] | (nibbles[..., 1::2, :] << 4)  # [..., B, byte, dword]
    return pairs.mT.flatten(-3)


def _unpack_nibbles(plane: Tensor) -> Tensor:
    """``[..., 16·B]`` bytes as ``[..., 32·B]`` nibbles, in the order of the values."""
    pairs = plane.unflatten(-1, (-1, 4, 4)).mT  # [..., B, byte, dword]
    return torch.stack((pairs & 15, pairs >> 4), -2).flatten(-4)

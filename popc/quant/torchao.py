"""Weights that torchao has quantised, stored in planes of nibbles: the same values, bit for bit.

What torchao holds of such a weight is ``w = (q - zero_point) · scale``, q integers of 1 to 8 bits,
with a scale and a zero point for each block of ``block_size`` weights. In planes that is ``(u -
zero) · scale``, with u = q shifted to be positive, and scales in float32, which holds those of any
dtype. The product is rounded once in either, so the values are the same; :func:`convert` compares
them all, and refuses a weight of which one differs.

Where u has 5 to 7 bits they are the upper ones of the 8 in the two planes, so that the high plane
alone is the best that 4 bits can say.

Formats that add their zero points after scaling, as ``(q - 8) · scale + zero_point``, are refused:
every int4 format of torchao's own kernels. As differences of integers their values would be rounded
to others, an ulp away.

torchao is not imported: a model that has such weights has done so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from popc.ops import planes as fmt
from popc.quant.tensor import QuantizedTensor, Stored


class _Affine(NamedTuple):
    """``(q - zero_point) · scale``.

    Attributes:
        q: ``[..., N, K]``, integers of ``bits`` bits: ``-2 ** (bits - 1)`` is the least.
        scale, zero_point: a value for each block, in order; no zero point means 0.
        block_size: of each dim of q.
    """

    q: Tensor
    bits: int
    scale: Tensor
    zero_point: Tensor | None
    block_size: Sequence[int]


def is_quantized(parameter: Tensor) -> bool:
    """Whether ``parameter`` is of a type of torchao's, or of one derived from it."""
    return any(_is_of_torchao(kind) for kind in type(parameter).__mro__)


def convert(parameter: Tensor, row_dim: int) -> QuantizedTensor | str:
    """``parameter``, which torchao has quantised, stored in planes.

    It is on the same device, and dequantised it has the same values, shape, strides and dtype.

    Args:
        parameter: a tensor for which :func:`is_quantized` holds, ``[N, K]`` or ``[E, N, K]``.
        row_dim: 1 stores a row for each input channel, 0 for each output channel.

    Returns:
        The quantised weight, or the reason why it can't be stored so, as one clause.
    """
    kind = type(parameter)
    affine = _read(parameter)
    if not isinstance(affine, str):
        converted = _store(affine, parameter, row_dim)
        if torch.equal(converted.dequantize(), parameter.dequantize()):
            return converted
        affine = "its values would be rounded to others"
    return f"its weight is a {kind.__name__}: {affine}"


def _read(parameter: Tensor) -> _Affine | str:
    kind = type(parameter)
    reader = _READERS.get(kind.__name__) if _is_of_torchao(kind) else None
    if reader is None:
        return "popc doesn't know its format"
    affine = reader if isinstance(reader, str) else reader(parameter)
    return affine if isinstance(affine, str) else _why_not(affine, parameter) or affine


def _is_of_torchao(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "torchao"


def _why_not(affine: _Affine, parameter: Tensor) -> str | None:
    if parameter.is_meta:
        return "it has no values yet"
    if affine.q.shape != parameter.shape or affine.q.dim() not in (2, 3):
        return "popc reads matrices and stacks of them"
    if any(size % block for size, block in zip(affine.q.shape, affine.block_size, strict=True)):
        return f"its blocks of {tuple(affine.block_size)} don't divide {tuple(affine.q.shape)}"
    return None


def _store(affine: _Affine, parameter: Tensor, row_dim: int) -> QuantizedTensor:
    planes = 1 if affine.bits <= 4 else 2
    spare = 8 - affine.bits if planes == 2 else 0
    # The low bits that are left over hold the middle of what they may hold.
    filled = ((1 << spare) - 1) // 2
    middle = fmt.GROUP_ZERO[planes]
    u = (affine.q.to(torch.int16) << spare) + (int(middle) + filled)
    scale = _by_group(affine.scale, affine) / (1 << spare)
    zero = None
    if filled or (affine.zero_point is not None and affine.zero_point.any()):
        zero = torch.full_like(scale, middle + filled)
        if affine.zero_point is not None:
            zero += _by_group(affine.zero_point, affine) * (1 << spare)
    packed = fmt.pack_integers(u, row_dim, planes)
    strides = parameter.stride()
    stored = Stored(tuple(parameter.shape), row_dim, planes, parameter.dtype, strides)
    return QuantizedTensor(packed, scale, zero, stored)


def _by_group(values: Tensor, affine: _Affine) -> Tensor:
    """Values of blocks as float32 ``[..., G, N]``, for groups of neighbouring inputs."""
    sizes = zip(affine.q.shape, affine.block_size, strict=True)
    values = values.reshape([size // block for size, block in sizes]).float()
    for dim, block in enumerate(affine.block_size[:-1]):
        values = values.repeat_interleave(block, dim)
    return values.mT.contiguous()


def _int8(weight: Any) -> _Affine | str:
    activations = "act_quant_kwargs", "act_quant_scale", "act_pre_scale"
    if any(getattr(weight, name, None) is not None for name in activations):
        return _ACTIVATIONS
    return _Affine(weight.qdata, 8, weight.scale, weight.zero_point, weight.block_size)


def _intx(weight: Any) -> _Affine | str:
    if weight.activation_quantization is not None:
        return _ACTIVATIONS
    bits = int(str(weight.target_dtype).rpartition("int")[2])
    return _Affine(weight.qdata, bits, weight.scale, weight.zero_point, weight.block_size)


def _affine_quantized(weight: Any) -> _Affine | str:
    """The format of ``version=1`` configurations, before torchao 0.17."""
    if weight.zero_point_domain is not None and weight.zero_point_domain.name == "FLOAT":
        return _ADDED
    q, scale, zero_point, *_ = (*weight.tensor_impl.get_plain(), None)
    if q.dtype not in (torch.int8, torch.uint8, torch.int32):
        return _NO_INTEGERS
    limits = torch.iinfo(q.dtype)
    least = limits.min if weight.quant_min is None else int(weight.quant_min)
    most = limits.max if weight.quant_max is None else int(weight.quant_max)
    bits = max(most, -least - 1).bit_length() + (least < 0)
    if bits > 8:
        return "its integers have more than 8 bits"
    if weight.zero_point_domain is not None and weight.zero_point_domain.name == "NONE":
        zero_point = None
    if least >= 0:
        middle = 1 << (bits - 1)
        q = q.to(torch.int16) - middle
        zero_point = (torch.zeros_like(scale) if zero_point is None else zero_point) - middle
    return _Affine(q, bits, scale, zero_point, weight.block_size)


_ACTIVATIONS = "its linear quantises or scales activations too"
_ADDED = "its zero points are added after scaling, which planes can't hold without rounding"
_NO_INTEGERS = "its values are no integers"

# How each type of torchao's holds its integers, or why they are not read.
_READERS: dict[str, Callable[[Any], _Affine | str] | str] = {
    "Int8Tensor": _int8,
    "IntxUnpackedToInt8Tensor": _intx,
    "AffineQuantizedTensor": _affine_quantized,
    "Int4Tensor": _ADDED,
    "Int4OpaqueTensor": _ADDED,
    "Int4TilePackedTo4dTensor": _ADDED,
    "Int4PreshuffledTensor": "it is packed for a kernel of Hopper GPUs alone",
    "Int4PlainInt32Tensor": "it is packed for kernels of XPUs and NPUs alone",
    "IntxOpaqueTensor": "its packed bytes are known to torchao's kernels alone",
    "LinearActivationQuantizedTensor": _ACTIVATIONS,
    "Float8Tensor": _NO_INTEGERS,
    "NF4Tensor": _NO_INTEGERS,
}

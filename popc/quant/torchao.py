"""Weights that torchao has quantised, stored in planes of nibbles: the same values, bit for bit.

What torchao holds of such a weight is ``w = (q - zero_point) · scale``, q integers of 1 to 8 bits,
with a scale and a zero point for each block of ``block_size`` weights. In planes that is ``(u -
zero) · scale``, with u = q shifted to be positive, and scales in float32, which holds those of any
dtype. Zero points are integers, so differences are exact, and the product is rounded alike in both.

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
        q: int8 ``[..., N, K]``, integers of ``bits`` bits: ``-2 ** (bits - 1)`` is the least.
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
    reader = _READERS.get(kind.__name__) if _is_of_torchao(kind) else None
    read = reader(parameter) if callable(reader) else reader or "popc doesn't know its format"
    if not isinstance(read, str):
        read = _why_not(read, parameter) or read
    if isinstance(read, str):
        return f"its weight is a {kind.__name__}: {read}"
    return _store(read, parameter, row_dim)


def _is_of_torchao(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "torchao"


def _why_not(affine: _Affine, parameter: Tensor) -> str | None:
    """The reason why planes can't hold these values, or None: then they are the same."""
    sizes, zero_point = affine.q.shape, affine.zero_point
    if parameter.is_meta:
        return "it has no values yet"
    if sizes != parameter.shape or len(sizes) not in (2, 3):
        return "popc reads matrices and stacks of them"
    if any(size % block for size, block in zip(sizes, affine.block_size, strict=True)):
        return f"its blocks of {tuple(affine.block_size)} don't divide {tuple(sizes)}"
    if affine.scale.dtype.itemsize > torch.float32.itemsize:
        return f"its scales are {affine.scale.dtype}, wider than float32"
    limit = 1 << (affine.bits - 1)
    least, most = (int(value) for value in affine.q.aminmax())
    if least < -limit or most >= limit:
        return f"it has integers of more than {affine.bits} bits"
    # A difference q - zero_point of up to 256 is the same in each dtype.
    if zero_point is not None and not _is_byte(zero_point):
        return "its zero points are no integers of 8 bits"
    return None


def _is_byte(values: Tensor) -> bool:
    values = values.double()
    return bool(((values == values.round()) & (values.abs() <= 128)).all())


def _store(affine: _Affine, parameter: Tensor, row_dim: int) -> QuantizedTensor:
    planes = 1 if affine.bits <= 4 else 2
    spare = 8 - affine.bits if planes == 2 else 0
    # The low bits that are left over hold the middle of what they could.
    middle = int(fmt.GROUP_ZERO[planes]) + ((1 << spare) - 1) // 2
    u = (affine.q.view(torch.uint8) << spare) + middle  # of 8 bits: what is over is dropped
    packed = fmt.pack_integers(u if planes == 2 else u & 15, row_dim, planes)
    scale = _by_group(affine.scale, affine) / (1 << spare)
    zero_point = affine.zero_point
    zero = None
    if zero_point is not None and zero_point.any():
        zero = _by_group(zero_point, affine) * (1 << spare) + middle
    elif middle != fmt.GROUP_ZERO[planes]:
        zero = torch.full_like(scale, middle)
    sizes, strides = tuple(parameter.shape), parameter.stride()
    stored = Stored(sizes, row_dim, planes, parameter.dtype, strides)
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
    zero_point = getattr(weight, "zero_point", None)  # torchao 0.15 has none
    return _Affine(weight.qdata, 8, weight.scale, zero_point, weight.block_size)


def _intx(weight: Any) -> _Affine | str:
    if weight.activation_quantization is not None:
        return _ACTIVATIONS
    bits = int(str(weight.target_dtype).rpartition("int")[2])
    return _Affine(weight.qdata, bits, weight.scale, weight.zero_point, weight.block_size)


def _affine_quantized(weight: Any) -> _Affine | str:
    """The format of ``version=1`` configurations, before torchao 0.17."""
    if weight.zero_point_domain is not None and weight.zero_point_domain.name == "FLOAT":
        return _ADDED
    plain: Sequence[Tensor | None] = weight.tensor_impl.get_plain()
    q, scale, zero_point = (*plain, None)[:3]
    assert q is not None and scale is not None
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
    return _Affine(q.to(torch.int8), bits, scale, zero_point, weight.block_size)


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

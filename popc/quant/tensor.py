"""A parameter whose values are quantised: see :mod:`popc.ops.planes` for how they are stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from popc import compat, ops

aten = torch.ops.aten


class Stored(NamedTuple):
    """How a weight of these ``sizes`` is stored.

    Attributes:
        sizes: ``(..., N, K)``: outputs and inputs last.
        row_dim: 1 where a row is an input channel, 0 where it is an output channel.
        planes: 2 for 8 bits, 1 for 4.
        dtype: of the values that are read.
        strides: which the tensor has that the model sees.
        transposed: whether the tensor that the model sees is ``[..., K, N]``.
    """

    sizes: tuple[int, ...]
    row_dim: int
    planes: int
    dtype: torch.dtype
    strides: tuple[int, ...]
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor that the model sees."""
        *lead, outputs, inputs = self.sizes
        return (*lead, inputs, outputs) if self.transposed else self.sizes


class QuantizedTensor(Tensor):
    """A tensor that stands for the values which ``packed`` holds.

    Whatever reads it, other than popc's passes, is given the dequantised values; what would write
    to it fails. Detached, moved or cast it stays quantised.

    Attributes:
        packed: uint8 ``[..., rows, bytes]``.
        scale, zero: float32 ``[..., G, N]``, or None where each row holds its scales.
        stored: what is stored, and how.
    """

    packed: Tensor
    scale: Tensor | None
    zero: Tensor | None
    stored: Stored

    @staticmethod
    def __new__(  # noqa: D102 - the class says it
        cls, packed: Tensor, scale: Tensor | None, zero: Tensor | None, stored: Stored
    ) -> QuantizedTensor:
        return compat.wrapper_subclass(
            cls, stored.shape, stored.strides, stored.dtype, packed.device
        )

    def __init__(
        self, packed: Tensor, scale: Tensor | None, zero: Tensor | None, stored: Stored
    ) -> None:
        self.packed, self.scale, self.zero, self.stored = packed, scale, zero, stored
        if scale is not None:
            _scales[packed] = scale, zero

    @classmethod
    def of(
        cls, values: Tensor, row_dim: int, planes: int, transposed: bool = False
    ) -> QuantizedTensor:
        """``values`` quantised.

        Args:
            values: ``[..., N, K]``, or ``[..., K, N]`` with ``transposed``; floating.
        """
        weight = values.mT if transposed else values
        sizes, strides = tuple(weight.shape), values.stride()
        stored = Stored(sizes, row_dim, planes, values.dtype, strides, transposed)
        return cls(ops.quantize(weight.detach(), row_dim, planes), None, None, stored)

    def dequantize(self) -> Tensor:
        """The values, as a plain tensor of this shape and dtype."""
        return read(self.stored, self.packed, self.scale, self.zero)

    def __tensor_flatten__(self) -> tuple[list[str], Stored]:
        inner = ["packed", "scale", "zero"]
        return [name for name in inner if getattr(self, name) is not None], self.stored

    @classmethod
    def __tensor_unflatten__(
        cls, inner: Mapping[str, Tensor], stored: Stored, size: Any, stride: Any
    ) -> QuantizedTensor:
        return cls(inner["packed"], inner.get("scale"), inner.get("zero"), stored)

    def __repr__(self) -> str:  # type: ignore[override]
        kind = f"{4 * self.stored.planes} bits, {self.dtype}, device={self.device}"
        return f"QuantizedTensor(shape={tuple(self.shape)}, {kind})"

    __torch_function__ = compat.no_torch_function  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        rule = _RULES.get(func)
        if rule is not None:
            return rule(func, *args, **(kwargs or {}))
        if func._schema.is_mutable and isinstance(args[0], cls):
            raise RuntimeError(
                f"{func} writes to a quantised weight: its values can't be changed in place; "
                "change the model's own weights and compile it anew"
            )
        args, kwargs = compat.pytree.tree_map_only(cls, cls.dequantize, (args, kwargs or {}))
        return func(*args, **kwargs)


_scales = WeakTensorKeyDictionary()  # of packed tensors whose rows hold none


def dequantized(
    packed: Tensor, sizes: Sequence[int], row_dim: int, planes: int, dtype: torch.dtype, bits: int
) -> Tensor:
    """The values ``[..., N, K]`` of what a :class:`QuantizedTensor` holds as ``packed``."""
    scale, zero = _scales.get(packed, (None, None))
    return ops.dequantize(packed, scale, zero, sizes, row_dim, planes, dtype, bits)


def read(stored: Stored, packed: Tensor, scale: Tensor | None, zero: Tensor | None) -> Tensor:
    """The values of a :class:`QuantizedTensor`, from what it holds."""
    values = ops.dequantize(
        packed, scale, zero, stored.sizes, stored.row_dim, stored.planes, stored.dtype
    )
    return values.mT if stored.transposed else values


def _map(tensor: QuantizedTensor, function: Callable[[Tensor], Tensor], **changed: Any) -> Any:
    inner = tensor.packed, tensor.scale, tensor.zero
    packed, scale, zero = (None if value is None else function(value) for value in inner)
    assert packed is not None
    return type(tensor)(packed, scale, zero, tensor.stored._replace(**changed))


def _to_copy(
    func: Any,
    tensor: QuantizedTensor,
    *,
    dtype: torch.dtype | None = None,
    device: Any = None,
    **others: Any,
) -> Any:
    """Another device, or another dtype of the values that are read."""
    dtype = tensor.dtype if dtype is None else dtype
    if not dtype.is_floating_point:
        return func(tensor.dequantize(), dtype=dtype, device=device, **others)
    return _map(tensor, lambda value: value.to(device=device, copy=True), dtype=dtype)


def _transpose(func: Any, tensor: QuantizedTensor, *dims: int) -> Any:
    rank = tensor.dim()
    if dims and {dim % rank for dim in dims} != {rank - 2, rank - 1}:
        return func(tensor.dequantize(), *dims)
    strides = (*tensor.stride()[:-2], tensor.stride(-1), tensor.stride(-2))
    return _map(tensor, _same, transposed=not tensor.stored.transposed, strides=strides)


def _same(value: Tensor) -> Tensor:
    return value


_RULES: dict[Any, Callable[..., Any]] = {
    aten.detach.default: lambda func, tensor: _map(tensor, _same),
    aten.alias.default: lambda func, tensor: _map(tensor, _same),
    aten.clone.default: lambda func, tensor, **_: _map(tensor, torch.clone),
    aten._to_copy.default: _to_copy,
    aten.t.default: _transpose,
    aten.transpose.int: _transpose,
}

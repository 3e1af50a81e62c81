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

    Whatever reads it, other than popc's passes, is given the dequantised values. Detached, cloned,
    moved or transposed it stays quantised, and cast too: the same integers, read as another dtype.
    Any other view, such as a slice, is a plain copy of values.

    What would write to it raises ``RuntimeError``, since values can't be changed one by one; so
    does ``load_state_dict`` of plain weights: load them into the original model, and compile that.
    A state dict of weights that are quantised alike can be loaded, and saved, with
    ``weights_only=True`` as well.

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

    def dequantize(self, output_dtype: torch.dtype | None = None) -> Tensor:
        """The values, as a plain tensor of this shape, and of this dtype or another."""
        stored = self.stored
        if output_dtype is not None:
            stored = stored._replace(dtype=output_dtype)
        return read(stored, *self.parts)

    @property
    def parts(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """``packed, scale, zero``."""
        return self.packed, self.scale, self.zero

    @property
    def data(self) -> Tensor:
        """The same tensor, detached. Only what is quantised alike can be assigned to it."""
        return Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, QuantizedTensor):
            raise RuntimeError(f"plain values are assigned to the data of {_READ_ONLY}")
        if _format(self) != _format(value):  # compiled graphs rely on it
            raise RuntimeError(f"values that are not quantised alike are assigned to {_READ_ONLY}")
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.__init__(*value.parts, value.stored)  # type: ignore[misc]

    def __setitem__(self, index: Any, value: Any) -> None:
        raise RuntimeError(f"an assignment to an index writes to {_READ_ONLY}")

    def share_memory_(self) -> QuantizedTensor:
        """Move what it holds to memory that processes share; it is shared on any device but CPU."""
        for value in self.parts:
            if value is not None:
                value.share_memory_()
        return self

    def is_shared(self) -> bool:
        """Whether what it holds is in memory that processes share."""
        return self.packed.is_shared()

    def __reduce_ex__(self, protocol: Any) -> Any:
        is_parameter = isinstance(self, torch.nn.Parameter)
        return _rebuild, (*self.parts, self.stored, is_parameter, self.requires_grad)

    def _stable_hash_for_caching(self) -> str:
        """Of all that code generated for it depends on; a hook of torch's caches of graphs."""
        kinds = [
            None if value is None else (tuple(value.shape), value.dtype) for value in self.parts
        ]
        return repr((type(self).__name__, self.stored, kinds, self.device, self.requires_grad))

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
        if func._schema.is_mutable and any(map(_is_quantized, _written(func, args, kwargs or {}))):
            raise RuntimeError(f"{func} writes to {_READ_ONLY}")
        plain = _strided if func.is_view or func in _READ_BY_STRIDES else cls.dequantize
        args, kwargs = compat.pytree.tree_map_only(cls, plain, (args, kwargs or {}))
        return func(*args, **kwargs)


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The tensors that an op is given to write to."""
    named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
    named.update(kwargs)
    to = [argument.name for argument in func._schema.arguments if argument.is_write]
    written: list[Any] = compat.pytree.tree_leaves([named.get(name) for name in to])
    return written


def _is_quantized(value: Any) -> bool:
    return isinstance(value, QuantizedTensor)


def _strided(tensor: QuantizedTensor) -> Tensor:
    """The values, with the strides that the tensor shows: which of its views exist depends on
    them."""
    values = tensor.dequantize()
    if values.stride() == tensor.stride():
        return values
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    ).copy_(values)


_READ_BY_STRIDES = (aten._unsafe_view.default,)
_READ_ONLY = (
    "a quantised weight: its values can't be changed in place; change the model's own weights and "
    "compile it anew"
)


def _rebuild(
    packed: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    stored: Stored,
    is_parameter: bool,
    requires_grad: bool,
) -> Tensor:
    tensor = QuantizedTensor(packed, scale, zero, stored)
    return torch.nn.Parameter(tensor, requires_grad) if is_parameter else tensor


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
    packed, scale, zero = (None if value is None else function(value) for value in tensor.parts)
    assert packed is not None
    return type(tensor)(packed, scale, zero, tensor.stored._replace(**changed))


def _to_copy(
    func: Any,
    tensor: QuantizedTensor,
    *,
    dtype: torch.dtype | None = None,
    device: Any = None,
    non_blocking: bool = False,
    **others: Any,
) -> Any:
    """Another device, or another dtype of the values that are read."""
    dtype = tensor.dtype if dtype is None else dtype
    if not dtype.is_floating_point:
        return func(tensor.dequantize(), dtype=dtype, device=device, **others)

    def copied(value: Tensor) -> Tensor:
        return value.to(device=device, non_blocking=non_blocking, copy=True)

    return _map(tensor, copied, dtype=dtype)


def _clone(
    func: Any, tensor: QuantizedTensor, *, memory_format: Any = torch.preserve_format
) -> Any:
    if memory_format is torch.preserve_format:
        return _map(tensor, torch.clone)
    if memory_format is not torch.contiguous_format:
        return func(_strided(tensor), memory_format=memory_format)
    strides = torch.empty(tensor.shape, device="meta").stride()
    return _map(tensor, torch.clone, strides=strides)


def _copy(func: Any, tensor: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Of what is quantised alike into what is quantised, as loading a state dict does."""
    if not isinstance(tensor, QuantizedTensor):
        plain = _strided(source) if isinstance(source, QuantizedTensor) else source
        return tensor.copy_(plain, non_blocking)
    if not isinstance(source, QuantizedTensor) or _format(tensor) != _format(source):
        raise RuntimeError(f"{func} of values that are not quantised alike writes to {_READ_ONLY}")
    inner = zip(tensor.parts, source.parts, strict=True)
    for old, new in inner:
        if old is not None and new is not None:
            old.copy_(new, non_blocking)
    return tensor


def _format(tensor: QuantizedTensor) -> tuple[Any, ...]:
    """All that two tensors have in common of which the planes can be exchanged."""
    shapes = [None if value is None else value.shape for value in tensor.parts]
    stored = tensor.stored
    return stored.sizes, stored.row_dim, stored.planes, stored.transposed, shapes


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
    aten.clone.default: _clone,
    aten.copy_.default: _copy,
    aten._to_copy.default: _to_copy,
    aten.t.default: _transpose,
    aten.transpose.int: _transpose,
}

# Lets torch.load(weights_only=True) read such weights.
torch.serialization.add_safe_globals([QuantizedTensor, Stored, _rebuild])

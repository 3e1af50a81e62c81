"""What ``popc.compile(model, weights=..., inplace=True)`` leaves in ``model``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from popc import compat
from popc.errors import ModelError

_FREED = (
    "the weights of this model were freed by popc.compile(..., inplace=True): use the compiled "
    "model that it returned, or load the model anew"
)


class FreedWeight(Tensor):
    """A parameter without memory: it has a shape, dtype and device, and no op takes it."""

    __torch_function__ = compat.no_torch_function  # type: ignore[assignment]

    @classmethod
    def of(cls, parameter: Tensor) -> torch.nn.Parameter:
        """In the place of ``parameter``."""
        shape, strides = tuple(parameter.shape), parameter.stride()
        freed = compat.wrapper_subclass(cls, shape, strides, parameter.dtype, parameter.device)
        return torch.nn.Parameter(freed, requires_grad=False)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"FreedWeight(shape={tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            (freed,) = args
            like = freed.stride(), freed.dtype, freed.device
            return compat.wrapper_subclass(cls, freed.shape, *like)
        raise ModelError(_FREED)

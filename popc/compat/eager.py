"""Tensors, modules, ops and nested containers, as eager PyTorch has them.

Seen working on torch 2.11 - 2.13.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree  # torch.utils has no public one
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = [
    "COMPILED_CALL",
    "OpOverload",
    "grouped_mm",
    "is_traceable_wrapper_subclass",
    "no_torch_function",
    "overloads",
    "pytree",
    "storage_users",
    "wrapper_subclass",
    "writes_to",
]

COMPILED_CALL = "_compiled_call_impl"  # where nn.Module.compile keeps what it made
OpOverload = torch._ops.OpOverload  # the type of an op in a graph
grouped_mm = torch._grouped_mm  # what torch.nn.functional.grouped_mm was before torch 2.10
# Leaves a tensor subclass to its __torch_dispatch__; PyTorch's notes on extending it name this one.
no_torch_function = torch._C._disabled_torch_function_impl


def wrapper_subclass(
    cls: type[torch.Tensor],
    shape: Sequence[int],
    strides: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """A tensor of ``cls`` that stands for others, without memory of its own; nothing public makes
    one."""
    make: Any = torch.Tensor._make_wrapper_subclass
    return make(cls, shape, strides, dtype=dtype, device=device)


def writes_to(tensor: torch.Tensor) -> int | None:
    """How often ``tensor`` was written to in place; None if that is not counted, as in inference
    mode. PyTorch's notes on autograd tell of ``_version``, but nothing public gives it."""
    return None if tensor.is_inference() else tensor._version


def storage_users(tensor: torch.Tensor) -> int:
    """How many tensors hold the storage of ``tensor``; private because nothing public tells."""
    storage = tensor.untyped_storage()
    # One for the tensor, one for `storage`.
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1


def overloads(op: Any) -> list[OpOverload]:
    """The overloads of an op, given as one of them, as ``torch.ops.x.y``, or by its definition;
    none if it is no op.

    Private because what ``torch.library.custom_op`` gives does not show its op.
    """
    op = getattr(op, "_opoverload", op)
    if isinstance(op, OpOverload):
        return [op]
    if isinstance(op, torch._ops.OpOverloadPacket):
        return [getattr(op, name) for name in op.overloads()]
    return []

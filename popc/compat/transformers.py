"""What is private in transformers, or differs between its versions. Nothing here imports it.

Seen working on transformers 5.23 and 5.24.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from popc.compat.eager import OpOverload


def marked_prefill(
    module: nn.Module, mark: Callable[[], contextlib.AbstractContextManager[Any]]
) -> dict[str, Any]:
    """``module``'s own attribute for transformers' ``_prefill``, which runs it under ``mark()``.

    Private because nothing public tells the last chunk of a prompt, if it is a single token, from a
    decode step. An assistant's drafts go through it too, and are left alone: they say that they are
    no first iteration. Empty where this transformers, or the model, has no such method.
    """
    dense = getattr(type(module), "_prefill", None)
    if dense is None or "is_first_iteration" not in inspect.signature(dense).parameters:
        return {}

    @functools.wraps(dense)
    def prefill(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = inspect.signature(dense).bind(self, *args, **kwargs).arguments
        begins = arguments.get("is_first_iteration", True)
        with mark() if begins else contextlib.nullcontext():
            return dense(self, *args, **kwargs)

    return {"_prefill": types.MethodType(prefill, module)}


def cache_keyword(forward: Callable[..., Any]) -> str:
    """The argument of ``forward`` that takes a KV cache; transformers 5.24 renamed it."""
    names = inspect.signature(forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def grouped_mm_fallback() -> OpOverload | None:
    """transformers' stand-in for :data:`grouped_mm`, of the same schema, for dtypes that torch's op
    does not take under ``torch.compile``. None where no model of this transformers defined it."""
    packet = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    op: OpOverload | None = getattr(packet, "default", None)
    return op

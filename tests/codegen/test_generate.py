"""Which pieces Inductor may wrap in C++."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from popc.codegen import fits_cpp_wrapper


def test_what_inductor_wraps_in_cpp() -> None:
    def traced(function: Callable[..., Any], *inputs: torch.Tensor) -> fx.GraphModule:
        return make_fx(function, tracing_mode="fake", pre_dispatch=True)(*inputs)

    x = torch.ones(4)
    assert fits_cpp_wrapper(traced(lambda x: x.split(2)[0].sin() + x.shape[0], x))
    assert not fits_cpp_wrapper(traced(lambda x: torch._foreach_add([x], 1)[0], x))
    assert not fits_cpp_wrapper(traced(lambda x: x.sin(), x.to("meta")))

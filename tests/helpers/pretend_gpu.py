"""What Inductor writes for a GPU that is not there: ``python -m tests.helpers.pretend_gpu POLICY``.

A decode step of a small llama is traced with fake CUDA tensors, through popc's backend and all of
Inductor down to its code, which is printed. Compiling Triton and running it is left out. With
``planes`` for a policy these are two linears on quantised weights. To be run in a process of its
own: parts of torch are replaced for good.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor, nn
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.fx_passes import joint_graph
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import StaticCache
from triton.backends.compiler import GPUTarget

from popc import backend, compat
from popc.config import Config
from popc.ops.planes import row_bytes
from tests.helpers.models import CACHE, tiny_llama

GPU = "cuda:0"
HIDDEN, CHANNELS, ROOM = 256, 512, 64
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>
using c10::DeviceType;
struct Registers {
  Registers() {
    c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(
        new c10::impl::FakeGuardImpl<DeviceType::CUDA>());
  }
} registers;
"""


class Written(Exception):
    """Inductor has written its code."""


def pretend() -> None:
    """Let torch and Triton take this machine for one with an H100."""
    ctypes.CDLL(f"{torch.__path__[0]}/lib/libc10.so", mode=ctypes.RTLD_GLOBAL)
    compat.load_cpp(GUARD)
    properties = SimpleNamespace(
        name="H100",
        gcnArchName="",
        major=9,
        minor=0,
        multi_processor_count=132,
        warp_size=32,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=227 << 10,
        total_memory=80 << 30,
    )
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": False,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (9, 0),
        "get_device_properties": properties,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "synchronize": None,
        "_lazy_init": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer: answer)
        if hasattr(CudaInterface, name):
            setattr(CudaInterface, name, staticmethod(lambda *_, answer=answer: answer))
    CudaInterface.get_compute_capability = staticmethod(lambda *_: 90)
    CudaInterface.Worker.get_device_properties = staticmethod(lambda *_: properties)
    target = GPUTarget("cuda", 90, 32)
    triton.runtime.driver._active = SimpleNamespace(
        get_current_target=lambda: target, get_active_torch_device=lambda: torch.device(GPU)
    )
    # Other libraries may have asked before, and the answer is kept.
    for question in vars(torch.utils._triton).values():
        if hasattr(question, "cache_clear"):
            question.cache_clear()
    # Both compute with small tensors on the device.
    joint_graph.lazy_init = lambda *_: None
    torch._inductor.config.joint_graph_constant_folding = False


def capture_code() -> list[str]:
    """What Inductor writes from now on, where it would compile it."""
    sources: list[str] = []

    def write(graph: GraphLowering) -> None:
        if graph.disable_cudagraphs_reason:
            print("no CUDA graphs:", graph.disable_cudagraphs_reason)
        sources.append(graph.codegen()[0].value)
        raise Written

    GraphLowering.compile_to_module = write  # type: ignore[assignment]
    return sources


def one_mode_for_all() -> None:
    """popc takes real tensors or fakes of Dynamo's: here the real ones are fakes too, with the
    strides that popc would have given them."""
    backend.store_channel_major = lambda *_: ([], {})  # type: ignore[assignment]
    fakify, inductor, known = compat.fakify, compat.inductor, {}

    def as_known(mode: FakeTensorMode, value: Any) -> Any:
        if not isinstance(value, FakeTensor) or value.fake_mode is mode:
            return fakify(mode, value)
        if value not in known:
            with mode:
                form = {"dtype": value.dtype, "device": value.device}
                known[value] = torch.empty_strided(value.shape, value.stride(), **form)
        return known[value]

    def with_known(gm: Any, inputs: Any, *rest: Any) -> Any:
        mode = compat.dynamo_fake_mode()
        return inductor(gm, [as_known(mode, value) for value in inputs], *rest)

    compat.fakify, compat.inductor = as_known, with_known


def model_on_gpu(policy: str) -> tuple[nn.Module, StaticCache]:
    """To be called under a fake mode."""
    model = tiny_llama(hidden_size=HIDDEN, intermediate_size=CHANNELS, vocab_size=1000)
    for module in model.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            turned = value.dim() == 2 and (policy == "threshold" or value.shape[1] == CHANNELS)
            size = value.shape[::-1] if turned else value.shape
            weight = torch.empty(size, dtype=torch.bfloat16, device=GPU)
            weight = nn.Parameter(weight.t() if turned else weight, requires_grad=False)
            module._parameters[name] = weight
        for name, value in list(module.named_buffers(recurse=False)):
            module._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device=GPU)
    cache = StaticCache(config=model.config, max_cache_len=ROOM)
    for layer in cache.layers:
        layer.keys, layer.values = (
            torch.empty(1, 2, ROOM, HIDDEN // 4, dtype=torch.bfloat16, device=GPU) for _ in range(2)
        )
        layer.cumulative_length = torch.empty((), dtype=torch.int64, device=GPU)
        layer.device, layer.is_initialized = torch.device(GPU), True
    return model, cache


def code_of(policy: str) -> str:
    pretend()
    one_mode_for_all()
    sources = capture_code()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model, cache = model_on_gpu(policy)
        config = Config(sparsity=0.4, policy=policy, inductor={"triton.cudagraphs": True})
        made = functools.partial(backend.popc_backend, config=config)
        token = torch.zeros(1, 1, dtype=torch.int64, device=GPU)
        try:
            compat.compile_alone(model.forward, made)(token, **{CACHE: cache})
        except Exception as error:
            if not sources:
                raise
            print("stopped:", type(error).__name__)
    return sources[-1]


def code_of_planes() -> str:
    """Of a linear that is read by grade, and of one that all is read of, on quantised weights."""
    pretend()
    sources = capture_code()

    def step(x: Tensor, packed: Tensor, norm: Tensor, limit: Tensor, last: Tensor) -> Tensor:
        weight = packed, None, None, CHANNELS, 2, None
        y = torch.ops.popc.triton_graded_linear(x, *weight, norm, norm, limit)
        return torch.ops.popc.triton_quantized_linear(y.relu(), last, None, None, None, 1000, 0, 2)

    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(1, 1, HIDDEN, dtype=torch.bfloat16, device=GPU)
        rows = [(HIDDEN, row_bytes(CHANNELS, 2)), (1000, row_bytes(CHANNELS, 2))]
        packed, last = (torch.empty(size, dtype=torch.uint8, device=GPU) for size in rows)
        norm, limit = (torch.empty(size, device=GPU) for size in (HIDDEN, 1))
        try:
            torch.compile(step, fullgraph=True)(x, packed, norm, limit, last)
        except Exception as error:
            if not sources:
                raise
            print("stopped:", type(error).__name__)
    return sources[-1]


if __name__ == "__main__":
    print(code_of_planes() if sys.argv[1] == "planes" else code_of(sys.argv[1]))

"""What CUDA graphs ask of a compiled graph, seen without a GPU.

They take inputs at fixed addresses as they are and copy the others; they are not used at all where
one of the others is written to. And a step must not wait for the device.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx
from torch._inductor.compile_fx import compile_fx
from transformers import StaticCache

import popc
from popc import compat, sessions
from tests.helpers.models import CACHE, tiny_llama

OPTIONS = {"sparsity": 0.4, "inductor": {"triton.cudagraphs": True}}
POLICIES = ["threshold", "pop"]
HIDDEN = 256  # of tests.helpers.pretend_gpu


@dataclass
class Seen:
    """What Inductor was told of each graph: inputs that are not fixed, and whether to record."""

    loose: list[list[Any]] = field(default_factory=list)
    recorded: list[bool] = field(default_factory=list)

    def inner(self, gm: fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
        fixed = options["static_input_idxs"]
        self.loose.append([value for i, value in enumerate(inputs) if i not in fixed])
        self.recorded.append(bool(options["cudagraphs"]))
        return make_boxed_func(gm)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    torch.compiler.reset()
    record = Seen()
    monkeypatch.setattr(
        compat.codegen, "compile_fx", functools.partial(compile_fx, inner_compile=record.inner)
    )
    yield record
    torch.compiler.reset()


def prompt(length: int, seed: int = 0) -> Tensor:
    return torch.randint(96, (1, length), generator=torch.Generator().manual_seed(seed))


def is_cache_like(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("allocated", [True, False])
@torch.no_grad()
def test_weights_and_static_caches_are_fixed(seen: Seen, policy: str, allocated: bool) -> None:
    model = tiny_llama()
    cache = StaticCache(config=model.config, max_cache_len=32)
    called = {CACHE: cache, "use_cache": True}
    if allocated:
        model(prompt(2), **called)
        cache.reset()
    compiled = popc.compile(model, policy=policy, **OPTIONS)
    compiled(prompt(8), **called)
    compiled(prompt(1), **called)
    prefill, decode = seen.loose
    assert seen.recorded == [False, True]
    # Tokens, and popc's own: norms, and what was measured; all are small.
    tensors = [value for value in decode if isinstance(value, Tensor)]
    assert tensors[0].shape == (1, 1)
    assert not any(is_cache_like(value) for value in (*prefill, *decode))
    assert len(tensors) == {"threshold": 5, "pop": 3}[policy]
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert sum(value.numel() for value in tensors) < weights / 10


@torch.no_grad()
def test_a_step_does_not_read_the_caches_length(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    compiled = popc.compile(model, sparsity=0.4, codegen="eager")
    cache = StaticCache(config=model.config, max_cache_len=32)
    called = {CACHE: cache, "use_cache": True}
    compiled(prompt(8), **called)
    compiled(prompt(1), **called)
    compiled(prompt(1), **called)
    first = sessions.of_cache(cache)
    reads: list[Tensor] = []

    def read(tensor: Tensor) -> int:
        reads.append(tensor)
        return int(tensor.item())

    monkeypatch.setattr(Tensor, "__int__", read)
    for _ in range(3):
        compiled(prompt(1), **called)
    assert not reads
    assert sessions.of_cache(cache) is first
    # Whoever empties it writes to its length; a prompt of one token then has a session of its own.
    cache.reset()
    compiled(prompt(1), **called)
    assert len(reads) == 1
    second = sessions.of_cache(cache)
    assert second is not first
    cache.reset()
    compiled(prompt(8, seed=1), **called)
    assert sessions.of_cache(cache) not in (first, second)


@torch.no_grad()
def test_a_call_that_leaves_the_cache_empty_tells_nothing() -> None:
    """Its length is then read again, and the next prompt begins anew."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(8, 32), torch.nn.Linear(32, 8)

        def forward(self, x: Tensor, cache: Cache, writes: bool) -> Tensor:
            if writes:
                cache.length.add_(x.shape[1])
            return self.down(torch.relu(self.up(x)))

    class Cache:
        def __init__(self) -> None:
            self.length = torch.zeros((), dtype=torch.int64)

        def get_seq_length(self) -> Tensor:
            return self.length

    compiled, cache = popc.compile(Model().eval(), sparsity=0.4, codegen="eager"), Cache()
    x = torch.randn(1, 5, 8)
    met = []
    for writes in (False, False, True, True, False, True):
        compiled(x, cache, writes)
        met.append(sessions.of_cache(cache))
    assert len({id(session) for session in met[:3]}) == 3
    assert all(session is met[2] for session in met[3:])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to try it on")
@pytest.mark.parametrize("policy", POLICIES)
def test_inductor_writes_a_step_for_cuda_that_copies_no_weight(policy: str) -> None:
    pytest.importorskip("triton")
    env = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    command = [sys.executable, "-m", "tests.helpers.pretend_gpu", policy]
    root = Path(__file__).parents[2]
    ran = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stderr
    code = ran.stdout
    # All of it in one CUDA graph.
    assert "no CUDA graphs" not in code
    assert "partitions=[partition_0,]" in code
    # Of two layers, and the last linear; what is no kernel of Inductor's is called by name.
    gathers = len(re.findall(r"gather_kernel_\d+\.run\(", code))
    products = code.count("extern_kernels.mm(")
    others = set(re.findall(r"torch\.ops\.popc\.(\w+)\.default\(", code))
    counts = gathers, products, others
    assert counts == {"threshold": (14, 1, set()), "pop": (6, 9, {"select_units"})}[policy]
    sizes = re.findall(r"empty_strided_cuda\(\(([\d, ]*)\)", code)
    largest = max(prod(map(int, re.findall(r"\d+", size))) for size in sizes)
    assert largest < 128 * HIDDEN, "as large as the smallest weight"

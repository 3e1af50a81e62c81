"""The Triton kernels, as far as they can be tried without a GPU.

In Triton's interpreter they compute what the ops mean; ahead of time they compile to binaries for
two generations of GPUs; traced, they show Inductor the kernel and nothing that is not so.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

from popc.ops import triton_gather
from tests.helpers.triton_cases import CASES

if not triton_gather.available():
    pytest.skip("Triton is not installed", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget

from popc.ops.triton_ahead import compile_ahead, cubins

EM_CUDA = 190  # the machine that an ELF header names


def test_kernels_compute_what_the_ops_mean() -> None:
    # In a process of its own: the interpreter is chosen before the kernels are defined.
    run = subprocess.run(
        [sys.executable, "-m", "tests.helpers.triton_cases"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {str(case): "" for case in CASES}


def test_every_case_has_a_name_of_its_own() -> None:
    assert len({str(case) for case in CASES}) == len(CASES)


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_a_gpu_that_is_not_there(capability: int) -> None:
    made = compile_ahead(capability)
    names = [name.rsplit(" ", 1)[0] for name in made]
    forms = ("linear 1", "linear 16", "experts 1", "threshold 1", "threshold 16")
    assert names == [
        f"{tiling} {form} {dtype}"
        for tiling in ("rows", "columns")
        for form in forms
        for dtype in ("bf16", "fp32")
    ]
    for name, asm in made.items():
        cubin, ptx = asm["cubin"], asm["ptx"]
        assert cubin.startswith(b"\x7fELF"), name
        assert int.from_bytes(cubin[18:20], "little") == EM_CUDA, name
        assert b"gather_kernel" in cubin, name
        assert f".target sm_{capability}" in ptx, name
        # On the weight that a tiling is for, a thread reads 16 bytes at once; that of thresholds
        # is channel-major, and by rows each value has a predicate of its own.
        if not name.startswith("rows threshold"):
            assert re.search(r"ld\.global\S*\.v4\.b32|cp\.async\.cg\.\S+ .*0x10", ptx), name
    binaries = {name: asm["cubin"] for name, asm in made.items() if "bf16" in name}
    assert cubins(capability, [torch.bfloat16]) == binaries


def fake(*size: int, dtype: torch.dtype = torch.bfloat16, stride: Any = None) -> Tensor:
    if stride is not None:
        return torch.empty_strided(size, stride, dtype=dtype, device="cuda")
    return torch.empty(size, dtype=dtype, device="cuda")


def listed(*size: int) -> Tensor:
    return fake(*size, dtype=torch.int64)


@pytest.mark.parametrize("dtype", triton_gather.DTYPES)
@pytest.mark.parametrize("stride", [(64, 1), (1, 128)])
@pytest.mark.parametrize("batch", [1, 3])
def test_fake_tensors_have_the_answers_form(batch, stride, dtype) -> None:
    linear = torch.ops.popc.triton_gather_linear.default
    experts = torch.ops.popc.triton_gather_experts.default
    with FakeTensorMode():
        x, w = fake(batch, 1, 64, dtype=dtype), fake(128, 64, dtype=dtype, stride=stride)
        bias = fake(128, dtype=dtype)
        for rows, columns in (
            (None, None),
            (listed(7), None),
            (None, listed(batch, 5)),
            (listed(batch, 7), listed(5)),
        ):
            y = linear(x, w, bias, rows, columns, 0)
            assert (y.shape, y.dtype, y.device) == ((batch, 1, 128), dtype, x.device)
        for limits in (fake(1, dtype=torch.float32), fake(batch, dtype=torch.float32)):
            args = (x, w, bias, fake(64, dtype=torch.float32), limits, 0)
            y = torch.ops.popc.triton_threshold_linear(*args)
            assert (y.shape, y.dtype, y.device) == ((batch, 1, 128), dtype, x.device)
            more = (fake(batch, n, dtype=torch.float32) for n in (64, 128))
            y = torch.ops.popc.triton_threshold_linear(*args, *more)
            assert (y.shape, y.dtype, y.device) == ((batch, 1, 128), dtype, x.device)
        stack = fake(4, 128, 64, dtype=dtype, stride=(128 * 64, *stride))
        for count in (0, batch):
            args = (listed(count), fake(4, dtype=torch.bool), listed(4, 7), listed(count, 5), 0)
            y = experts(fake(count, 64, dtype=dtype), stack, *args)
            assert (y.shape, y.dtype, y.device) == ((count, 128), dtype, x.device)


def test_they_serve_cuda_tensors_of_one_dtype() -> None:
    assert not triton_gather.serves(torch.empty(3), torch.empty(3))
    with FakeTensorMode():
        assert triton_gather.serves(fake(3), fake(3))
        assert not triton_gather.serves(fake(3), fake(3, dtype=torch.float32))
        wide = fake(3, dtype=torch.float64)
        assert not triton_gather.serves(wide, wide)


def traced(f: Callable[..., Tensor], *args: Any) -> fx.Graph:
    """What Inductor is given when ``f`` is compiled; nothing is run."""
    graphs = []

    def capture(gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(gm.graph)
        (outputs,) = gm.graph.find_nodes(op="output")[0].args
        return lambda *_: [torch.zeros_like(args[0]) for _ in outputs]

    torch.compile(f, backend=aot_autograd(fw_compiler=capture), fullgraph=True)(*args)
    (graph,) = graphs
    return graph


def launches(graph: fx.Graph) -> list[fx.Node]:
    kernel = torch.ops.higher_order.triton_kernel_wrapper_functional
    return [n for n in graph.nodes if n.target is kernel]


@pytest.fixture
def gpu_to_compile_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """To learn what a kernel writes to, torch lets Triton compile it for the GPU at hand."""
    target = GPUTarget("cuda", 90, 32)
    driver = SimpleNamespace(get_current_target=lambda: target)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)


@pytest.mark.usefixtures("gpu_to_compile_for")
@torch.no_grad()
def test_inductor_sees_the_kernel_and_that_it_writes_the_answer_alone() -> None:
    def ffn(x: Tensor, gate: Tensor, down: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        h = torch.relu(torch.ops.popc.triton_gather_linear(x, gate, None, rows, None, 0))
        return torch.ops.popc.triton_gather_linear(h, down, None, None, columns, 0)

    rows, columns = torch.arange(500), torch.arange(400)
    gate, down = torch.empty(600, 64), torch.empty(600, 64).t()
    graph = traced(ffn, torch.empty(1, 1, 64), gate, down, rows, columns)
    first, second = launches(graph)
    # A weight that may be written to would be copied at each launch.
    assert first.kwargs["tensors_to_clone"] == second.kwargs["tensors_to_clone"] == ["y"]
    # One program for 16 rows; the columns' sum in parts, which ATen adds.
    assert first.kwargs["kwargs"]["SPLITS"] == 1
    assert first.kwargs["grid"][0] == (32, 1, 1)
    assert second.kwargs["kwargs"]["SPLITS"] == 6
    assert second.kwargs["grid"][0] == (1, 6, 1)
    assert second.kwargs["kwargs"]["y"].meta["val"].shape == (6, 1, 1, 64)
    targets = [str(n.target) for n in graph.nodes]
    assert "aten.sum.dim_IntList" in targets
    assert not any("popc" in target for target in targets)


@pytest.mark.usefixtures("gpu_to_compile_for")
@torch.no_grad()
def test_a_threshold_is_read_in_the_kernel() -> None:
    """No list, no copy of the weight: one launch, whose sum in parts ATen adds."""

    def linear(x: Tensor, weight: Tensor, norm: Tensor, limit: Tensor) -> Tensor:
        return torch.ops.popc.triton_threshold_linear(x, weight, None, norm, limit, 0)

    args = (torch.empty(1, 1, 640), torch.empty(640, 64).t(), torch.empty(640), torch.empty(1))
    (launch,) = launches(graph := traced(linear, *args))
    assert launch.kwargs["tensors_to_clone"] == ["y"]
    assert {"norm", "threshold"} <= launch.kwargs["kwargs"].keys()
    assert launch.kwargs["kwargs"]["SPLITS"] == 10
    targets = [str(n.target) for n in graph.nodes]
    assert "aten.sum.dim_IntList" in targets
    assert not any("popc" in target for target in targets)


@pytest.mark.usefixtures("gpu_to_compile_for")
@torch.no_grad()
def test_a_symbolic_batch_stays_symbolic() -> None:
    def both(x: Tensor, weight: Tensor, columns: Tensor, expert: Tensor, full: Tensor) -> Tensor:
        y = torch.ops.popc.triton_gather_linear(x, weight[0], None, None, columns, 0)
        args = (expert, full, None, columns, 0)
        return y.sum(1) + torch.ops.popc.triton_gather_experts(x.sum(1), weight, *args)

    x, columns, expert = torch.empty(3, 1, 64), torch.zeros(3, 5).long(), torch.zeros(3).long()
    for batched in (x, columns, expert):
        torch._dynamo.mark_dynamic(batched, 0)
    graph = traced(both, x, torch.empty(2, 64, 64), columns, expert, torch.zeros(2))
    first, second = launches(graph)
    assert first.kwargs["tensors_to_clone"] == second.kwargs["tensors_to_clone"] == ["y"]
    for launch in (first, second):
        assert isinstance(launch.kwargs["grid"][0][2], fx.Node)
        assert launch.kwargs["kwargs"]["BLOCK_M"] == 1


def test_the_module_does_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("without_triton", triton_gather.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not module.available()
    assert not module.serves(torch.empty(3), torch.empty(3))
    assert not hasattr(module, "triton_gather_linear")

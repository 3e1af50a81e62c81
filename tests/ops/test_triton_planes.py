"""The Triton kernels on quantised weights, as far as they can be tried without a GPU.

In Triton's interpreter they compute what the ops mean; ahead of time they compile to binaries for
two generations of GPUs, in bfloat16 and with the first config of each; traced, they show Inductor
the kernel. No GPU has run any of them: what the binaries compute, and how fast, has not been seen.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from popc.ops import (
    gather_linear,
    graded_linears,
    planes,
    quantize,
    quantized_linear,
    select_kernel,
    triton_gather,
    triton_planes,
)
from tests.helpers.triton_plane_cases import CASES

if not triton_gather.available():
    pytest.skip("Triton is not installed", allow_module_level=True)

from popc.ops import triton_plane_kernels
from popc.ops.triton_ahead import compile_planes_ahead
from popc.passes.segments import segment_offsets
from popc.passes.threshold_inputs import rewrite_linears
from tests.ops.test_triton import EM_CUDA, fake, gpu_to_compile_for, launches, traced
from tests.passes.test_read_by_grade import K, Three, found

__all__ = ["gpu_to_compile_for"]  # a fixture


def test_kernels_compute_what_the_ops_mean() -> None:
    # In a process of its own: the interpreter is chosen before the kernels are defined.
    run = subprocess.run(
        [sys.executable, "-m", "tests.helpers.triton_plane_cases"],
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
    made = compile_planes_ahead(capability, [torch.bfloat16])
    products = {name.rsplit(" ", 2)[0] for name in made if not name.startswith("values")}
    forms = product(("graded", "by_input", "apart", "by_output"), (2, 1), (1, 16))
    assert products == {"{} {} {}".format(*form) for form in forms}
    assert {name for name in made if name.startswith("values")} == {
        "values by_input bf16",
        "values by_output bf16",
    }
    for name, asm in made.items():
        cubin, ptx = asm["cubin"], asm["ptx"]
        assert cubin.startswith(b"\x7fELF"), name
        assert int.from_bytes(cubin[18:20], "little") == EM_CUDA, name
        assert f".target sm_{capability}" in ptx, name
        if not name.startswith("values"):
            # A thread reads 16 bytes of a plane at once, and none keeps registers in memory.
            assert re.search(r"ld\.global\S*\.v4\.b32|cp\.async\.cg\.\S+ .*0x10", ptx), name
        assert not re.search(r"(ld|st)\.local", ptx), name
    single = next(asm["ptx"] for name, asm in made.items() if name.startswith("graded 2 1 "))
    # What is not read is not loaded: each of these has a predicate.
    loads = re.findall(r"(@\S+ )?ld\.global\S*\.v4\.b32", single)
    assert loads and all(loads)


def packed_of(outputs: int, inputs: int, row_dim: int, count: int = 2) -> Tensor:
    rows, length = (inputs, outputs) if row_dim == 1 else (outputs, inputs)
    return fake(rows, planes.row_bytes(length, count), dtype=torch.uint8)


def wide(*size: int) -> Tensor:
    return fake(*size, dtype=torch.float32)


@pytest.mark.parametrize("dtype", triton_gather.DTYPES)
@pytest.mark.parametrize("batch", [1, 3, 40])
def test_fake_tensors_have_the_answers_form(batch: int, dtype: torch.dtype) -> None:
    ops = torch.ops.popc
    with FakeTensorMode():
        x, bias = fake(batch, 1, 64, dtype=dtype), fake(70, dtype=dtype)
        for row_dim, count in product((0, 1), (2, 1)):
            packed = packed_of(70, 64, row_dim, count)
            y = ops.triton_quantized_linear(x, packed, None, None, bias, 70, row_dim, count)
            assert (y.shape, y.dtype, y.device) == ((batch, 1, 70), dtype, x.device)
        grades = wide(64), wide(64), wide(batch), wide(batch, 64), wide(batch, 70)
        weight = packed_of(70, 64, 1), None, None, 70, 2, bias
        y = ops.triton_graded_linear(x, *weight, *grades)
        assert (y.shape, y.dtype, y.device) == ((batch, 1, 70), dtype, x.device)


def test_what_does_not_fit_the_sizes_is_refused() -> None:
    op = torch.ops.popc.triton_quantized_linear
    with FakeTensorMode():
        x, packed = fake(1, 1, 64), packed_of(70, 64, 1)
        for wrong in (packed.narrow(0, 0, 63), packed.narrow(1, 0, 100), packed_of(70, 64, 0)):
            with pytest.raises(ValueError, match="rows"):
                op(x, wrong, None, None, None, 70, 1, 2)
        rows = fake(64, 3 * 32, dtype=torch.uint8)
        for scale in (wide(1, 64), wide(0, 70), wide(65, 70)):
            with pytest.raises(ValueError, match="scale"):
                op(x, rows, scale, None, None, 70, 1, 2)
        with pytest.raises(ValueError, match="zero"):
            op(x, rows, wide(2, 70), wide(1, 70), None, 70, 1, 2)
        with pytest.raises(ValueError, match="bias"):
            op(x, packed, None, None, fake(64), 70, 1, 2)


def test_select_kernel_takes_them_on_cuda_alone() -> None:
    ops = torch.ops.popc
    x, packed = torch.empty(1, 64), quantize(torch.zeros(70, 64), 1, 2)
    with FakeTensorMode():
        x_cuda, packed_cuda = fake(1, 64), packed_of(70, 64, 1)
        for op, by_triton in (
            (graded_linears, ops.triton_graded_linear.default),
            (quantized_linear, ops.triton_quantized_linear.default),
        ):
            assert select_kernel(op, x_cuda, packed_cuda) == by_triton
            assert select_kernel(op, fake(1, 64, dtype=torch.float64), packed_cuda) == op
            assert select_kernel(op, x, packed) == op
        # Experts, and values that are no planes.
        stack = fake(4, *packed_cuda.shape, dtype=torch.uint8)
        assert select_kernel(graded_linears, x_cuda, stack) == graded_linears
        assert select_kernel(graded_linears, x_cuda, fake(70, 64)) == graded_linears
        assert select_kernel(gather_linear, x_cuda, packed_cuda) == gather_linear


@pytest.mark.usefixtures("gpu_to_compile_for")
@torch.no_grad()
def test_inductor_sees_one_launch_that_writes_the_answer_alone() -> None:
    packed = quantize(torch.randn(70, 640), 1, 2)
    norm = torch.empty(640)

    def linear(x: Tensor, packed: Tensor, norm: Tensor, limit: Tensor) -> Tensor:
        weight = packed, None, None, 70, 2, None
        return torch.ops.popc.triton_graded_linear(x, *weight, norm, norm, limit)

    graph = traced(linear, torch.empty(1, 1, 640), packed, norm, torch.empty(1))
    (launch,) = launches(graph)
    assert launch.kwargs["tensors_to_clone"] == ["y"]
    assert {"norm", "low_norm", "threshold"} <= launch.kwargs["kwargs"].keys()
    assert launch.kwargs["kwargs"]["SPLITS"] == 5
    assert launch.kwargs["kwargs"]["y"].meta["val"].shape == (5, 1, 70)
    targets = [str(n.target) for n in graph.nodes]
    assert "aten.sum.dim_IntList" in targets
    assert not any("popc" in target for target in targets)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to try it on")
def test_inductor_writes_all_that_the_kernels_call() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.helpers.pretend_gpu", "planes"],
        env={**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    code = ran.stdout
    assert "no CUDA graphs" not in code and "torch.ops.popc" not in code
    assert len(re.findall(r"by_(?:input|output)_kernel_\d+\.run\(", code)) == 2
    # No copy of a weight, and no product but these.
    assert "extern_kernels." not in code
    sizes = re.findall(r"empty_strided_cuda\(\(([\d, ]*)\)", code)
    assert max(prod(map(int, re.findall(r"\d+", size))) for size in sizes) < 4096
    # Each kernel's source stands alone.
    sources = re.findall(r"async_compile\.triton\('by_\w+', '''(.*?)'''", code, re.DOTALL)
    helpers = [name for name in vars(triton_plane_kernels) if re.match(r"_[a-z]|[A-Z]", name)]
    assert len(sources) == 2
    for source in sources:
        used = {name for name in helpers if re.search(rf"\b{name}\b", source)}
        made = {name for name in used if re.search(rf"^(def {name}\(|{name} = )", source, re.M)}
        assert {"_tile", "_nibbles", "MIDPOINT"} <= used == made


@pytest.mark.usefixtures("gpu_to_compile_for")
@torch.no_grad()
@pytest.mark.parametrize("dim", [0, 1])
def test_a_symbolic_batch_is_decoded_and_a_symbolic_length_is_a_prompt(dim: int) -> None:
    packed = quantize(torch.randn(70, 64), 0, 2)

    def linear(x: Tensor, packed: Tensor) -> Tensor:
        return torch.ops.popc.triton_quantized_linear(x, packed, None, None, None, 70, 0, 2)

    x = torch.empty(3, 1, 64) if dim == 0 else torch.empty(1, 30, 64)
    torch._dynamo.mark_dynamic(x, dim)
    graph: Any = traced(linear, x, packed)
    (launch,) = launches(graph)
    multiplied = any("mm" in str(n.target) or "linear" in str(n.target) for n in graph.nodes)
    if dim == 0:
        assert launch.kwargs["kwargs"]["BLOCK_M"] == triton_gather.BLOCK_M and not multiplied
    else:
        assert "BLOCK_V" in launch.kwargs["kwargs"] and multiplied


def test_rows_are_read_in_the_words_that_they_are_aligned_to() -> None:
    """The launch says what unit divides every start; what is at odd bytes is copied."""
    seen = []

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, UNIT, **kwargs: seen.append((UNIT, args[1].data_ptr() % UNIT))

    for outputs, before in ((256, 0), (128, 0), (64, 0), (32, 0), (256, 2), (256, 1)):
        packed = quantize(torch.randn(outputs, 8), 1, 2)
        around = torch.nn.functional.pad(packed, (before, 16 - before))
        stored = around.narrow(1, before, packed.shape[1])
        rest = stored, None, None, None, outputs, 1, 2
        triton_planes.launch_quantized(Kernel(), Kernel(), Kernel(), torch.empty(1, 8), *rest)
    assert seen == [(16, 0), (8, 0), (4, 0), (2, 0), (2, 0), (16, 0)]


@torch.no_grad()
def test_passes_write_an_op_for_each_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton serves; with the reference in its place the graph computes the same."""

    def of_one(x: Tensor, *rest: Any) -> Tensor:
        y = graded_linears(x, *([argument] for argument in rest[:6]), *rest[6:])
        return y.view(*x.shape[:-1], rest[3])

    model, x = Three().eval(), torch.randn(3, 1, K)
    results, counts = [], []
    for served in (False, True):
        monkeypatch.setattr(triton_planes, "serves", lambda *_, served=served: served)
        captured, groups, args = found(model, x)
        rewrite_linears(captured, groups, "batch", counting=False)
        graph = captured.gm.graph
        target = torch.ops.popc.triton_graded_linear.default
        singles = graph.find_nodes(op="call_function", target=target)
        for node in singles:
            node.target = of_one
        captured.gm.recompile()
        counts.append(len(singles))
        torch.manual_seed(1)
        (_, width), outputs = segment_offsets(groups)[-1], 24
        scales = torch.ones(width), torch.full((width,), 0.5)
        limits = torch.tensor([[0.5], [-1.0]])
        fed = *scales, limits, torch.randn(1, width), torch.randn(1, outputs)
        results.append(captured.gm(*args, *fed))
    assert counts == [0, 3]
    torch.testing.assert_close(*results)

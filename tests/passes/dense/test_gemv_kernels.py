"""Stream pass: which linears popc's kernel reads in whole, and that they give what they gave."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, fx, nn

import popc
from popc.analysis.capture import capture_module
from popc.ops import gather_linear, native
from popc.passes.dense.gemv_kernels import use_gemv_kernels
from popc.planning.rewrite_plan import RewritePlan
from popc.runtime.interpreter import Interpreted
from tests.helpers.checks import assert_meta_is_true
from tests.helpers.models import tiny_llama
from tests.helpers.oracle import relative


class Two(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 24, dtype=dtype), nn.Linear(24, 8, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


def streamed(module: nn.Module, x: Tensor, decodes: bool = True) -> int:
    """How many linears are, once the graph is seen to give what the module gives."""
    captured = capture_module(module, (x,))
    done = use_gemv_kernels(captured, RewritePlan(decodes=decodes)).matches
    (y,) = assert_meta_is_true(captured.gm, module, x)
    assert relative(y, module(x).detach()) < (1e-5 if x.dtype != torch.bfloat16 else 2e-2)
    count = len(captured.gm.graph.find_nodes(op="call_function", target=gather_linear))
    assert done == count
    return count


@pytest.mark.parametrize(
    ("shape", "decodes", "expected"),
    [
        ((3, 1, 16), True, 2),
        ((3, 1, 16), False, 2),
        ((1, 16), False, 2),
        ((3, 16), True, 2),  # which axis is which does not show: the graph's kind decides
        ((3, 16), False, 0),
        ((1, 5, 16), True, 0),
        ((40, 1, 16), True, 0),
    ],
)
def test_linears_of_one_token_are(shape: tuple[int, ...], decodes: bool, expected: int) -> None:
    assert streamed(Two().eval(), torch.randn(shape), decodes) == expected


def test_types_that_the_kernel_does_not_read_are_not() -> None:
    assert streamed(Two(torch.bfloat16).eval(), torch.randn(1, 1, 16).bfloat16()) == 2
    assert streamed(Two(torch.float64).eval(), torch.randn(1, 1, 16).double()) == 0


@pytest.mark.parametrize("decodes", [False, True])
def test_transposed_16_bit_weights_always_are(decodes: bool) -> None:
    module = Two(torch.bfloat16).eval()
    module.b.weight.data = module.b.weight.data.t().contiguous().t()
    assert streamed(module, torch.randn(1, 5, 16).bfloat16(), decodes) == 1


def test_without_kernels_none_are(monkeypatch) -> None:
    monkeypatch.setattr(native, "load", lambda: False)
    assert streamed(Two().eval(), torch.randn(1, 1, 16)) == 0


@pytest.mark.parametrize(
    ("sparsity", "last"),
    [(0.4, 1), (0.0, 15)],  # what has no threshold: the head, or all of two layers too
)
def test_a_decode_step_reads_what_stays_dense_so(monkeypatch, sparsity: float, last: int) -> None:
    torch.compiler.reset()
    graphs: list[fx.Graph] = []

    def noting(gm: fx.GraphModule) -> Interpreted:
        graphs.append(gm.graph)
        return Interpreted(gm)

    def count(graph: fx.Graph, op: object) -> int:
        return len(graph.find_nodes(op="call_function", target=op))

    monkeypatch.setattr("popc.backend.Interpreted", noting)
    model = tiny_llama()
    compiled = popc.compile(model, sparsity=sparsity, codegen="eager")
    ids = torch.arange(1, 12)[None]
    with torch.no_grad():
        cache = compiled(ids, use_cache=True).past_key_values
        expected = model(ids[:, :1], past_key_values=copy.deepcopy(cache)).logits
        got = compiled(ids[:, :1], past_key_values=cache).logits
    prefill, decode = graphs
    assert not count(prefill, gather_linear)
    assert count(decode, gather_linear) == last
    assert not count(decode, torch.ops.aten.linear.default)
    if not sparsity:
        assert relative(got, expected) < 1e-5

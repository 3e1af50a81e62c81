"""A pass that fails: the graph runs dense, the user is told which it was, and so is the plan."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import popc
from popc.errors import PopcWarning
from popc.ops import native
from popc.passes import pipeline
from tests.helpers.generation import prompt, run, tokens
from tests.helpers.models import CachedAttention, Plain, tiny_llama
from tests.helpers.oracle import relative
from tests.helpers.profiles import few

# What is to fail, and what it is called in the warning; under which policy it runs.
STAGES = {
    "popc.backend.capture_dynamo": ("capture", "pop"),
    "popc.planning.rewrite_plan.find_regions": ("find regions", "pop"),
    "popc.planning.rewrite_plan.find_input_groups": ("find inputs", "threshold"),
    "popc.planning.rewrite_plan.choose": ("choose regions", "pop"),
    "popc.planning.rewrite_plan.RewritePlan.assign": ("choose work", "pop"),
    "popc.runtime.signature._batch_of": ("read the signature", "pop"),
    "popc.passes.measure_units.RegionBinding.of": ("measure_units", "pop"),
}
POLICY = {"threshold_inputs": "threshold", "measure_inputs": "threshold"}
PASSES = {one.__name__: (one.__name__, POLICY.get(one.__name__, "pop")) for one in pipeline.PASSES}
CASES = {**STAGES, **PASSES, "use_gemv_kernels ": ("use_gemv_kernels", "dense")}


@pytest.fixture(autouse=True)
def fresh(monkeypatch) -> None:
    torch.compiler.reset()
    monkeypatch.setenv("POPC_RAISE", "0")


def fail(monkeypatch, name: str) -> None:
    def failing(*_: object, **__: object) -> None:
        raise ZeroDivisionError("of no account\nat all")

    name = name.strip()
    if name in PASSES:
        failing.__name__ = name
        passes = [failing if one.__name__ == name else one for one in pipeline.PASSES]
        monkeypatch.setattr(pipeline, "PASSES", passes)
    else:
        monkeypatch.setattr(name, failing)
    if name == "pack_weights":
        monkeypatch.setattr(native, "load", lambda: False)


@pytest.mark.parametrize("name", CASES)
def test_the_graph_runs_dense_and_the_warning_names_the_pass(name: str, monkeypatch) -> None:
    model, ids = tiny_llama(), tokens()
    expected = run(copy.deepcopy(model), ids, 10)
    called, policy = CASES[name]
    fail(monkeypatch, name)
    compiled = popc.compile(model, policy=policy, sparsity=0.5, codegen="eager")
    with pytest.warns(PopcWarning, match=f"^popc: the pass '{called}' failed.*ZeroDivisionError"):
        got = run(compiled, ids, 10)
    assert relative(got, expected) < 1e-5
    plan = compiled.popc_plan
    assert not plan.regions and not plan.inputs
    assert any(skip.kind == "failed" and called in skip.reason for skip in plan.skipped)
    assert "report" in popc.report.explain.remedy(
        next(s for s in plan.skipped if s.kind == "failed")
    )


@pytest.mark.parametrize("name", few(list(CASES)[1:], 3))
def test_it_is_raised_where_that_is_asked_for(name: str, monkeypatch) -> None:
    monkeypatch.setenv("POPC_RAISE", "1")
    fail(monkeypatch, name)
    compiled = popc.compile(tiny_llama(), policy=CASES[name][1], sparsity=0.5, codegen="eager")
    with pytest.raises(Exception, match="of no account"):
        run(compiled, tokens(), 10)


def test_what_is_raised_on_purpose_reaches_the_user() -> None:
    compiled = popc.compile(tiny_llama(), bytes=0.01, targets=("mlp",), codegen="eager")
    with pytest.raises(popc.ConfigError, match="is not allowed"):
        run(compiled, tokens(), 10)


@pytest.mark.parametrize("name", ["prune_units", "use_gemv_kernels"])
def test_weights_whose_layout_changed_are_read_right(name: str, monkeypatch) -> None:
    """Generated code goes by strides, and these are others than the first trace saw."""
    model, x = Plain().eval(), torch.randn(1, 1, 16)
    expected = model(x).detach()
    fail(monkeypatch, name)
    compiled = torch.compile(model, backend="popc", options={"policy": "pop", "sparsity": 0.5})
    with torch.no_grad(), pytest.warns(PopcWarning):
        assert relative(compiled(x), expected) < 1e-5
    assert not model.c.weight.is_contiguous()


def test_a_layout_that_fails_half_way(monkeypatch) -> None:
    """What has changed by then is known to what comes after."""
    from popc.passes import weight_layout

    transpose_storage, turned = weight_layout.transpose_storage, []

    def failing(value: Tensor) -> Tensor:
        if value.device.type != "meta":
            turned.append(value.shape)
            if len(turned) > 1:
                raise MemoryError("no room")
        return transpose_storage(value)

    monkeypatch.setattr(weight_layout, "transpose_storage", failing)
    model = nn.Sequential(Plain(), nn.LayerNorm(16), Plain()).eval()
    x = torch.randn(1, 1, 16)
    expected = model(x).detach()
    compiled = torch.compile(model, backend="popc", options={"policy": "pop", "sparsity": 0.5})
    with torch.no_grad(), pytest.warns(PopcWarning, match="'store_channel_major' failed"):
        assert relative(compiled(x), expected) < 1e-5
    assert [model[i].c.weight.is_contiguous() for i in (0, 2)] == [False, True]


def test_code_that_cannot_be_generated(monkeypatch) -> None:
    """Of the rewritten graph: that of the dense one can."""
    from popc import compat

    inductor = compat.inductor

    def failing(gm, inputs, *rest):
        if any("popc" in str(node.target) for node in gm.graph.nodes if node.op == "call_function"):
            raise ZeroDivisionError
        return inductor(gm, inputs, *rest)

    monkeypatch.setattr(compat, "inductor", failing)
    model, x = Plain().eval(), torch.randn(1, 1, 16)
    compiled = torch.compile(model, backend="popc", options={"policy": "pop", "sparsity": 0.5})
    with torch.no_grad(), pytest.warns(PopcWarning, match="'generate code' failed: Zero"):
        assert relative(compiled(x), model(x)) < 1e-5


def test_the_plan_is_reported_once_the_graph_is_made(monkeypatch) -> None:
    """A prompt's graph lists what it measures; a decode step that fails takes it back for good."""
    model, ids = tiny_llama(), tokens()
    compiled = popc.compile(model, policy="pop", sparsity=0.5, codegen="eager")
    with torch.no_grad():
        compiled(ids)
        listed = {region.key for region in compiled.popc_plan.regions}
        assert listed and not any(s.kind == "failed" for s in compiled.popc_plan.skipped)
        with monkeypatch.context() as patched:
            fail(patched, "prune_units")
            with pytest.warns(PopcWarning, match="prune_units"):
                run(compiled, ids, 10)
        assert not compiled.popc_plan.regions
        assert {s.key for s in compiled.popc_plan.skipped if s.kind == "failed"} >= listed
        compiled(prompt(0, 21))  # of another length, and so another graph
    assert not compiled.popc_plan.regions


def test_a_graph_that_is_not_traced_is_in_the_plan(monkeypatch) -> None:
    def refusing(*_: object) -> None:
        raise popc.GraphError("an op is not known")

    monkeypatch.setattr("popc.backend.capture_dynamo", refusing)
    compiled, x = popc.compile(CachedAttention().eval(), codegen="eager"), torch.randn(1, 5, 16)
    with torch.no_grad(), pytest.warns(UserWarning, match="nothing to prune"):
        compiled(x)
    (skip,) = compiled.popc_plan.skipped
    assert (skip.kind, skip.reason) == ("capture", "an op is not known")

"""A pass that fails: the graph runs dense, the user is told which it was, and so is the plan."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import popc
from popc.errors import PopcWarning
from popc.ops import native
from tests.helpers.generation import prompt, run, tokens
from tests.helpers.models import CachedAttention, Plain, tiny_llama
from tests.helpers.oracle import relative
from tests.helpers.profiles import few

# What is to fail, and what it is called in the warning; under which policy it runs.
PASSES = {
    "popc.backend.capture_dynamo": ("capture", "pop"),
    "popc.backend.find_regions": ("find regions", "pop"),
    "popc.backend.find_input_groups": ("find inputs", "threshold"),
    "popc.backend.store_channel_major": ("lay out weights", "pop"),
    "popc.backend._work": ("choose work", "pop"),
    "popc.runtime.compiled_graph.threshold_inputs": ("contract inputs", "threshold"),
    "popc.runtime.compiled_graph.measure_input_groups": ("measure inputs", "threshold"),
    "popc.runtime.compiled_graph.measure_units": ("measure regions", "pop"),
    "popc.runtime.compiled_graph.prune_units": ("prune regions", "pop"),
    "popc.runtime.compiled_graph.pack_weights": ("pack weights", "pop"),
    "popc.runtime.compiled_graph.RegionBinding.of": ("construct", "pop"),
    "popc.runtime.compiled_graph._batch_of": ("construct", "pop"),
    "popc.passes.dense.pipeline.fold_repeat_kv": ("share heads", "pop"),
    "popc.passes.dense.pipeline.hoist_masks": ("share masks", "pop"),
    "popc.passes.dense.pipeline.use_gemv_kernels": ("stream linears", "threshold"),
    "popc.passes.dense.pipeline.use_gemv_kernels ": ("stream linears", "dense"),
}


@pytest.fixture(autouse=True)
def fresh(monkeypatch) -> None:
    torch.compiler.reset()
    monkeypatch.setenv("POPC_RAISE", "0")


def fail(monkeypatch, name: str) -> None:
    def failing(*_: object, **__: object) -> None:
        raise ZeroDivisionError("of no account\nat all")

    monkeypatch.setattr(name.strip(), failing)
    if "pack_weights" in name:
        monkeypatch.setattr(native, "load", lambda: False)


@pytest.mark.parametrize("name", PASSES)
def test_the_graph_runs_dense_and_the_warning_names_the_pass(name: str, monkeypatch) -> None:
    model, ids = tiny_llama(), tokens()
    expected = run(copy.deepcopy(model), ids, 10)
    called, policy = PASSES[name]
    fail(monkeypatch, name)
    twin = popc.compile(model, policy=policy, sparsity=0.5, codegen="eager")
    with pytest.warns(PopcWarning, match=f"^popc: the pass '{called}' failed.*ZeroDivisionError"):
        got = run(twin, ids, 10)
    assert relative(got, expected) < 1e-5
    plan = twin.popc_plan
    assert not plan.regions and not plan.inputs
    assert any(skip.kind == "failed" and called in skip.reason for skip in plan.skipped)
    assert "report" in popc.report.explain.remedy(
        next(s for s in plan.skipped if s.kind == "failed")
    )


@pytest.mark.parametrize("name", few(list(PASSES)[1:], 3))
def test_it_is_raised_where_that_is_asked_for(name: str, monkeypatch) -> None:
    monkeypatch.setenv("POPC_RAISE", "1")
    fail(monkeypatch, name)
    twin = popc.compile(tiny_llama(), policy=PASSES[name][1], sparsity=0.5, codegen="eager")
    with pytest.raises(Exception, match="of no account"):
        run(twin, tokens(), 10)


def test_what_is_raised_on_purpose_reaches_the_user() -> None:
    twin = popc.compile(tiny_llama(), bytes=0.01, targets=("mlp",), codegen="eager")
    with pytest.raises(popc.ConfigError, match="is not allowed"):
        run(twin, tokens(), 10)


@pytest.mark.parametrize(
    "name",
    ["popc.runtime.compiled_graph.prune_units", "popc.runtime.compiled_graph.run_dense_passes"],
)
def test_weights_that_were_laid_out_are_read_right(name: str, monkeypatch) -> None:
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

    turn, turned = weight_layout.turn, []

    def failing(value: Tensor) -> Tensor:
        if value.device.type != "meta":
            turned.append(value.shape)
            if len(turned) > 1:
                raise MemoryError("no room")
        return turn(value)

    monkeypatch.setattr(weight_layout, "turn", failing)
    model = nn.Sequential(Plain(), nn.LayerNorm(16), Plain()).eval()
    x = torch.randn(1, 1, 16)
    expected = model(x).detach()
    compiled = torch.compile(model, backend="popc", options={"policy": "pop", "sparsity": 0.5})
    with torch.no_grad(), pytest.warns(PopcWarning, match="'lay out weights' failed"):
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


def test_the_plan_is_told_once_the_graph_is_made(monkeypatch) -> None:
    """A prompt's graph lists what it measures; a decode step that fails takes it back for good."""
    model, ids = tiny_llama(), tokens()
    twin = popc.compile(model, policy="pop", sparsity=0.5, codegen="eager")
    with torch.no_grad():
        twin(ids)
        listed = {region.key for region in twin.popc_plan.regions}
        assert listed and not any(s.kind == "failed" for s in twin.popc_plan.skipped)
        with monkeypatch.context() as patched:
            fail(patched, "popc.runtime.compiled_graph.prune_units")
            with pytest.warns(PopcWarning, match="prune regions"):
                run(twin, ids, 10)
        assert not twin.popc_plan.regions
        assert {s.key for s in twin.popc_plan.skipped if s.kind == "failed"} >= listed
        twin(prompt(0, 21))  # of another length, and so another graph
    assert not twin.popc_plan.regions


def test_a_graph_that_is_not_traced_is_in_the_plan(monkeypatch) -> None:
    def refusing(*_: object) -> None:
        raise popc.GraphError("an op is not known")

    monkeypatch.setattr("popc.backend.capture_dynamo", refusing)
    twin, x = popc.compile(CachedAttention().eval(), codegen="eager"), torch.randn(1, 5, 16)
    with torch.no_grad(), pytest.warns(UserWarning, match="nothing to prune"):
        twin(x)
    (skip,) = twin.popc_plan.skipped
    assert (skip.kind, skip.reason) == ("capture", "an op is not known")

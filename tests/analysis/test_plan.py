"""A plan is data: it leads to no graph, keeps none, and goes through pickle, copies and JSON."""

from __future__ import annotations

import ast
import copy
import gc
import json
import pickle
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import popc
from popc import api, backend, testing
from popc.analysis import plan as plan_module
from popc.analysis.capture import Captured
from tests.helpers.forms import ATTENTIONS, D, Experts
from tests.helpers.models import Gated, Leaks, Softmaxed, tiny_llama

CONFIG = popc.Config(policy="pop", sparsity=0.5, targets=("mlp", "attention", "experts"))
IDS = torch.arange(6)[None]


class Parts(nn.Module):
    """Weights that are parts of one parameter, and a piece that breaks the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.back = nn.Parameter(torch.randn(80, 16)), nn.Linear(40, 16)
        self.blocks = nn.ModuleList(Gated() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.both.chunk(2)
        x = x + self.back((x @ first.t()).relu() * (x @ second.t()))
        torch._dynamo.graph_break()
        x = x + self.blocks[0](x)
        torch._dynamo.graph_break()
        return x + self.blocks[1](x)


def values(*sizes: int) -> tuple[Tensor]:
    return (torch.randn(*sizes),)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "llama": (tiny_llama, (IDS,)),
    "attention": (ATTENTIONS["grouped sdpa"][0], values(2, 6, D)),
    "experts": (lambda: Experts("picked"), values(1, 3, D)),
    "parts": (Parts, values(1, 3, 16)),
    "leaks": (Leaks, values(1, 3, 16)),
    "softmaxed": (Softmaxed, values(1, 3, 16)),
}
GRAPHS = (fx.Node, fx.Graph, fx.GraphModule, Tensor, nn.Module, torch.SymInt, Captured)


def reached(start: object) -> list[object]:
    """All objects that ``start`` leads to; not what classes, modules and functions hold."""
    ends = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)
    seen: dict[int, object] = {id(start): start}
    queue = [start]
    while queue:
        for other in gc.get_referents(queue.pop()):
            if id(other) not in seen and not isinstance(other, ends):
                seen[id(other)] = other
                queue.append(other)
    return list(seen.values())


def check_data(plan: popc.Plan) -> None:
    values = reached(plan)
    assert any(isinstance(value, str | int) for value in values)
    assert not [value for value in values if isinstance(value, GRAPHS)]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """Of each graph that is captured: weak references to the module and to the graph."""
    references: list[weakref.ref[Any]] = []

    def noting(capture: Callable[..., Captured]) -> Callable[..., Captured]:
        def noted(*args: Any) -> Captured:
            captured = capture(*args)
            references.extend((weakref.ref(captured.gm), weakref.ref(captured.gm.graph)))
            return captured

        return noted

    for module in (api, backend):
        monkeypatch.setattr(module, "capture_dynamo", noting(module.capture_dynamo))
    monkeypatch.setattr(api, "capture_module", noting(api.capture_module))
    return references


def test_a_walk_finds_what_a_plan_must_not_hold() -> None:
    """The walk itself: a node within a record would be seen."""
    plan = popc.Plan(skipped=[popc.Skipped("a", "b", key=({"c": fx.Graph().placeholder("x")},))])
    with pytest.raises(AssertionError):
        check_data(plan)


@pytest.mark.parametrize("name", MODELS)
def test_analyze_keeps_no_graph(name: str, graphs: list[weakref.ref[Any]]) -> None:
    torch._dynamo.reset()
    make, args = MODELS[name]
    model = make()
    plan = popc.analyze(model, args)
    assert plan.regions or plan.skipped
    assert bool(plan.breaks) == (name == "parts")
    check_data(plan)
    gc.collect()
    assert graphs and not any(reference() is not None for reference in graphs)


@pytest.mark.parametrize("front_end", ["fx", "export"])
def test_analyze_of_a_graph_keeps_none_of_its_own(
    front_end: str, graphs: list[weakref.ref[Any]]
) -> None:
    module, args = Gated(), values(1, 3, 16)
    traced: Any = fx.symbolic_trace(module)
    if front_end == "export":
        traced = torch.export.export(module, args)
    plan = popc.analyze(traced, args)
    assert plan.count("mlp") == 1
    check_data(plan)
    gc.collect()
    assert graphs and not any(reference() is not None for reference in graphs)


@pytest.mark.parametrize("policy", ["pop", "threshold", "staged"])
def test_the_plan_of_a_compiled_model_keeps_no_graph(
    policy: str, graphs: list[weakref.ref[Any]]
) -> None:
    torch._dynamo.reset()
    compiled: Any = popc.compile(tiny_llama(), policy=policy, codegen="eager")
    compiled.generate(IDS, max_new_tokens=3, do_sample=False)
    plan = compiled.popc_plan
    assert plan.regions if policy != "threshold" else plan.inputs
    check_data(plan)
    del compiled
    torch._dynamo.reset()
    gc.collect()
    assert graphs and not any(reference() is not None for reference in graphs)


def test_what_on_plan_receives_is_data() -> None:
    torch._dynamo.reset()
    plans: list[popc.Plan] = []
    model, args = MODELS["attention"][0](), MODELS["attention"][1]
    options = {"policy": "pop", "targets": ("attention",), "codegen": "eager"}

    def run(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        return backend.popc_backend(gm, inputs, options=options, on_plan=plans.append)

    with torch.no_grad():
        torch.compile(model, backend=run)(*args)
    assert any(plan.regions for plan in plans)
    for plan in plans:
        check_data(plan)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_a_copy_says_the_same(name: str, how: str) -> None:
    torch._dynamo.reset()
    make, args = MODELS[name]
    model = make().eval()
    plan = popc.analyze(model, args)
    copied = pickle.loads(pickle.dumps(plan)) if how == "pickle" else copy.deepcopy(plan)
    assert copied is not plan and copied.to_dict() == plan.to_dict()
    assert [r.key for r in copied.regions] == [r.key for r in plan.regions]
    assert str(copied) == str(plan)
    assert copied.cost(B=2, T=3, S=9, config=CONFIG) == plan.cost(B=2, T=3, S=9, config=CONFIG)
    assert copied.decode_share(CONFIG) == plan.decode_share(CONFIG)
    assert copied.read_share(CONFIG) == plan.read_share(CONFIG)


def test_the_oracle_takes_a_copy() -> None:
    """Parts of parameters are found again by what a record says of them."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, (x,) = Parts().eval(), MODELS["parts"][1]
    plan = pickle.loads(pickle.dumps(popc.analyze(model, (x,))))
    (region,) = [r for r in plan.regions if "back" in r.consumers[0].name]
    active = torch.arange(40) % 3 == 0
    with torch.no_grad():
        first, second = (x @ part.T for part in model.both.chunk(2))
        y = x + model.back(first.relu() * second * active)
        for block in model.blocks:
            y = y + block(y)
    got = testing.masked_dense(model, plan, {region.key: active})(x)
    torch.testing.assert_close(got, y)


def test_as_a_dict_it_is_json() -> None:
    torch._dynamo.reset()
    plan = popc.analyze(tiny_llama(), (IDS,))
    plan.breaks.append("a call of print")
    data = json.loads(json.dumps(plan.to_dict()))
    assert list(data) == ["regions", "inputs", "skipped", "breaks"]
    region, record = data["regions"][1], plan.regions[1]
    assert (region["kind"], region["units"], region["width"]) == ("mlp", 160, 160)
    assert (region["experts"], region["one_pass"], region["cached"]) == (0, False, False)
    assert region["weight_bytes"] == 4 * region["parameters"] == 3 * 160 * 64 * 4
    assert (region["name"], region["source"]) == (record.name, record.source)
    linears = [*region["producers"], *region["consumers"]]
    assert [(linear["inputs"], linear["outputs"]) for linear in linears] == [
        (64, 160),
        (64, 160),
        (160, 64),
    ]
    assert {linear["op"] for linear in linears} == {"aten.linear.default"}
    assert linears[2]["name"] == "model.layers.0.mlp.down_proj"
    assert [group["kind"] for group in data["inputs"]] == [group.kind for group in plan.inputs]
    assert len(data["inputs"][0]["linears"]) == 3
    assert [skip["reason"] for skip in data["skipped"]] == [skip.reason for skip in plan.skipped]
    assert data["skipped"] and all(skip["weight_bytes"] > 0 for skip in data["skipped"])
    assert data["breaks"] == ["a call of print"]
    assert "key" not in json.dumps(data).replace("keys", "")


def test_the_plan_imports_no_tables_and_no_costs() -> None:
    tree = ast.parse(Path(plan_module.__file__).read_text(encoding="utf-8"))
    imported = [
        alias.name if isinstance(node, ast.Import) else node.module or ""
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    ]
    assert "popc.config" in imported
    assert not [name for name in imported if name.split(".")[0] in ("rich", "sympy", "torch")]


def test_the_regions_of_a_plan_are_regions() -> None:
    plan = popc.analyze(Gated(), values(1, 3, 16))
    assert all(isinstance(region, popc.Region) for region in plan.regions)
    assert all(isinstance(skip, popc.Skipped) for skip in plan.skipped)

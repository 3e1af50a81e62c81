"""Rules that users register for ops of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import popc
from popc.analysis.labels import LabeledValue
from popc.analysis.propagation import shape
from popc.analysis.rules.traits import Trait, has
from popc.errors import PopcWarning
from popc.testing import EquivalenceError, assert_equivalent
from tests.helpers.generation import prompt, run, tokens
from tests.helpers.models import tiny_llama
from tests.helpers.oracle import relative


@torch.library.custom_op("popc_test::swiglu", mutates_args=())
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


@swiglu.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


@torch.library.custom_op("popc_test::silu_and_mul", mutates_args=())
def silu_and_mul(packed: Tensor) -> Tensor:
    gate, up = packed.chunk(2, -1)
    return F.silu(gate) * up


@silu_and_mul.register_fake
def _(packed: Tensor) -> Tensor:
    return packed.new_empty(*packed.shape[:-1], packed.shape[-1] // 2)


@torch.library.custom_op("popc_test::scaled", mutates_args=())
def scaled(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight


@scaled.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("popc_test::normed", mutates_args=())
def normed(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


@normed.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


OPS = {"swiglu": swiglu, "silu_and_mul": silu_and_mul, "scaled": scaled, "normed": normed}


@pytest.fixture(autouse=True)
def nothing_registered() -> Iterator[None]:
    torch.compiler.reset()
    yield
    for op in OPS.values():
        popc.register_rule(op, None)


class MLP(nn.Module):
    """Two linears, an op of the user's, a linear; 80 channels."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.gate, self.up, self.down = nn.Linear(64, 80), nn.Linear(64, 80), nn.Linear(80, 64)
        self.weight = nn.Parameter(torch.randn(80))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate(x), self.up(x)
        if self.name == "swiglu":
            return self.down(swiglu(gate, up))
        if self.name == "silu_and_mul":
            return self.down(silu_and_mul(torch.cat([gate, up], -1)))
        if self.name == "scaled":
            return self.down(scaled(F.silu(gate), self.weight))
        return self.down(F.silu(gate) * normed(up))


def llama(name: str) -> nn.Module:
    model = tiny_llama()  # it seeds torch's generator
    for layer in model.model.layers:
        layer.mlp = MLP(name)
    return model


OPTIONS = {"policy": "pop", "sparsity": 0.5, "targets": ("mlp",), "codegen": "eager"}


@pytest.mark.parametrize(
    ("name", "rule"), [("swiglu", "pointwise"), ("silu_and_mul", "glu"), ("scaled", "same")]
)
def test_an_mlp_is_prunable_once_its_op_has_a_rule(name: str, rule: str) -> None:
    model = llama(name)
    before = popc.analyze(model, (prompt(0, 9),))
    assert before.count("mlp") == 0
    assert any(s.kind == "unknown op" and "popc_test" in s.op for s in before.skipped)
    popc.register_rule(OPS[name], rule)
    result = assert_equivalent(model, prompt(2, 20), **OPTIONS)
    assert [r.units for r in result.plan.regions if r.kind == "mlp"] == [80, 80]
    assert result.masked > 0
    popc.register_rule(OPS[name], None)
    torch.compiler.reset()
    assert popc.analyze(model, (prompt(0, 9),)).count("mlp") == 0


def test_the_oracle_shows_that_a_rule_is_wrong() -> None:
    popc.register_rule(normed, "pointwise")
    with pytest.raises(EquivalenceError, match="differs by"):
        assert_equivalent(llama("normed"), prompt(2, 20), **OPTIONS)


def test_a_norm_is_refused_for_what_it_mixes() -> None:
    popc.register_rule(normed, "last_dim", traits="rowwise")
    plan = popc.analyze(llama("normed"), (prompt(0, 9),))
    assert plan.count("mlp") == 0
    assert any("normed.default mixes channels" in skip.reason for skip in plan.skipped)
    op = torch.ops.popc_test.normed.default
    assert has(op, Trait.ROWWISE) and not has(op, Trait.POINTWISE)
    popc.register_rule(normed, "last_dim")
    assert not has(op, Trait.ROWWISE)


def test_a_rule_of_ones_own() -> None:
    """The last registered holds; ops are named in any of three ways."""
    popc.register_rule(torch.ops.popc_test.scaled, "last_dim")
    popc.register_rule(torch.ops.popc_test.scaled.default, lambda p, node: p.of(node.args[0]))
    plan = popc.analyze(llama("scaled"), (prompt(0, 9),))
    assert plan.count("mlp") == 2


def test_an_op_that_torch_knows_to_be_pointwise_needs_no_rule() -> None:
    @torch.library.custom_op("popc_test::double", mutates_args=(), tags=(torch.Tag.pointwise,))
    def double(x: Tensor) -> Tensor:
        return 2 * x

    assert has(torch.ops.popc_test.double.default, Trait.POINTWISE)


def failing(propagation, node) -> LabeledValue:
    raise ZeroDivisionError("of no account")


def misfit(propagation, node) -> LabeledValue:
    return propagation.of(node.args[0]).unsqueezed(len(shape(node)))


@pytest.mark.parametrize("rule", [failing, misfit, lambda p, node: 3])
def test_a_rule_that_fails_leaves_the_graph_dense(rule, monkeypatch) -> None:
    model, ids = llama("swiglu"), tokens()
    popc.register_rule(swiglu, rule)
    compiled = popc.compile(model, **OPTIONS)
    said = "swiglu.default (failed: ZeroDivisionError: of no account|gave labels that do not fit)"
    with pytest.raises(Exception, match=f"RuleError.*{said}"):
        run(compiled, ids, 10)
    monkeypatch.setenv("POPC_RAISE", "0")
    torch.compiler.reset()
    compiled = popc.compile(model, **OPTIONS)
    with pytest.warns(PopcWarning, match=f"'find regions' failed: RuleError.*{said}"):
        got = run(compiled, ids, 10)
    assert relative(got, run(model, ids, 10)) < 1e-5
    assert not compiled.popc_plan.regions
    with pytest.raises(popc.ModelError, match=said):  # one who looks at the plan wants to know
        popc.analyze(model, (ids,))


@pytest.mark.parametrize(
    ("op", "rule", "traits", "said"),
    [
        (F.silu, "pointwise", (), "op=.*torch.library.custom_op"),
        (torch.ops.aten.softmax, "pointwise", (), "no rule of its own"),
        (torch.ops.aten.mul.Tensor, "same", (), "no rule of its own"),
        (torch.ops.aten.embedding, None, (), "no rule of its own"),
        (torch.ops.popc.gather_linear, None, (), "no rule of its own"),
        (torch.ops.aten._grouped_mm, "same", (), "no rule of its own"),
        (swiglu, "elementwise", (), "rule='elementwise'.*'pointwise'"),
        (swiglu, 3, (), "rule=3.*a function"),
        (swiglu, "pointwise", ("viewed",), "traits='viewed'.*'rowwise'"),
    ],
)
def test_what_is_wrong_is_refused(op, rule, traits, said: str) -> None:
    with pytest.raises(popc.ConfigError, match=said):
        popc.register_rule(op, rule, traits)
    plan = popc.analyze(llama("swiglu"), (prompt(0, 9),))
    assert plan.count("mlp") == 0

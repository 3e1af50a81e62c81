"""The means to find faults find them: a popc that is made wrong on purpose is told so."""

from __future__ import annotations

import warnings

import pytest
import torch

import popc
from popc import testing
from popc.passes import region_binding
from popc.sessions import units
from popc.testing import MLP, Attention, EquivalenceError, Layer, Prompt, Transformer

SPEC = Transformer(
    layers=(
        Layer(block=MLP(channels=12)),
        Layer(attention=Attention(kv_heads=3), block=MLP(channels=16, gated=False)),
    )
)
INPUTS = Prompt((5, 5)).inputs(SPEC.vocabulary)
POP = {"policy": "pop", "sparsity": 0.5, "candidate": 0.3, "codegen": "eager"}


def check(**options: object) -> testing.Equivalence:
    return testing.assert_equivalent(SPEC.make(), INPUTS, **{**POP, **options})


def test_what_is_right_passes() -> None:
    for options in ({}, {"policy": "threshold"}, {"scope": "sequence"}):
        result = check(**options)
        assert result.decided and result.masked > 0 and result.error < 1e-6
    assert check(policy="dense").masked == 0


def test_a_wrong_choice_is_named(monkeypatch) -> None:
    """In the second MLP alone, the least important units are kept."""
    right = units.split

    def wrong(sums, region, living=None):
        index, norm = right(sums, region, living)
        if len(region.columns) == 16:
            index = (15 - index.flip(-1)).contiguous()
        return index, norm

    monkeypatch.setattr(units, "split", wrong)
    with pytest.raises(EquivalenceError, match=r"the output differs by") as caught:
        check()
    said = str(caught.value)
    assert "the first that differs, in call 1: layers.1.block (mlp" in said
    script = said.split("To reproduce it:")[1]
    names: dict[str, object] = {}
    with pytest.raises(EquivalenceError):
        exec(script, names)
    monkeypatch.setattr(units, "split", right)
    torch.compiler.reset()
    exec(script, names)


def test_a_wrong_threshold_is_named(monkeypatch) -> None:
    """One linear's norms are another's."""
    right = region_binding.InputGroupBinding.scales

    def wrong(self, args, policy):
        norm, low_norm = right(self, args, policy)
        return (norm.flip(0) if self.group.width == 16 else norm), low_norm

    monkeypatch.setattr(region_binding.InputGroupBinding, "scales", wrong)
    with pytest.raises(EquivalenceError, match=r"layers\.1\.block"):
        check(policy="threshold")


def test_near_ties_are_not_decided() -> None:
    """Two units that are equal but for the last bits of float64."""
    model = SPEC.make()
    with torch.no_grad():
        for layer in model.layers:
            for linear in layer.block.children():
                if linear is layer.block.down:
                    linear.weight[:, 1::2] = linear.weight[:, ::2] * (1 + 1e-9)
                else:
                    linear.weight[1::2] = linear.weight[::2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = testing.assert_equivalent(
            model, INPUTS, sparsity=0.45, candidate=0.5, policy="pop", codegen="eager"
        )
    assert result.margin < 1e-6 and (result.decided or result.error > 0)


def test_what_the_oracle_does_not_cover_is_refused() -> None:
    for policy in ("staged", "flap"):
        with pytest.raises(popc.ConfigError, match=policy):
            check(policy=policy, targets=("mlp",))


class Firing(popc.UnitPolicy):
    """Of one's own: how often a channel was positive; a token re-chooses among the middle ones."""

    name = "firing"

    def counts(self, units: int, sparsity: float, candidate: float) -> popc.Counts:
        active = round((1 - sparsity) * units)
        return popc.Counts(active - 2, min(4, units - active + 2), active)

    def measured(self, emit, h):
        positive = emit.call(torch.ops.aten.gt.Scalar, h, 0.1)
        return emit.call(torch.ops.aten.to.dtype, positive, torch.float32)

    def importance(self, squares, norm, *more):
        return squares * norm

    def scale(self, norm, *squares):
        return norm * (1 + squares[0])


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("policy", ["griffin", "firing"])
def test_other_policies_of_units_choose_by_their_methods(policy: str, scope: str) -> None:
    popc.register_policy(Firing())
    assert check(policy=policy, scope=scope).masked > 0


def test_a_policy_that_is_applied_otherwise_is_caught(monkeypatch) -> None:
    """Its scale is not what the compiled model scores with."""
    popc.register_policy(Firing())
    right = units.split

    def wrong(sums, region, living=None):
        index, norm = right(sums, region, living)
        return index, torch.rand_like(norm)

    monkeypatch.setattr(units, "split", wrong)
    with pytest.raises(EquivalenceError):
        check(policy="firing")


def test_masked_dense() -> None:
    model = SPEC.make()
    plan = popc.analyze(model, (), INPUTS)
    mlps = [region for region in plan.regions if region.kind == "mlp"]
    assert [region.units for region in mlps] == [12, 16]
    whole = testing.masked_dense(model, plan, {r.key: torch.ones(r.units).bool() for r in mlps})
    dense = model(**INPUTS).logits
    assert torch.equal(whole(**INPUTS).logits, dense)
    none = {region.key: torch.zeros(region.units).bool() for region in mlps}
    without = testing.masked_dense(model, plan, none)(**INPUTS).logits
    for layer in model.layers:
        torch.nn.init.zeros_(layer.block.down.weight)
    assert testing.relative(without, model(**INPUTS).logits) < 1e-12
    assert testing.relative(without, dense) > 1e-2

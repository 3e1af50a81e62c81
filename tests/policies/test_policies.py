"""Policies beside POP, each against an eager model that masks by hand what it leaves out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig

import popc
from popc import policies, sessions
from popc.compat import cache_keyword
from popc.planning.cost import B, T, region_cost
from popc.planning.reads import decode_bytes
from tests.helpers.models import tiny_llama
from tests.helpers.oracle import relative
from tests.helpers.profiles import few

pytestmark = pytest.mark.usefixtures("fresh_compiler")

PROMPT = 16


def tokens(batch: int = 1, length: int = 24, seed: int = 3) -> Tensor:
    return torch.randint(96, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def decoded(model: nn.Module, ids: Tensor) -> Tensor:
    options = {cache_keyword(tiny_llama().forward): DynamicCache()}
    logits = [model(ids[:, :PROMPT], use_cache=True, **options).logits[:, -1:]]
    for at in range(PROMPT, ids.shape[1]):
        logits.append(model(ids[:, at : at + 1], use_cache=True, **options).logits)
    return torch.cat(logits, 1)


class ByHand:
    """Masks h of each MLP of a llama, and what it adds: ``choose(layer, g, u) -> kept``."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.prompt: list[tuple[Tensor, Tensor]] = []
        for i, layer in enumerate(model.model.layers):
            layer.mlp.forward = self._forward(i, layer.mlp)

    def _forward(self, i: int, mlp: nn.Module):
        def forward(x: Tensor) -> Tensor:
            g, u = mlp.act_fn(mlp.gate_proj(x)), mlp.up_proj(x)
            if x.shape[1] > 1:
                self.measure(i, g, u)
                return mlp.down_proj(g * u)
            kept, rest = self.choose(i, g, u, mlp.down_proj.weight.norm(dim=0))
            return mlp.down_proj(torch.where(kept, g * u, rest))

        return forward

    def measure(self, i: int, g: Tensor, u: Tensor) -> None:
        self.prompt[i:] = [(g, u)]


def largest(score: Tensor, count: int) -> Tensor:
    order = score.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, order[..., :count], True)


class StagedByHand(ByHand):
    def __init__(self, model: nn.Module, active: int, live: int) -> None:
        super().__init__(model)
        self.active, self.live = active, live

    def choose(self, i: int, g: Tensor, u: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        prompt_g, prompt_u = self.prompt[i]
        alive = largest((prompt_g * prompt_u).norm(dim=1) * norm, self.live)[:, None]
        score = (g.abs() * norm * prompt_u.norm(dim=1)[:, None]).masked_fill(~alive, -1)
        return largest(score, self.active), torch.zeros(())


class StaticByHand(ByHand):
    """By a text given beforehand, ``[n, T]`` ids a batch: by norm, or by variance with its mean."""

    def __init__(self, model: nn.Module, active: int, batches: list[Tensor], mean: bool) -> None:
        super().__init__(model)
        self.active, self.mean = active, mean
        self.seen: dict[int, list[Tensor]] = {}
        with torch.no_grad():
            for batch in batches:
                model(batch, use_cache=False)
        self.text = {i: torch.cat(parts).double() for i, parts in self.seen.items()}

    def measure(self, i: int, g: Tensor, u: Tensor) -> None:
        self.seen.setdefault(i, []).append((g * u).flatten(0, 1))

    def choose(self, i: int, g: Tensor, u: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        h = self.text[i]
        if not self.mean:
            return largest(h.norm(dim=0) * norm, self.active), torch.zeros(())
        score = h.var(dim=0, unbiased=False) * norm.square()
        return largest(score, self.active), h.mean(0).float()


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize(("policy", "pruned"), [("staged", 0.0), ("staged_pruned", 0.1)])
@pytest.mark.parametrize("codegen", few(["eager", "inductor"], 1))
def test_staged_is_the_oracle(policy: str, pruned: float, scope: str, codegen: str) -> None:
    model = tiny_llama()
    units = model.config.intermediate_size
    active, live = round(0.4 * units), units - round(pruned * units)
    ids = tokens(1 if scope == "batch" else 2)
    expected = decoded(StagedByHand(copy.deepcopy(model), active, live).model, ids)
    dense = decoded(copy.deepcopy(model), ids)
    compiled = popc.compile(model, policy=policy, sparsity=0.6, scope=scope, codegen=codegen)
    got = decoded(compiled, ids)
    assert relative(got, expected) < 1e-4
    assert relative(got, dense) > 1e-3
    assert not [skip for skip in compiled.popc_plan.skipped if skip.kind == "policy"]


def test_staged_reads_what_the_plan_says() -> None:
    """Of gate every row, of up and down the active channels'."""
    plan = popc.analyze(tiny_llama())
    (region, *_) = (r for r in plan.regions if r.kind == "mlp")
    config = popc.Config(policy="staged", sparsity=0.6)
    active = config.counts(region.units).active / region.units
    assert decode_bytes(region, config) == pytest.approx(region.weight_bytes * (1 + 2 * active) / 3)
    dense, pruned = plan.cost(B=1, T=1, S=64, config=config).rows[-1][2:4]
    shorter = popc.Config(policy="griffin", sparsity=0.6)
    assert plan.cost(B=1, T=1, S=64, config=shorter).rows[-1][3].bytes < pruned.bytes < dense.bytes


@pytest.mark.parametrize("name", ["pop", "griffin", "staged", "staged_pruned", "wanda_sp", "flap"])
def test_the_formula_is_what_the_plan_reads(name: str) -> None:
    (region, *_) = (r for r in popc.analyze(tiny_llama()).regions if r.kind == "mlp")
    config = popc.Config(policy=name, sparsity=0.4)
    weights = region_cost(region, config).pruned.weights.subs({B: 1, T: 1})
    assert float(weights) == pytest.approx(decode_bytes(region, config))
    counts = config.counts(region.units)
    assert 0 <= counts.retained <= counts.active <= counts.live <= region.units
    assert counts.active == round(0.6 * region.units)


def test_without_a_gate_it_is_refused() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(x)))

    model, x = Plain().eval(), torch.randn(1, 4, 16)
    compiled = popc.compile(model, policy="staged", sparsity=0.5, codegen="eager")
    with torch.no_grad(), pytest.warns(UserWarning, match="nothing to prune"):
        compiled(x)
    (refused,) = {skip.reason for skip in compiled.popc_plan.skipped if skip.kind == "policy"}
    assert refused == "staged: its channels are no product of a gate's and another linear's"
    plan = popc.analyze(model, (x,))
    assert plan.read_share(compiled.popc_config) < 1  # who only looks at the model can't know
    assert plan.read_share(compiled.popc_config, pruned=compiled.popc_plan) == 1


def test_the_factor_with_the_activation_is_the_gate() -> None:
    """Also where it stands second, and the other linear runs first."""

    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(16, 64, bias=False), nn.Linear(16, 64)
            self.down = nn.Linear(64, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.one(x) * torch.sigmoid(self.two(x)) * 0.5)

    torch.manual_seed(0)
    model, x = Swapped().eval(), torch.randn(1, 12, 16)
    options = {"policy": "staged", "sparsity": 0.5, "codegen": "eager"}
    compiled = torch.compile(copy.deepcopy(model), backend="popc", options=options)
    with torch.no_grad(), sessions.use(sessions.Session()):
        compiled(x[:, :8])
        got = [compiled(x[:, at : at + 1]) for at in range(8, 12)]
        norm, rms = model.down.weight.norm(dim=0), model.one(x[:, :8]).norm(dim=1)
        for y, token in zip(got, x[:, 8:].split(1, 1), strict=True):
            first, gate = model.one(token), torch.sigmoid(model.two(token))
            kept = largest(gate * norm * rms, 32)
            assert relative(y, model.down(first * gate * 0.5 * kept)) < 1e-5
    plan = popc.analyze(model, (x,))
    (region,) = plan.regions
    assert region.late == 0


@pytest.mark.parametrize(
    ("policy", "scope"),
    few(
        [("flap", "sequence"), ("wanda_sp", "batch"), ("flap", "batch"), ("wanda_sp", "sequence")],
        2,
    ),
)
def test_a_calibration_text_decides(policy: str, scope: str) -> None:
    model = tiny_llama()
    batches = [tokens(2, 20, seed=5), tokens(2, 20, seed=6)]
    active = round(0.6 * model.config.intermediate_size)
    by_hand = StaticByHand(copy.deepcopy(model), active, batches, mean=policy == "flap")
    ids = tokens(2)
    expected = decoded(by_hand.model, ids)
    dense = decoded(copy.deepcopy(model), ids)
    options = {"policy": policy, "sparsity": 0.4, "scope": scope, "codegen": "eager"}
    compiled = popc.compile(model, **options, calibration=[{"input_ids": b} for b in batches])
    first = decoded(compiled, ids)
    assert relative(first, expected) < 1e-4
    assert relative(first, dense) > 1e-3
    # Another prompt changes nothing: its mask was fixed.
    assert relative(decoded(compiled, ids), first) < 1e-6
    other = decoded(compiled, tokens(2, seed=9))
    assert relative(other, decoded(by_hand.model, tokens(2, seed=9))) < 1e-4


def test_calibration_is_asked_for_where_it_is_needed() -> None:
    with pytest.raises(
        popc.ConfigError, match="calibration=None is not allowed: for policy 'flap'"
    ):
        popc.compile(tiny_llama(), policy="flap")
    with pytest.raises(popc.ConfigError, match=r"calibration=.* is not allowed: None for policy"):
        popc.compile(tiny_llama(), calibration=[tokens()])
    model = tiny_llama()
    model.compile(backend="popc", options={"policy": "wanda_sp"})
    with pytest.raises(Exception, match="policy='wanda_sp' is not allowed"):
        model(tokens())


def test_flap_adds_the_mean() -> None:
    """Channels that never vary are given back whole, however large."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, 40), nn.Linear(40, 16)
            with torch.no_grad():
                self.up.weight[20:] = 0
                self.up.bias[20:] = 50

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(x)))

    torch.manual_seed(0)
    model, x = Constant().eval(), torch.randn(1, 9, 16)
    options = {"policy": "flap", "sparsity": 0.5, "codegen": "eager"}
    compiled = popc.compile(copy.deepcopy(model), **options, calibration=[torch.randn(2, 32, 16)])
    with torch.no_grad():
        compiled(x[:, :8])
        assert relative(compiled(x[:, 8:]), model(x[:, 8:])) < 1e-5


def test_geglu_has_a_gate() -> None:
    config = Gemma3TextConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=96,
    )
    plan = popc.analyze(Gemma3ForCausalLM(config).eval())
    (region,) = (region for region in plan.regions if region.kind == "mlp")
    assert region.late is not None


def test_parts_are_summed_side_by_side() -> None:
    flap = policies.get("flap")
    h = torch.randn(50, 7, dtype=torch.float64)
    squares = [part.square().sum(0)[None] for part in (h, h + 1, torch.ones_like(h))]
    torch.testing.assert_close(flap.mean(*squares)[0], h.mean(0))
    variance = flap.importance(squares[0], torch.ones(7), *squares[1:])[0]
    torch.testing.assert_close(variance, h.var(0, unbiased=False))

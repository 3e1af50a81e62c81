"""Linears with nothing between them: what is pruned of one is read by the next."""

from __future__ import annotations

import copy
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

import popc
from popc.ops import native
from popc.testing import assert_equivalent
from tests.helpers.models import CACHE, Parallel, tiny_llama
from tests.helpers.oracle import relative
from tests.helpers.profiles import few

pytestmark = pytest.mark.usefixtures("fresh_compiler")

RANK = 24


class Lora(nn.Module):
    """A linear and two more beside it, of low rank."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, RANK, bias=False)
        self.b = nn.Linear(RANK, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


def factors(base: nn.Linear) -> nn.Module:
    """Two in its place, as a singular value decomposition gives them."""
    bias = base.bias is not None
    return nn.Sequential(
        nn.Linear(base.in_features, RANK, bias=False),
        nn.Linear(RANK, base.out_features, bias=bias),
    )


def three(base: nn.Linear) -> nn.Module:
    return nn.Sequential(
        nn.Linear(base.in_features, 40), nn.Linear(40, RANK), nn.Linear(RANK, base.out_features)
    )


class Twice(nn.Module):
    """The same weight in a row: ``W W x``, between two of other sizes."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.a, self.w = nn.Linear(base.in_features, RANK), nn.Linear(RANK, RANK)
        self.b = nn.Linear(RANK, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.w(self.w(self.a(x))))


ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FORMS = {"lora": Lora, "factors": factors, "three": three, "twice": Twice}


def chained(form: str, names: tuple[str, ...] = ALL) -> nn.Module:
    """A llama with linears of these names in another form."""
    model = tiny_llama()
    torch.manual_seed(1)
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name in names:
                if hasattr(part, name):
                    setattr(part, name, FORMS[form](getattr(part, name)))
    for parameter in model.parameters():
        if parameter.shape[0] == RANK or parameter.shape[-1] == RANK:
            nn.init.normal_(parameter, std=0.2)
    return model


def prompt(batch: int = 1, length: int = 10) -> Tensor:
    return torch.randint(1, 96, (batch, length), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("policy", "scope", "candidate"),
    [
        ("pop", "batch", 0.1),
        *few([("pop", "sequence", 1.0), ("pop", "batch", 0.0), ("threshold", "batch", 0.1)], 1),
        *few([("threshold", "sequence", 0.1), ("dense", "batch", 0.1)], 1),
    ],
)
def test_chains_are_the_oracle(form: str, policy: str, scope: str, candidate: float) -> None:
    options = {"policy": policy, "scope": scope, "candidate": candidate, "codegen": "eager"}
    ids = prompt(2 if scope == "sequence" else 1)
    targets = {"targets": ("mlp", "attention")} if policy == "pop" else {}
    result = assert_equivalent(chained(form), ids, sparsity=0.4, **options, **targets)
    assert result.masked > 0 or policy == "dense"


@pytest.mark.parametrize("name", ALL)
def test_one_linear_of_low_rank_is_the_oracle(name: str) -> None:
    model = chained("lora", (name,))
    options = {"policy": "pop", "targets": ("mlp", "attention"), "codegen": "eager"}
    result = assert_equivalent(model, prompt(), sparsity=0.5, **options)
    assert result.masked > 0
    units = [region.units for region in result.plan.regions]
    assert units.count(RANK) == 2


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_each_kind_has_its_policy(scope: str) -> None:
    """A linear that consumes heads and produces channels is in two groups: only one prunes it."""
    policy = {"attention": "threshold", "mlp": "pop"}
    options = {"policy": policy, "scope": scope, "sparsity": 0.4, "codegen": "eager"}
    result = assert_equivalent(chained("factors"), prompt(2), **options)
    assert result.masked > 0


@pytest.mark.parametrize("form", few(["three", "lora", "factors", "twice"], 2))
def test_chains_without_kernels_are_the_oracle(form: str, monkeypatch) -> None:
    monkeypatch.setattr(native, "load", lambda: False)
    options = {"policy": "pop", "targets": ("mlp", "attention"), "codegen": "eager"}
    assert assert_equivalent(chained(form), prompt(), sparsity=0.4, **options).masked > 0


class Encoder(nn.Module):
    """One pass of attention and an MLP, its rows flattened before the linears, or not."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(32, 96), nn.Linear(32, 32)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, RANK), nn.Linear(RANK, 32))
        self.flat = flat

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        heads = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        seen = attention_mask[:, None, None].bool().expand(-1, 1, x.shape[1], -1)
        y = F.scaled_dot_product_attention(*heads, attn_mask=seen)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return self.mlp(x.flatten(0, 1)).view(x.shape) if self.flat else self.mlp(x)


def encoded(flat: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    mask = torch.ones(2, 7, dtype=torch.int64)
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    return Encoder(flat).double().eval(), {"x": x, "attention_mask": mask}


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("policy", few(["threshold", "pop"], 1))
def test_a_chain_in_one_pass_is_the_oracle(policy: str, flat: bool) -> None:
    options = {"policy": policy, "sparsity": 0.5, "codegen": "eager"}
    result = assert_equivalent(*encoded(flat), **options)
    assert result.masked > 0
    units = [r.units for r in result.plan.regions if r.one_pass and r.kind == "mlp"]
    assert sorted(units) == [RANK, 32, 64]


def test_padding_decides_nothing_after_a_chain() -> None:
    """Also where rows are flat, and lead back to the tokens through linears that were rewritten."""
    outputs = []
    for flat, large in ((False, 1), (False, 50), (True, 50)):
        model, inputs = encoded(flat)
        inputs["attention_mask"][1, 5:] = 0
        inputs["x"][1, 5:] *= large
        torch.compiler.reset()
        with torch.no_grad():
            y = popc.compile(model, sparsity=0.5, codegen="eager")(**inputs)
        outputs.append(y.masked_fill(inputs["attention_mask"][..., None] == 0, 0))
    assert relative(outputs[1], outputs[0]) < 1e-6
    assert relative(outputs[2], outputs[0]) < 1e-6


class Stacks(nn.Module):
    """Each expert is three linears with nothing between them."""

    def __init__(self, form: str, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.router, self.form = nn.Linear(sizes[0], 4), form
        weights = [torch.randn(4, k, n) / k**0.5 for k, n in pairwise(sizes)]
        self.weights = nn.ParameterList(w.mT if form == "index" else w for w in weights)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        chosen = self.router(rows).argmax(-1)
        if self.form == "index":
            for weight in self.weights:
                rows = torch.bmm(weight[chosen], rows[..., None]).squeeze(-1)
            return rows.view(x.shape)
        order = chosen.argsort(stable=True)
        ends = (chosen[:, None] == torch.arange(4)).sum(0).cumsum(0).to(torch.int32)
        rows = rows[order]
        for weight in self.weights:
            rows = torch._grouped_mm(rows, weight, ends)
        return torch.zeros_like(rows).index_copy(0, order, rows).view(x.shape)


@pytest.mark.parametrize("form", ["index", "offsets"])
def test_chains_of_experts_are_the_oracle(form: str) -> None:
    model = tiny_llama()
    torch.manual_seed(1)
    for layer in model.model.layers:
        layer.mlp = Stacks(form, (64, 48, 40, 64))
    options = {"policy": "pop", "sparsity": 0.5, "codegen": "eager"}
    dtype = torch.float64 if form == "index" else torch.bfloat16
    result = assert_equivalent(model, prompt(2, 30), dtype=dtype, **options)
    assert [r.units for r in result.plan.regions if r.kind == "experts"] == [48, 40] * 2
    assert result.masked > 0


class Fixed:
    """A model in which consumers leave out, in each decode step, what a text or the prompt rates
    least; its mean takes the place of that under ``flap``."""

    def __init__(self, model: nn.Module, consumers: list[nn.Linear], policy: str) -> None:
        self.model, self.policy = model, policy
        self.seen: dict[nn.Module, list[Tensor]] = {}
        self.measuring = True
        for linear in consumers:
            linear.register_forward_pre_hook(self._hook)

    def _hook(self, linear: nn.Linear, args: tuple[Tensor]) -> tuple[Tensor] | None:
        (h,) = args
        if self.measuring:
            self.seen.setdefault(linear, []).append(h.flatten(0, 1).double())
        if h.shape[1] > 1:
            return None
        text, norm = torch.cat(self.seen[linear]), linear.weight.norm(dim=0)
        score = {
            "griffin": lambda: (text / text.norm(dim=-1, keepdim=True)).norm(dim=0),
            "wanda_sp": lambda: text.norm(dim=0) * norm,
            "flap": lambda: text.var(0, unbiased=False) * norm.square(),
        }[self.policy]()
        left = score.argsort(descending=True, stable=True)[round(0.5 * len(score)) :]
        mean = text.mean(0).to(h.dtype) if self.policy == "flap" else torch.zeros_like(h[0, 0])
        return (h.index_copy(-1, left, mean[left].expand(*h.shape[:2], -1)),)


@torch.no_grad()
def decoded(model: nn.Module, ids: Tensor, after_prompt=lambda: None) -> Tensor:
    cache = DynamicCache()
    outputs = [model(ids[:, :10], use_cache=True, **{CACHE: cache}).logits]
    after_prompt()
    for at in range(10, ids.shape[1]):
        outputs.append(model(ids[:, at : at + 1], use_cache=True, **{CACHE: cache}).logits)
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("policy", ["griffin", "wanda_sp", "flap"])
def test_a_fixed_mask_of_a_chain_is_the_masked_model(policy: str) -> None:
    model = chained("three", ("down_proj",))
    by_hand = copy.deepcopy(model)
    consumers = [linear for layer in by_hand.model.layers for linear in layer.mlp.down_proj]
    oracle = Fixed(by_hand, consumers, policy)
    ids, text = prompt(1, 14), prompt(2, 20)
    calibrated = {} if policy == "griffin" else {"calibration": [text]}
    if calibrated:
        with torch.no_grad():
            by_hand(text, use_cache=False)
        oracle.measuring = False
    expected = decoded(by_hand, ids, lambda: setattr(oracle, "measuring", False))
    options = {"policy": policy, "sparsity": 0.5, "targets": ("mlp",), "codegen": "eager"}
    compiled = popc.compile(model, **options, **calibrated)
    assert relative(decoded(compiled, ids), expected) < 1e-4
    assert relative(expected, decoded(chained("three", ("down_proj",)), ids)) > 1e-2
    units = sorted(r.units for r in compiled.popc_plan.regions if r.kind == "mlp")
    assert units == [RANK] * 2 + [40] * 2 + [160] * 2


@pytest.mark.parametrize("names", [("down_proj",), ("gate_proj", "up_proj", "down_proj")])
def test_staged_runs_beside_chains(names: tuple[str, ...]) -> None:
    """A gate of two linears is none; one before a chain is."""
    model = chained("factors", names)
    by_hand = copy.deepcopy(model)

    def masked(mlp: nn.Module, x: Tensor, prompt: list[Tensor]) -> Tensor:
        g, u = mlp.act_fn(mlp.gate_proj(x)), mlp.up_proj(x)
        if x.shape[1] > 1:
            prompt[:] = [u.norm(dim=1)]
            return mlp.down_proj(g * u)
        score = g.abs() * mlp.down_proj[0].weight.norm(dim=0) * prompt[0][:, None]
        kept = score >= score.sort(descending=True).values[..., 79:80]
        return mlp.down_proj(g * u * kept)

    for layer in by_hand.model.layers:
        layer.mlp.forward = partial(masked, layer.mlp, prompt=[])
    ids = prompt(1, 14)
    compiled = popc.compile(model, policy="staged", sparsity=0.5, codegen="eager")
    expected = decoded(by_hand, ids)
    assert relative(decoded(compiled, ids), expected) < 1e-4
    assert relative(expected, decoded(chained("factors", names), ids)) > 1e-2


def test_all_that_a_linear_reads_is_compensated() -> None:
    """Both regions behind one linear give their mean."""
    torch.manual_seed(0)
    model, x = Parallel().eval(), torch.randn(1, 9, 16)
    with torch.no_grad():
        model.a.weight[:24] = 0  # the first MLP's channels, and the second's, never vary
        model.a.weight[32:] = 0
        model.a.bias[:24] = 3
    options = {"policy": "flap", "sparsity": 0.5, "codegen": "eager"}
    compiled = popc.compile(copy.deepcopy(model), **options, calibration=[torch.randn(2, 32, 16)])
    with torch.no_grad():
        compiled(x[:, :8])
        assert relative(compiled(x[:, 8:]), model(x[:, 8:])) < 1e-5
    assert len(compiled.popc_plan.regions) == 2

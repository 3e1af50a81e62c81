"""Contraction against an oracle of its own: an eager model whose linears see masked inputs."""

from __future__ import annotations

import copy
import warnings
from itertools import chain

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, MixtralConfig, MixtralForCausalLM, StaticCache

import popc
from popc import policies, sessions
from popc.compat import cache_keyword
from popc.ops import native
from popc.policies.allocation import at_shares
from popc.testing import assert_equivalent
from tests.helpers.models import CACHE, tiny_llama
from tests.helpers.oracle import relative

pytestmark = pytest.mark.usefixtures("fresh_compiler")

EAGER = {"sparsity": 0.5, "codegen": "eager", "count": True}


def tokens(batch: int = 2, length: int = 24) -> Tensor:
    return torch.randint(96, (batch, length), generator=torch.Generator().manual_seed(3))


def groups_of(model: nn.Module) -> list[list[nn.Linear]]:
    """By hand, what popc should find in a llama: linears that share an input."""
    groups = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        groups += [[attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj]]
        groups += [[mlp.gate_proj, mlp.up_proj], [mlp.down_proj]]
    return groups


def middle(x: Tensor, by_sequence: bool) -> Tensor:
    """Means ``[S, 1, K]`` of channels whose mean says something about them."""
    rows = x if by_sequence else x.flatten(0, 1)[None]
    mean = rows.double().mean(1, keepdim=True)
    least = (0.1 + 4 / rows.shape[1]) * rows.double().var(1, keepdim=True)
    return (mean * (mean.square() > least)).float()


class MaskedInputs:
    """Masks each linear's input in one-token calls, by given thresholds ``[G, S]``.

    A masked channel is its mean over the first call, where that says something.
    """

    def __init__(self, model: nn.Module, thresholds: Tensor) -> None:
        self.model, self.read = model, []
        for group, limit in zip(groups_of(model), thresholds, strict=True):
            norm = torch.cat([linear.weight for linear in group]).float().norm(dim=0)
            for linear in group:
                linear.register_forward_pre_hook(self._hook(norm, limit, linear is group[0]))

    def _hook(self, norm: Tensor, limit: Tensor, first: bool):
        center: list[Tensor] = []

        def mask(linear: nn.Linear, args: tuple[Tensor]) -> tuple[Tensor] | None:
            (x,) = args
            if x.shape[1] > 1:
                center.append(middle(x, len(limit) > 1))
                return None
            kept = (x - center[0]).abs().float() * norm > limit[:, None, None]
            if first:
                self.read.append(int(kept.any(0).any(0).sum()))
            return (torch.where(kept, x, center[0]),)

        return mask


@torch.no_grad()
def decoded(model: nn.Module, ids: Tensor, prompt: int, cache: object) -> Tensor:
    options = {cache_keyword(tiny_llama().forward): cache}
    logits = [model(ids[:, :prompt], use_cache=True, **options).logits[:, -1:]]
    for at in range(prompt, ids.shape[1]):
        logits.append(model(ids[:, at : at + 1], use_cache=True, **options).logits)
    return torch.cat(logits, 1)


def thresholds_of(session: sessions.Session) -> Tensor:
    """Of the first decode graph; a later one, with a symbolic length, has the same."""
    first, *rest = (limits.thresholds for limits in session.inputs._fed.values())
    assert all(torch.equal(first, limits) for limits in rest)
    return first


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_is_the_oracle(codegen: str, scope: str) -> None:
    model, ids = tiny_llama(), tokens()
    oracle = copy.deepcopy(model)
    compiled = popc.compile(model, **{**EAGER, "codegen": codegen, "scope": scope})
    cache = DynamicCache()
    got = decoded(compiled, ids, 16, cache)
    session = sessions.of_cache(cache)
    limits = thresholds_of(session)
    assert limits.shape == (8, 1 if scope == "batch" else 2)
    masked = MaskedInputs(oracle, limits)
    expected = decoded(oracle, ids, 16, DynamicCache())
    assert relative(got, expected) < 1e-4
    dense = decoded(tiny_llama(), ids, 16, DynamicCache())
    assert relative(got, dense) > 1e-2
    # What was counted is what the oracle kept.
    assert sorted(chain(*session.inputs.reads.values())) == sorted(masked.read)


def test_the_static_cache_and_the_backend_string_agree() -> None:
    ids = tokens()
    first = popc.compile(tiny_llama(), sparsity=0.5, codegen="eager")
    model = tiny_llama()
    expected = decoded(first, ids, 16, DynamicCache())
    cache = StaticCache(config=model.config, max_cache_len=40)
    assert relative(decoded(first, ids, 16, cache), expected) < 1e-4
    model.compile(backend="popc", options={"sparsity": 0.5, "codegen": "eager"})
    assert relative(decoded(model, ids, 16, DynamicCache()), expected) < 1e-4


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@torch.no_grad()
def test_the_prompt_may_come_in_chunks(scope: str) -> None:
    """The same thresholds and centers: far closer than what pruning itself changes."""
    model, ids, padding = tiny_llama(), tokens(2, 34), torch.ones(2, 34, dtype=torch.long)
    padding[0, :11] = 0  # a chunk may be padding alone, for one sequence
    compiled = popc.compile(model, sparsity=0.5, codegen="eager", scope=scope)

    def first_step(call, ends: list[int]) -> Tensor:
        options = {CACHE: DynamicCache(), "use_cache": True}
        for begin, end in zip([0, *ends], [*ends, 34], strict=True):
            logits = call(ids[:, begin:end], attention_mask=padding[:, :end], **options).logits
        return logits[:, -1]

    whole, dense = first_step(compiled, [33]), first_step(tiny_llama(), [33])
    assert relative(whole, dense) > 1e-2
    for ends in ([7, 15, 30, 33], [8, 16, 24, 33], [31, 33]):
        assert relative(first_step(compiled, ends), whole) < 1e-4


def test_a_sequence_does_not_depend_on_its_batch() -> None:
    ids = tokens(3)
    compiled = popc.compile(tiny_llama(), sparsity=0.5, codegen="eager", scope="sequence")
    whole = decoded(compiled, ids, 16, DynamicCache())
    for row in range(3):
        alone = decoded(compiled, ids[row : row + 1], 16, DynamicCache())
        assert relative(whole[row : row + 1], alone) < 1e-4


def test_budget_is_met_on_the_prompt() -> None:
    """Decoding the prompt once more reads the share that was asked for."""
    model, ids = tiny_llama(), tokens(1, 64)
    for share in (0.75, 0.5, 0.3):
        compiled = popc.compile(model, bytes=share, codegen="eager", count=True)
        cache = DynamicCache()
        ids_twice = torch.cat((ids, ids), 1)
        decoded(compiled, ids_twice, 64, cache)
        plan = popc.analyze(model)
        read = plan.read_share(compiled.popc_config, sessions.of_cache(cache).inputs.reads)
        assert read == pytest.approx(share, abs=0.06)
        planned = popc.Config(sparsity=1 - share)
        assert plan.read_share(planned) == pytest.approx(share)


def test_elastic_reads_what_mass_needs() -> None:
    model, ids = tiny_llama(), tokens(1, 40)
    shares = []
    for mass in (0.5, 0.9, 0.999):
        options = {"budget": "elastic", "mass": mass, "sparsity": 0.9}
        compiled = popc.compile(model, codegen="eager", count=True, **options)
        cache = DynamicCache()
        decoded(compiled, ids, 24, cache)
        reads = sessions.of_cache(cache).inputs.reads
        shares.append(popc.analyze(model).read_share(compiled.popc_config, reads))
    assert shares[0] < shares[1] < shares[2] <= 1
    with pytest.raises(popc.ConfigError, match="budget='elastic'"):
        popc.Config(policy="pop", budget="elastic")


def test_groups_are_the_linears_of_one_input() -> None:
    plan = popc.analyze(tiny_llama())
    kinds = [(group.kind, len(group.linears), group.width) for group in plan.inputs]
    layer = [("attention", 3, 64), ("attention", 1, 64), ("mlp", 2, 64), ("mlp", 1, 160)]
    assert kinds == [*layer, *layer, ("head", 1, 64)]
    body = [group.weight_bytes for group in plan.inputs if group.kind != "head"]
    assert sum(body) == sum(linear.weight.nbytes for linear in chain(*groups_of(tiny_llama())))


def test_routers_are_left_alone_and_experts_pruned_by_pop() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(**sizes, **heads, num_local_experts=4, num_experts_per_tok=2)
    model = MixtralForCausalLM(config).eval()
    plan = popc.analyze(model)
    routers = [tuple(m.weight.shape) for n, m in model.named_modules() if n.endswith("gate")]
    assert routers
    assert [group.kind for group in plan.inputs] == ["attention", "attention", "head"]
    compiled = popc.compile(model, sparsity=0.5, codegen="eager")
    ids = tokens()
    got = decoded(compiled, ids, 16, DynamicCache())
    assert got.isfinite().all()
    assert {region.kind for region in compiled.popc_plan.regions} >= {"experts"}
    assert relative(got, decoded(copy.deepcopy(model), ids, 16, DynamicCache())) > 1e-3


def test_policies_by_kind() -> None:
    options = {"policy": {"mlp": "pop", "attention": "threshold"}, "codegen": "eager"}
    compiled = popc.compile(tiny_llama(), sparsity=0.5, **options)
    cache = DynamicCache()
    decoded(compiled, tokens(), 16, cache)
    assert {group.kind for group in compiled.popc_plan.inputs} == {"attention"}
    session = sessions.of_cache(cache)
    for region in compiled.popc_plan.regions:
        measured = session.units.statistics(region.key, "batch") is not None
        assert measured == (region.kind == "mlp")
    with pytest.raises(popc.ConfigError, match="policy"):
        popc.Config(policy={"mlp": "best"})


def test_two_policies_on_one_model_are_both_right() -> None:
    """The second one finds weights laid out for the first: it says so, and is right."""
    model, ids = tiny_llama(), tokens()
    popc_first = popc.compile(model, policy="pop", sparsity=0.5, codegen="eager")
    decoded(popc_first, ids, 16, DynamicCache())
    second = popc.compile(model, sparsity=0.5, codegen="eager")
    assert native.load()
    with pytest.warns(UserWarning, match="another policy"):
        got = decoded(second, ids, 16, DynamicCache())
    alone = popc.compile(tiny_llama(), sparsity=0.5, codegen="eager")
    assert relative(got, decoded(alone, ids, 16, DynamicCache())) < 1e-4


def test_griffin_keeps_what_flocks() -> None:
    """The prompt's mask, by ‖Z̄‖ of columns, for the whole generation."""
    model, ids = tiny_llama(), tokens(1)
    oracle = copy.deepcopy(model)
    compiled = popc.compile(model, policy="griffin", sparsity=0.5, codegen="eager")
    got = decoded(compiled, ids, 16, DynamicCache())
    masks: dict[nn.Module, Tensor] = {}

    def hook(down: nn.Linear, args: tuple[Tensor]) -> tuple[Tensor] | None:
        (h,) = args
        if h.shape[1] > 1:
            flock = (h / h.norm(dim=-1, keepdim=True)).flatten(0, 1).norm(dim=0)
            masks[down] = torch.zeros(160).index_fill_(0, flock.topk(80).indices, 1)
            return None
        return (h * masks[down],)

    for layer in oracle.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(hook)
    assert relative(got, decoded(oracle, ids, 16, DynamicCache())) < 1e-4


class Nearest(popc.InputPolicy):
    """Reads a share that is given, by scores of its own."""

    name = "nearest"

    def scale(self, norm: Tensor) -> Tensor:
        return torch.ones_like(norm)

    def allocate(self, histograms, groups, budget):
        shares = torch.full((len(groups),), budget.share, dtype=torch.float64)
        return at_shares(histograms, groups, shares)


def test_a_policy_of_inputs_of_ones_own_is_the_oracle() -> None:
    popc.register_policy(Nearest())
    result = assert_equivalent(tiny_llama(), tokens(), policy="nearest", sparsity=0.5)
    assert result.masked and result.plan.inputs
    usual = assert_equivalent(tiny_llama(), tokens(), policy="threshold", sparsity=0.5)
    assert usual.masked != result.masked


def test_a_policy_may_be_registered_again_but_takes_no_other_name() -> None:
    popc.register_policy(Nearest())
    again = type("Nearest", (Nearest,), {"__qualname__": "Nearest"})()
    popc.register_policy(again)
    assert policies.get("nearest") is again
    with pytest.raises(popc.ConfigError, match="policy"):
        popc.register_policy("pop")  # type: ignore[arg-type]
    with pytest.raises(popc.ConfigError, match="a name other than"):
        popc.register_policy(type("Mine", (Nearest,), {"name": "pop"})())


def test_the_earlier_name_of_the_default_policy_is_an_alias() -> None:
    with pytest.warns(DeprecationWarning, match="'contraction' is called 'threshold' now"):
        config = popc.Config(policy="contraction")
    assert config == popc.Config() and config.policy == "threshold"
    with pytest.warns(DeprecationWarning, match="'contraction'"):
        assert popc.Config(policy={"mlp": "contraction"}).policy == {"mlp": "threshold"}
    with pytest.warns(DeprecationWarning, match="UnitPolicy"):
        assert issubclass(popc.Policy, popc.UnitPolicy)
    with pytest.warns(DeprecationWarning, match="sessions"):
        assert popc.state is sessions


class SplitsOtherwise(nn.Module):
    """Two linears read one value in a prompt; in a decode step, each a value of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(32, 48, bias=False), nn.Linear(32, 48, bias=False)
        self.head = nn.Linear(48, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        second = x if x.shape[1] > 1 else x * 1.0
        return self.head(torch.tanh(self.one(x)) + torch.tanh(self.two(second)))


def test_one_token_measures_nothing_after_a_prompt() -> None:
    """Thresholds of one token would be taken for the prompt's: what is not known stays dense."""
    model = SplitsOtherwise().eval()
    options = {"sparsity": 0.5, "codegen": "eager"}
    compiled = torch.compile(copy.deepcopy(model), backend="popc", options=options)
    x, session = torch.randn(1, 20, 32), sessions.Session()
    with torch.no_grad(), sessions.use(session):
        compiled(x[:, :16])
        measured = dict(session.inputs._histograms)
        with pytest.warns(popc.PopcWarning, match=r"2 of 3 inputs of linears.*splits the model"):
            compiled(x[:, 16:17])
        for token in x[:, 17:].split(1, dim=1):
            with warnings.catch_warnings():
                warnings.simplefilter("error", popc.PopcWarning)  # it is said once
                got = compiled(token)
            # one and two read all, and head what exceeds its threshold.
            h = torch.tanh(model.one(token)) + torch.tanh(model.two(token))
            (limits,) = session.inputs._fed.values()
            center, threshold = limits.center[:, 2 * 32 :], limits.thresholds[2]
            score = (h - center).abs() * model.head.weight.norm(dim=0)
            kept = torch.where(score > threshold, h, center)
            assert relative(got, model.head(kept)) < 1e-5 < relative(got, model(token))
    assert session.inputs._histograms.keys() == measured.keys()
    assert all(session.inputs._histograms[key] is counted for key, counted in measured.items())


def test_the_first_token_is_a_prompt() -> None:
    model = SplitsOtherwise().eval()
    options = {"sparsity": 0.5, "codegen": "eager"}
    compiled = torch.compile(copy.deepcopy(model), backend="popc", options=options)
    x = torch.randn(1, 2, 32)
    with torch.no_grad(), sessions.use(sessions.Session()):
        assert relative(compiled(x[:, :1]), model(x[:, :1])) < 1e-5
        assert relative(compiled(x[:, 1:]), model(x[:, 1:])) > 1e-3

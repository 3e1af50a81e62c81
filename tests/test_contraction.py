"""Contraction against an oracle of its own: an eager model whose linears see masked inputs."""

from __future__ import annotations

import copy
import itertools
import math
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, MixtralConfig, MixtralForCausalLM, StaticCache

import popc
from popc import state
from popc.budget import LEAST, Budget, Demand, allocate
from popc.models import cache_keyword
from popc.ops import (
    centers,
    measure_inputs,
    native,
    sum_squares,
    threshold_linear,
    threshold_linears,
)
from popc.ops.measure import BINS, SAMPLE, _centers, _histogram, _measure_inputs, _sum_squares
from popc.ops.threshold import _threshold_linear
from tests.models import tiny_llama
from tests.oracle import relative

EAGER = {"sparsity": 0.5, "codegen": "eager", "count": True}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()


def tokens(batch: int = 2, length: int = 24) -> Tensor:
    return torch.randint(96, (batch, length), generator=torch.Generator().manual_seed(3))


def groups_of(model: nn.Module) -> list[list[nn.Linear]]:
    """By hand, what popc should find in a llama: linears that share an input."""
    found = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        found += [[attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj]]
        found += [[mlp.gate_proj, mlp.up_proj], [mlp.down_proj]]
    return found


def middle(x: Tensor, by_sequence: bool) -> Tensor:
    """Means ``[S, 1, K]`` of channels whose mean says something about them."""
    rows = x if by_sequence else x.flatten(0, 1)[None]
    mean = rows.double().mean(1, keepdim=True)
    return (mean * (mean.square() > 0.1 * rows.double().var(1, keepdim=True))).float()


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
    given = {cache_keyword(tiny_llama().forward): cache}
    logits = [model(ids[:, :prompt], use_cache=True, **given).logits[:, -1:]]
    for at in range(prompt, ids.shape[1]):
        logits.append(model(ids[:, at : at + 1], use_cache=True, **given).logits)
    return torch.cat(logits, 1)


def thresholds_of(session: state.Session) -> Tensor:
    """Of the first decode graph; a later one, with a symbolic length, has the same."""
    first, *rest = (limits.thresholds for limits in session._limits.values())
    assert all(torch.equal(first, limits) for limits in rest)
    return first


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_is_the_oracle(codegen: str, scope: str) -> None:
    model, ids = tiny_llama(), tokens()
    oracle = copy.deepcopy(model)
    twin = popc.compile(model, **{**EAGER, "codegen": codegen, "scope": scope})
    cache = DynamicCache()
    got = decoded(twin, ids, 16, cache)
    session = state.of_cache(cache)
    limits = thresholds_of(session)
    assert limits.shape == (8, 1 if scope == "batch" else 2)
    masked = MaskedInputs(oracle, limits)
    expected = decoded(oracle, ids, 16, DynamicCache())
    assert relative(got, expected) < 1e-4
    dense = decoded(tiny_llama(), ids, 16, DynamicCache())
    assert relative(got, dense) > 1e-2
    # What was counted is what the oracle kept.
    assert sorted(chain(*session.reads.values())) == sorted(masked.read)


def test_the_static_cache_and_the_backend_string_agree() -> None:
    ids = tokens()
    first = popc.compile(tiny_llama(), sparsity=0.5, codegen="eager")
    model = tiny_llama()
    expected = decoded(first, ids, 16, DynamicCache())
    cache = StaticCache(config=model.config, max_cache_len=40)
    assert relative(decoded(first, ids, 16, cache), expected) < 1e-4
    model.compile(backend="popc", options={"sparsity": 0.5, "codegen": "eager"})
    assert relative(decoded(model, ids, 16, DynamicCache()), expected) < 1e-4


def test_a_sequence_does_not_depend_on_its_batch() -> None:
    ids = tokens(3)
    twin = popc.compile(tiny_llama(), sparsity=0.5, codegen="eager", scope="sequence")
    whole = decoded(twin, ids, 16, DynamicCache())
    for row in range(3):
        alone = decoded(twin, ids[row : row + 1], 16, DynamicCache())
        assert relative(whole[row : row + 1], alone) < 1e-4


def test_budget_is_met_on_the_prompt() -> None:
    """Decoding the prompt once more reads the share that was asked for."""
    model, ids = tiny_llama(), tokens(1, 64)
    for share in (0.75, 0.5, 0.3):
        twin = popc.compile(model, bytes=share, codegen="eager", count=True)
        cache = DynamicCache()
        ids_twice = torch.cat((ids, ids), 1)
        decoded(twin, ids_twice, 64, cache)
        plan = popc.analyze(model)
        read = plan.read_share(twin.popc_config, state.of_cache(cache).reads)
        assert read == pytest.approx(share, abs=0.06)
        planned = popc.Config(sparsity=1 - share)
        assert plan.read_share(planned) == pytest.approx(share)


def test_elastic_reads_what_mass_needs() -> None:
    model, ids = tiny_llama(), tokens(1, 40)
    shares = []
    for mass in (0.5, 0.9, 0.999):
        options = {"budget": "elastic", "mass": mass, "sparsity": 0.9}
        twin = popc.compile(model, codegen="eager", count=True, **options)
        cache = DynamicCache()
        decoded(twin, ids, 24, cache)
        reads = state.of_cache(cache).reads
        shares.append(popc.analyze(model).read_share(twin.popc_config, reads))
    assert shares[0] < shares[1] < shares[2] <= 1
    with pytest.raises(popc.ConfigError, match="budget='elastic'"):
        popc.Config(policy="pop", budget="elastic")


def test_what_is_found() -> None:
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
    twin = popc.compile(model, sparsity=0.5, codegen="eager")
    ids = tokens()
    got = decoded(twin, ids, 16, DynamicCache())
    assert got.isfinite().all()
    assert {region.kind for region in twin.popc_plan.regions} >= {"experts"}
    assert relative(got, decoded(copy.deepcopy(model), ids, 16, DynamicCache())) > 1e-3


def test_policies_by_kind() -> None:
    given = {"policy": {"mlp": "pop", "attention": "contraction"}, "codegen": "eager"}
    twin = popc.compile(tiny_llama(), sparsity=0.5, **given)
    cache = DynamicCache()
    decoded(twin, tokens(), 16, cache)
    assert {group.kind for group in twin.popc_plan.inputs} == {"attention"}
    session = state.of_cache(cache)
    for region in twin.popc_plan.regions:
        measured = session.statistics(region.key, "batch") is not None
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
    twin = popc.compile(model, policy="griffin", sparsity=0.5, codegen="eager")
    got = decoded(twin, ids, 16, DynamicCache())
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 8, 11])
def test_kernel_is_the_reference(dtype: torch.dtype, turned: bool, batch: int) -> None:
    assert native.load()
    make = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 1, 72, generator=make).to(dtype)
    weight = torch.randn(40, 72, generator=make).to(dtype)
    weight = weight.t().contiguous().t() if turned else weight
    bias, norm = torch.randn(40, generator=make).to(dtype), weight.float().norm(dim=0)
    center, base = (torch.randn(batch, n, generator=make) / 2 for n in (72, 40))
    centered = [(), (center[:1].to(dtype).float(), base[:1]), (center.to(dtype).float(), base)]
    limits = (torch.tensor([6.0]), torch.rand(batch, generator=make) * 12)
    for limit, moved in itertools.product(limits, centered):
        wide = (x.float(), weight.float(), bias.float(), norm, limit, 0)
        expected = _threshold_linear(*wide, *moved)
        for stored, out_dim in ((weight, 0), (weight.t(), 1)):
            got = threshold_linear(x, stored, bias, norm, limit, out_dim, *moved)
            assert relative(got, expected) < (1e-5 if dtype is torch.float32 else 2e-2)
    x[0, 0, 5] = float("nan")
    assert threshold_linear(x, weight, bias, norm, torch.tensor([6.0]), 0)[0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 5, 8])
def test_wide_linears_of_one_input_are_read_together(dtype, batch: int) -> None:
    make = torch.Generator().manual_seed(batch)
    x, norm = torch.randn(batch, 1, 37, generator=make).to(dtype), torch.ones(37)
    weights = [torch.randn(37, n, generator=make).to(dtype).t() for n in (7001, 799)]
    base, limit = torch.randn(1, 7800, generator=make), torch.tensor([0.5])
    found = threshold_linears(x, weights, [None, None], norm, limit, [0, 0], None, base)
    kept = x.float().where(x.abs() > 0.5, 0.0)
    for y, weight, part in zip(found, weights, base.split([7001, 799], 1), strict=True):
        expected = kept @ weight.float().t() + part
        assert relative(y, expected) < (1e-5 if dtype is torch.float32 else 1e-2)


def test_a_line_that_is_not_read_counts_for_nothing() -> None:
    weight = torch.randn(72, 40).t()
    weight[:, 3] = float("nan")
    x, norm = torch.ones(1, 72), torch.ones(72)
    x[0, 3] = 0.1
    assert threshold_linear(x, weight, None, norm, torch.tensor([0.5]), 0).isfinite().all()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    "bad",
    [
        {"norm": torch.ones(71)},
        {"norm": torch.ones(72, dtype=torch.float64)},
        {"threshold": torch.ones(3)},
        {"bias": torch.ones(7)},
        {"center": torch.ones(2, 71)},
        {"center": torch.ones(3, 72)},
        {"base": torch.ones(1, 40, dtype=torch.float64)},
        {"x": torch.ones(2, 1, 70)},
        {"channel": 1},
        {"channel": -1},
        {"norm": torch.ones(80), "channel": 9},
        {"group": 1},
        {"group": -1, "threshold": torch.ones(2, 1)},
        {"threshold": torch.ones(2, 3)},
        {"center": torch.ones(1, 80), "norm": torch.ones(90), "channel": 9},
        {"base": torch.ones(1, 41), "output": 2},
        {"base": torch.ones(1, 41), "output": -1},
    ],
)
def test_bad_arguments_are_refused(bad: dict[str, Tensor]) -> None:
    given = {
        "x": torch.ones(2, 1, 72),
        "weight": torch.ones(40, 72),
        "bias": None,
        "norm": torch.ones(72),
        "threshold": torch.ones(1),
        "out_dim": 0,
    }
    with pytest.raises((ValueError, TypeError)):
        threshold_linear(**{**given, **bad})
    given = {**given, **bad}
    many = [[given.pop(name)] for name in ("weight", "bias", "out_dim")]
    lists = dict(zip(("weights", "biases", "out_dims"), many, strict=True))
    with pytest.raises((ValueError, TypeError)):
        threshold_linears(**given, **lists)


def test_lists_that_do_not_go_together_are_refused() -> None:
    x, weight, norm = torch.ones(1, 72), torch.ones(40, 72), torch.ones(72)
    for weights, biases, dims in (
        ([weight], [], [0]),
        ([], [], []),
        ([weight] * 2, [None] * 2, [0]),
    ):
        with pytest.raises(ValueError, match="do not go together"):
            threshold_linears(x, weights, biases, norm, torch.ones(1), dims)


def measured(x: Tensor, norm: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Moments and histogram of all tokens of x ``[S, T, K]``."""
    known = torch.zeros(len(x), 2 * x.shape[-1] + 1, dtype=torch.float64)
    return measure_inputs(x, torch.ones(x.shape[-1]) if norm is None else norm, None, known)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokens", [37, 3 * SAMPLE + 5])
def test_measuring_is_the_reference(dtype: torch.dtype, tokens: int) -> None:
    x, norm = torch.randn(2, tokens, 50).to(dtype), torch.rand(50)
    x[0, 3], x[1, 4, 7] = 0.0, float("inf")
    valid = torch.rand(2, tokens) > 0.3
    valid[1, 4] = True
    x[0, 5], valid[0, 5] = float("nan"), False
    known = torch.zeros(2, 101, dtype=torch.float64)
    known[1] = measured(torch.randn(1, 9, 50) + 1)[0]
    for mask in (None, valid):
        moments, got = measure_inputs(x, norm, mask, known)
        expected, _ = _measure_inputs(x, norm, mask, known)
        torch.testing.assert_close(moments, expected, rtol=1e-5, atol=1e-4, equal_nan=True)
        torch.testing.assert_close(centers(moments), _centers(moments), equal_nan=True)
        counts = torch.ones(2, tokens, dtype=torch.bool) if mask is None else mask
        counted = _histogram(x, norm, centers(moments), counts)
        assert torch.equal(got[:, :BINS], counted[:, :BINS])
        torch.testing.assert_close(got[:, BINS], counted[:, BINS], rtol=1e-5, atol=1e-4)
        sums = sum_squares(x, mask)
        torch.testing.assert_close(sums, _sum_squares(x, mask), equal_nan=True)
    assert sum_squares(x, valid)[0].isfinite().all()
    found = valid.sum(1)
    every = (found // SAMPLE).clamp(min=1)
    assert got[:, :BINS].sum(1).tolist() == (found // every * every * 50).tolist()


def test_of_a_long_prompt_each_nth_token_is_counted() -> None:
    x = torch.randn(1, 4 * SAMPLE + 2, 8)
    x[:, 3::4] = 0.0
    moments, histogram = measured(x)
    assert histogram[0, 0] == 4 * SAMPLE * 8  # all that is counted is 0
    assert moments[0, -1] == len(x[0])
    torch.testing.assert_close(moments[0, :8], x[0].double().sum(0), rtol=1e-5, atol=1e-4)
    assert measured(x[:, : 2 * SAMPLE - 1])[1][0, 1:BINS].sum() > 0  # of fewer, each


def test_centers_are_means_of_what_is_steady() -> None:
    x = torch.randn(1, 400, 3)
    x[..., 1] += 2.0
    x[:, 7, 2] = 1e3  # one outsized token lifts a mean to 2.5
    found = centers(measured(x)[0])
    assert found[0, [0, 2]].tolist() == [0.0, 0.0]
    assert float(found[0, 1]) == pytest.approx(float(x[..., 1].mean()), rel=1e-5)
    for token in x[0]:  # one has no variance
        assert centers(measured(token[None, None])[0]).tolist() == [[0.0] * 3]
    x[0, 0, 1] = float("nan")
    assert centers(measured(x)[0])[0, 1] == 0.0


def test_thresholds_are_quantiles() -> None:
    make = torch.Generator().manual_seed(0)
    x = [torch.randn(1, 300, 64, generator=make), torch.randn(1, 300, 128, generator=make) ** 3]
    norms = [torch.rand(value.shape[-1], generator=make) for value in x]
    histograms = torch.cat([measured(value, norm)[1] for value, norm in zip(x, norms, strict=True)])
    demands = [Demand(64, 1000, "a"), Demand(128, 3000, "b")]
    for share in (0.2, 0.5, 0.8):
        found = allocate(histograms, demands, Budget(share))
        assert float(found.shares @ torch.tensor([0.25, 0.75]).double()) == pytest.approx(share)
        assert found.shares[0] > found.shares[1]  # whose input is the more concentrated
        lost = []
        for value, norm, limit, own in zip(x, norms, found.thresholds, found.shares, strict=True):
            scores = (value * norm).abs()
            assert float((scores > limit).float().mean()) == pytest.approx(float(own), abs=0.01)
            squared = scores.double().square()
            typical = squared.sum(-1).log().mean().exp()
            lost.append(float(squared[scores <= limit].sum() / 300 / typical))
        assert lost == pytest.approx([found.error] * 2, rel=0.1)
    tight = allocate(histograms, demands, Budget(0.9, error=0.9, least=0.4))
    assert float(tight.shares @ torch.tensor([0.25, 0.75]).double()) == pytest.approx(0.4)
    unseen = allocate(torch.zeros_like(histograms), demands, Budget(0.5))
    assert unseen.thresholds.isfinite().all() and unseen.shares.min() >= LEAST
    assert not math.isnan(unseen.error)


def test_a_policy_of_ones_own() -> None:
    """The example runs, and its policy is known by its name."""
    example = Path(__file__).parent.parent / "examples" / "policy.py"
    done = subprocess.run([sys.executable, example], capture_output=True, text=True, check=True)
    assert "first_come" in done.stdout
    with pytest.raises(popc.ConfigError, match="policy"):
        popc.register_policy("pop")  # type: ignore[arg-type]


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


def test_one_token_measures_nothing_after_a_prompt(caplog: pytest.LogCaptureFixture) -> None:
    """Thresholds of one token would be taken for the prompt's: what is not known stays dense."""
    model = SplitsOtherwise().eval()
    options = {"sparsity": 0.5, "codegen": "eager"}
    twin = torch.compile(copy.deepcopy(model), backend="popc", options=options)
    x = torch.randn(1, 20, 32)
    with torch.no_grad(), state.use(state.Session()):
        twin(x[:, :16])
        for token in x[:, 16:].split(1, dim=1):
            assert relative(twin(token), model(token)) < 1e-5
    assert caplog.text.count("a decode step runs dense") == 1


def test_the_first_token_is_a_prompt() -> None:
    model = SplitsOtherwise().eval()
    options = {"sparsity": 0.5, "codegen": "eager"}
    twin = torch.compile(copy.deepcopy(model), backend="popc", options=options)
    x = torch.randn(1, 2, 32)
    with torch.no_grad(), state.use(state.Session()):
        assert relative(twin(x[:, :1]), model(x[:, :1])) < 1e-5
        assert relative(twin(x[:, 1:]), model(x[:, 1:])) > 1e-3

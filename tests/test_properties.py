"""What must hold for any model, prompt and config, as hypothesis draws them."""

from __future__ import annotations

import copy
import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import fx, nn
from transformers import DynamicCache, LlamaConfig, StaticCache

import popc
from popc import testing
from popc.analysis.capture import Captured, capture_dynamo, capture_module
from popc.analysis.regions import find_regions
from popc.passes.prune_units import gather_units
from popc.planning.packing import Slot
from popc.planning.reads import decode_bytes
from popc.policies import Counts
from popc.testing import MLP, Attention, Decoding, Layer, Low, MoE, Prompt, Transformer
from tests.helpers.checks import checked
from tests.helpers.profiles import examples

WIDTH = 8
FRONT_ENDS = ("symbolic_trace", "export", "dynamo")


def captured_by(front_end: str, module: nn.Module, x: torch.Tensor) -> Captured:
    if front_end == "symbolic_trace":
        return capture_module(fx.symbolic_trace(module), (x,))
    if front_end == "export":
        return capture_module(torch.export.export(module, (x,)).module(), (x,))
    graphs: list[Captured] = []

    def backend(gm: fx.GraphModule, inputs: list[torch.Tensor]):
        graphs.append(capture_dynamo(gm, inputs))
        return gm.forward

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(module, backend=backend)(x)
    return graphs[0]


@st.composite
def pruned_blocks(draw: st.DrawFn):
    """A block, and which of its units live."""
    spec = draw(st.one_of(testing.mlps(low=False), testing.decoys()))
    seed = draw(st.integers(0, 2**16))
    torch.manual_seed(seed)
    module = spec.make(WIDTH).double().eval()
    batch, live = draw(st.integers(1, 3)), draw(st.integers(1, spec.channels))
    order = draw(st.permutations(range(spec.channels)))
    return spec, module, torch.randn(batch, 1, WIDTH).double(), sorted(order[:live])


def pruned(captured: Captured, live: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewrite the graph's one region, of which the units ``live`` are retained; its inputs."""
    (region,) = find_regions(captured).regions
    counts = Counts(len(live), 0, len(live))
    packing = gather_units(captured, [Slot(region, counts, rows=True)], "batch")
    index = packing.pack([torch.tensor([live])], [None])[0]
    return index, torch.ones(len(live))


def arguments(captured: Captured, module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """What the captured graph takes, in its order."""
    nodes = [n for n in captured.gm.graph.nodes if n.op == "placeholder"]
    values = [captured.parameters.get(n) for n in nodes if not n.name.startswith("popc_")]
    others = iter([*module.buffers(), x])
    return [next(others) if value is None else value for value in values]


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@given(case=pruned_blocks())
@examples(8, 500)
def test_pruned_block_is_masked_dense(front_end: str, case) -> None:
    """From each front end: the oracle's numbers, true fake values, other nodes as they were."""
    spec, module, x, live = case
    captured = captured_by(front_end, module, x)
    analysis = find_regions(captured)
    plan = analysis.plan()
    assert [region.units for region in plan.regions] == spec.units().get("mlp", [])
    if not plan.regions:
        assert plan.skipped
        return
    (region,) = analysis.regions
    rewritten = {p.linear.node.name for p in region.producers}
    rewritten |= {linear.node.name for linear in region.consumers}
    before = {node.name: node.target for node in captured.gm.graph.nodes}
    index, norm = pruned(captured, live)
    after = {node.name: node.target for node in captured.gm.graph.nodes}
    for name in before.keys() - rewritten:
        assert name not in after or after[name] == before[name]
    assert all("linear" in n or "addmm" in n for n in before.keys() - after.keys() - rewritten)
    y = checked(captured.gm, *arguments(captured, module, x), index, norm)[0]
    active = torch.zeros(spec.channels, dtype=torch.bool)
    active[live] = True
    oracle = testing.masked_dense(module, plan, {region.key: active})
    assert testing.relative(y, oracle(x)) < 1e-9
    assert find_regions(captured).regions == []  # what is pruned is no region again


@given(testing.mlps(low=False), st.integers(0, 2**16), st.randoms(use_true_random=False))
@examples(15, 300)
def test_a_permutation_of_channels_leaves_the_output(spec, seed: int, shuffle) -> None:
    assume(spec.layout != "interleaved" or not spec.gated)
    torch.manual_seed(seed)
    module, x = spec.make(WIDTH).double().eval(), torch.randn(1, 5, WIDTH).double()
    turned = copy.deepcopy(module)
    order = list(range(spec.channels))
    shuffle.shuffle(order)
    for name, linear in turned.named_children():
        is_consumer = name == "down"
        dim = int(is_consumer != linear.transposed)
        parts = linear.weight.shape[dim] // spec.channels
        rows = torch.cat([torch.tensor(order) + i * spec.channels for i in range(parts)])
        linear.weight.data = linear.weight.data.index_select(dim, rows)
        if linear.bias is not None and not is_consumer:
            linear.bias.data = linear.bias.data[rows]
    count = shuffle.randint(1, spec.channels)
    outputs = []
    for block, live in ((module, order[:count]), (turned, list(range(count)))):
        captured = captured_by("symbolic_trace", block, x)
        index, norm = pruned(captured, sorted(live))
        with torch.no_grad():
            outputs.append(captured.gm(*arguments(captured, block, x), index, norm)[0])
    assert testing.relative(*outputs) < 1e-12


@given(testing.transformers(), testing.prompts())
@examples(10, 200)
def test_regions_are_what_an_expert_counts(spec: Transformer, prompt: Prompt) -> None:
    torch.compiler.reset()
    plan = popc.analyze(spec.make(), (), prompt.inputs(spec.vocabulary))
    for kind, units in spec.units().items():
        counts = [region.units for region in plan.regions if region.kind == kind]
        assert sorted(counts) == sorted(units), plan


@given(testing.transformers(), testing.prompts(), testing.configs(codegen="eager"))
@examples(8, 250)
def test_pruned_is_the_oracle(spec: Transformer, prompt: Prompt, config: popc.Config) -> None:
    result = testing.assert_equivalent(spec.make(), prompt.inputs(spec.vocabulary), config)
    assert result.masked == 0 or config.sparsity > 0


@given(testing.transformers(), testing.prompts(), st.sampled_from(["pop", "threshold"]))
@examples(3, 60)
def test_sparsity_zero_is_dense(spec: Transformer, prompt: Prompt, policy: str) -> None:
    given_inputs = prompt.inputs(spec.vocabulary)
    config = popc.Config(sparsity=0, policy=policy, codegen="eager")
    result = testing.assert_equivalent(spec.make(), given_inputs, config)
    assert result.masked == 0


LOW = Transformer(
    layers=(
        Layer(
            attention=Attention(kv_heads=2, low=(("q", Low()), ("o", Low(rank=3, beside=True)))),
            block=MLP(channels=12, low=(("up", Low(rank=4, beside=True)), ("down", Low(rank=5)))),
        ),
    ),
    low=(("head", Low(rank=3)),),
)


def test_chains_of_low_rank_are_regions_of_their_own() -> None:
    """A channel between two linears is a unit like any other, and hides none around it."""
    torch.compiler.reset()
    plan = popc.analyze(LOW.make(), (), Prompt((4,)).inputs(LOW.vocabulary))
    counts = {kind: [r.units for r in plan.regions if r.kind == kind] for kind in LOW.units()}
    assert {kind: sorted(units) for kind, units in counts.items()} == {
        "attention": [2],
        "mlp": sorted([2, 3, 4, 5, 12, 3]),
        "experts": [],
    }
    assert {kind: sorted(units) for kind, units in LOW.units().items()} == {
        kind: sorted(units) for kind, units in counts.items()
    }


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
@pytest.mark.parametrize("policy", ["pop", "threshold"])
def test_chains_of_low_rank_are_the_oracle(policy: str, codegen: str) -> None:
    inputs = Prompt((4,)).inputs(LOW.vocabulary)
    options = {"policy": policy, "sparsity": 0.5, "candidate": 0.3, "codegen": codegen}
    result = testing.assert_equivalent(LOW.make(), inputs, steps=2, **options)
    assert result.decided and result.masked > 0


@given(
    testing.lows("up", "down", "o"), testing.lows("head"), st.sampled_from(["griffin", "staged"])
)
@examples(2, 40)
def test_chains_of_low_rank_run_under_any_policy(low, head, policy: str) -> None:
    """Of policies that the oracle does not know: with nothing left out they are dense."""
    layer = Layer(attention=Attention(low=low), block=MLP(channels=12, low=low))
    spec = Transformer(layers=(layer,), low=head)
    ids = [torch.tensor([[1, 2, 3, 4]]), torch.tensor([[5]]), torch.tensor([[6]])]
    for sparsity in (0, 0.5):
        torch.compiler.reset()
        model = spec.make()
        compiled = popc.compile(model, policy=policy, sparsity=sparsity, codegen="eager")
        got, dense = Decoding(model, compiled), Decoding(model)
        for token in ids:
            error = testing.relative(got(token), dense(token))
            assert error < (1e-9 if not sparsity or len(token[0]) > 1 else 4)


def tokens_of(
    decoding: Decoding, prompt: torch.Tensor, more: int
) -> tuple[list[int], torch.Tensor]:
    """The most likely tokens, and all their logits."""
    rows, ids = [], prompt
    for _ in range(more + 1):
        rows.append(decoding(ids)[:, -1])
        ids = rows[-1].argmax(-1, keepdim=True)
    return torch.stack(rows).argmax(-1).flatten().tolist(), torch.stack(rows)


PLAIN = Transformer(layers=(Layer(block=MLP(channels=12)), Layer(block=MLP(channels=16))))
HALF = {"sparsity": 0.5, "candidate": 0.3, "codegen": "eager"}


@pytest.mark.parametrize("kind", ["buffers", "tuples"])
@pytest.mark.parametrize("entry", ["compile", "backend"])
@given(testing.transformers(), testing.configs(codegen="eager", guards="token"), st.integers(1, 2))
@example(PLAIN, popc.Config(**HALF, policy="pop"), 1)
@example(PLAIN, popc.Config(**HALF, policy="threshold"), 1)
@examples(1, 60)
def test_where_a_cache_is_kept_changes_nothing(kind, entry, spec, config, batch) -> None:
    """In buffers of the model, in tuples, or in an object: what is left out is the same."""
    prompt = Prompt((4,) * batch).ids(spec.vocabulary)

    def run(cache: str) -> torch.Tensor:
        torch.compiler.reset()
        model = replace(spec, cache=cache).make()
        if entry == "compile" or cache == "object":
            compiled = popc.compile(model, config)
        else:
            options = {f.name: getattr(config, f.name) for f in fields(config)}
            compiled = torch.compile(model, backend="popc", options=options)
        return tokens_of(Decoding(model, compiled), prompt, 3)[1]

    assert testing.relative(run(kind), run("object")) < 1e-6


@pytest.mark.parametrize("kind", ["object", "static", "buffers", "tuples"])
@pytest.mark.parametrize("breaks", [False, True], ids=["whole", "in pieces"])
@given(testing.transformers(most=1), testing.configs(codegen="eager"), testing.prompts(sequences=1))
@examples(1, 40)
def test_the_same_prompt_gives_the_same_tokens(kind, breaks, spec, config, prompt) -> None:
    """The tenth time as the first, though calls before taught the compiler which sizes change."""
    torch.compiler.reset()
    static = kind == "static"
    spec = replace(spec, cache="object" if static else kind, breaks=breaks)
    model, ids = spec.make(), prompt.ids(spec.vocabulary)
    compiled = popc.compile(model, config)
    first = None
    for _ in range(10):
        cache = static_cache(spec, ids) if static else None
        said, logits = tokens_of(Decoding(model, compiled, cache), ids, 4)
        first = (said, logits) if first is None else first
        assert said == first[0] and testing.relative(logits, first[1]) < 1e-6


def static_cache(spec: Transformer, ids: torch.Tensor) -> StaticCache:
    attention = spec.layers[0].attention
    heads = attention.kv_heads * attention.group
    config = LlamaConfig(
        hidden_size=heads * attention.size,
        num_attention_heads=heads,
        num_key_value_heads=attention.kv_heads,
        num_hidden_layers=len(spec.layers),
    )
    return StaticCache(config=config, max_cache_len=spec.longest)


@given(testing.transformers(most=1), testing.prompts(sequences=2), testing.configs())
@examples(2, 25)
def test_compiled_is_the_oracle(spec: Transformer, prompt: Prompt, config: popc.Config) -> None:
    testing.assert_equivalent(spec.make(), prompt.inputs(spec.vocabulary), config, steps=2)


@given(testing.mlps(low=False), st.floats(0.1, 0.9), st.floats(0, 1), st.integers(0, 2**16))
@examples(15, 500)
def test_bytes_are_those_that_lists_name(spec, sparsity: float, candidate: float, seed: int):
    """The plan's bytes are the rows and columns that the decode graph's lists name."""
    torch.manual_seed(seed)
    module, x = spec.make(WIDTH).double().eval(), torch.randn(1, 1, WIDTH).double()
    captured = captured_by("symbolic_trace", module, x)
    (region,) = find_regions(captured).regions
    record = region.record
    config = popc.Config(policy="pop", sparsity=sparsity, candidate=candidate)
    counts = config.counts(region.units)
    packing = gather_units(captured, [Slot(region, counts, rows=True)], "batch")
    live = torch.arange(counts.live)[None]
    inputs = arguments(captured, module, x)
    read = 0

    class Reads(fx.Interpreter):
        def call_function(self, target, args, kwargs):
            nonlocal read
            if target is torch.ops.popc.gather_linear.default:
                _, weight, _, rows, columns, out_dim = args
                rows = weight.shape[out_dim] if rows is None else len(rows)
                columns = weight.shape[1 - out_dim] if columns is None else len(columns)
                read += rows * columns * weight.element_size()
            return super().call_function(target, args, kwargs)

    with torch.no_grad():
        norms = torch.ones(packing.norm_total)
        Reads(captured.gm).run(*inputs, packing.pack([live], [None])[0], norms)
    assert read == decode_bytes(record, config)


@pytest.mark.parametrize("policy", ["pop", "threshold"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows_and_is_forgotten(policy: str, value: float) -> None:
    """A NaN or an infinity shows as in the dense model, and harms no later call."""
    spec = Transformer(layers=(Layer(block=testing.MLP(channels=12)),))
    config = popc.Config(policy=policy, sparsity=0.5, codegen="eager")
    model, clean, bad = spec.make(), torch.tensor([[1, 2, 3, 4]]), torch.tensor([[5]])
    with torch.no_grad():
        model.embedding.weight[5, 0] = value
    torch.compiler.reset()
    compiled = popc.compile(model, config)

    def run(call, tokens: list[torch.Tensor]) -> torch.Tensor:
        cache, out = DynamicCache(), []
        with torch.no_grad():
            for ids in tokens:
                out.append(call(ids, cache=cache, use_cache=True).logits[:, -1])
        return torch.cat(out)

    expected = run(compiled, [clean, bad - 4])
    shown, dense = run(compiled, [clean, bad]), run(model, [clean, bad])
    assert shown[1].isnan().all() and dense[1].isnan().all()
    poisoned = torch.cat((clean, bad), 1)
    assert run(compiled, [poisoned, bad - 4]).isnan().all()  # as keys of the cache it stays
    assert torch.equal(run(compiled, [clean, bad - 4]), expected)


def machine(policy: str, scope: str = "batch"):
    spec = Transformer(layers=(Layer(block=testing.MLP(channels=12, gated=policy == "pop")),))
    config = popc.Config(**HALF, policy=policy, scope=scope)
    return testing.session_machine(spec.make(), spec.vocabulary, config)


def quantized_machine(scope: str = "batch"):
    spec = Transformer(width=32, layers=(Layer(block=testing.MLP(channels=40, gated=False)),))
    config = popc.Config(**{**HALF, "sparsity": 0.4}, weights="int8", scope=scope)
    made = testing.session_machine(spec.make(), spec.vocabulary, config)
    assert made.readings  # some linears are read by grade
    return made


def cases(policy: str, scope: str = "batch"):
    made = (quantized_machine(scope) if policy == "graded" else machine(policy, scope)).TestCase
    made.settings = settings(examples(6, 400), stateful_step_count=12)
    return made


TestPopSessions = cases("pop")
TestContractionSessions = cases("threshold")
TestPopSessionsBySequence = cases("pop", "sequence")
TestContractionSessionsBySequence = cases("threshold", "sequence")
TestGradedSessions = cases("graded")
TestGradedSessionsBySequence = cases("graded", "sequence")


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("policy", ["pop", "threshold"])
def test_a_prefix_of_one_row_serves_several(policy: str, scope: str) -> None:
    """Each goes by what the one row left, and by its own tail from there on."""
    torch.compiler.reset()
    steps = machine(policy, scope)()
    prefix = steps.start(batch=1, length=5, seed=1)
    several = steps.repeat(generation=steps.fork(generation=prefix), times=2)
    steps.decode(generation=several, seed=2)
    steps.turn(generation=several, length=3, seed=3)
    steps.decode(generation=several, seed=4)
    steps.decode(generation=prefix, seed=5)


def test_stacked_experts_are_pruned_where_nothing_else_is() -> None:
    """Their rows tell no token from a sequence: the graph's other linears do."""
    block = MoE(experts=3, top=2, channels=8, picked=False)
    model = Transformer(layers=(Layer(Attention(kv_heads=1), block),)).make()
    ids = Prompt((5, 5)).ids(17)
    options = {"policy": "pop", "sparsity": 0.5, "targets": ("experts",), "codegen": "eager"}
    assert testing.assert_equivalent(model, ids, **options).masked

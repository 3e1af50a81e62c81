"""A compiled model in its surroundings: what is set on it, what it is a part of, what calls it."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import StaticCache

import popc
from popc import sessions
from popc.testing.oracle import MaskedAnywhere
from tests.helpers.generation import POLICIES, compiled_of, generated, prompt
from tests.helpers.models import CACHE, Gated, tiny_llama
from tests.helpers.oracle import relative

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Net(nn.Module):
    """In training mode, as all modules are at first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.gain = nn.Linear(16, 16), nn.Dropout(0.5), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.drop(self.a(x)) * self.gain, 0.5, self.training)


# --- what is set on it ---------------------------------------------------------------------------


@torch.no_grad()
def test_eval_and_train_are_seen_and_leave_the_original() -> None:
    net, x = Net(), torch.randn(1, 4, 16)
    compiled = popc.compile(net, sparsity=0.0, codegen="eager")
    assert type(compiled) is Net
    assert (compiled(x) == 0).any()
    compiled.eval()
    torch.testing.assert_close(compiled(x), net.a(x))
    assert net.training and net.drop.training and (net(x) == 0).any()
    compiled.train()
    assert (compiled(x) == 0).any()
    compiled.eval()
    net.eval()
    net.train()
    assert not compiled.training  # nothing of the original has changed in between


@torch.no_grad()
def test_attributes_and_parts_are_seen_and_leave_the_original() -> None:
    net, x = Net().eval(), torch.randn(1, 4, 16)
    compiled = popc.compile(net, sparsity=0.0, codegen="eager")
    before = compiled(x)
    compiled.gain = 3.0
    torch.testing.assert_close(compiled(x), 3 * before)
    compiled.a = nn.Linear(16, 16)
    torch.testing.assert_close(compiled(x), 3 * compiled.a(x))
    handle = compiled.register_forward_hook(lambda module, args, out: out + 1)
    torch.testing.assert_close(compiled(x), 3 * compiled.a(x) + 1)
    handle.remove()
    handle = compiled.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    torch.testing.assert_close(compiled(x), 3 * compiled.a(2 * x))
    handle.remove()
    torch.testing.assert_close(net(x), before)
    assert net.gain == 1.0 and not net._forward_hooks
    net.gain = 0.5  # whoever is the last to set it is heard
    torch.testing.assert_close(compiled(x), 0.5 * compiled.a(x))


@torch.no_grad()
def test_hooks_of_parts_are_seen_with_the_next_prompt() -> None:
    """Dynamo does not guard on them."""
    net, x = Net().eval(), torch.randn(1, 4, 16)
    compiled = popc.compile(net, sparsity=0.0, codegen="eager")
    before = compiled(x)
    handle = compiled.a.register_forward_hook(lambda module, args, out: 2 * out)
    torch.testing.assert_close(compiled(x), 2 * before)
    torch.testing.assert_close(net(x), before)
    handle.remove()
    torch.testing.assert_close(compiled(x), before)
    net.a.register_forward_pre_hook(lambda module, args: (0 * args[0],))
    torch.testing.assert_close(compiled(x), net(x))
    assert not torch.allclose(net(x), before)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_replaced_part_of_a_compiled_decoder_is_pruned(policy: str) -> None:
    model = tiny_llama()
    compiled = compiled_of(model, policy)
    before = generated(compiled, prompt(0))
    compiled.model.layers[1].mlp = copy.deepcopy(tiny_llama(seed=3).model.layers[1].mlp)
    got = generated(compiled, prompt(0))
    torch.compiler.reset()
    other = tiny_llama()
    other.model.layers[1].mlp = tiny_llama(seed=3).model.layers[1].mlp
    assert torch.equal(got, generated(compiled_of(other, policy), prompt(0)))
    torch.compiler.reset()
    assert torch.equal(generated(compiled_of(model, policy), prompt(0)), before)


def test_a_copy_has_what_was_set() -> None:
    compiled = popc.compile(Net().eval(), sparsity=0.0, codegen="eager")
    compiled.gain = 3.0
    copied, x = copy.deepcopy(compiled), torch.randn(1, 4, 16)
    with torch.no_grad():
        torch.testing.assert_close(copied(x), 3 * compiled.a(x))
        torch.testing.assert_close(popc.compile(compiled, sparsity=0.0)(x), 3 * compiled.a(x))
    assert copied.a.weight is not compiled.a.weight


def test_a_dropped_one_is_freed() -> None:
    model = tiny_llama()
    compiled = compiled_of(model)
    generated(compiled, prompt(0), 1)
    ref = weakref.ref(compiled)
    del compiled
    torch.compiler.reset()
    gc.collect()
    assert ref() is None


# --- inside anything compiled --------------------------------------------------------------------


def step(model: nn.Module, token: Tensor, cache: object) -> Tensor:
    return model(token, **{CACHE: cache}).logits[:, -1].argmax(-1, keepdim=True)


@torch.no_grad()
def tokens(model: nn.Module, call: Callable[..., Tensor], config: object) -> list[int]:
    cache, ids = StaticCache(config=config, max_cache_len=32), []
    token = step(model, prompt(0), cache)
    for _ in range(4):
        token = call(model, token.clone(), cache)
        ids.append(int(token))
    return ids


def wrapped_step(model: nn.Module) -> tuple[nn.Module, Callable[..., Tensor]]:
    return model, torch.compile(step, backend="eager")


def compiled_call(model: nn.Module) -> tuple[nn.Module, Callable[..., Tensor]]:
    model.compile(backend="eager")
    return model, step


def compiled_forward(model: nn.Module) -> tuple[nn.Module, Callable[..., Tensor]]:
    model.forward = torch.compile(model.forward, backend="eager")
    return model, step


def optimized_module(model: nn.Module) -> tuple[nn.Module, Callable[..., Tensor]]:
    return torch.compile(model, backend="eager"), step


def prepared(model: nn.Module) -> tuple[nn.Module, Callable[..., Tensor]]:
    from accelerate import Accelerator
    from accelerate.utils import TorchDynamoPlugin

    plugin = TorchDynamoPlugin(backend="eager")
    return Accelerator(cpu=True, dynamo_plugin=plugin).prepare_model(model, None, True), step


@pytest.mark.parametrize(
    "inside", [wrapped_step, compiled_call, compiled_forward, optimized_module, prepared]
)
@pytest.mark.parametrize("policy", POLICIES)
def test_it_prunes_inside_what_somebody_else_compiles(inside, policy: str) -> None:
    config = tiny_llama().config
    expected = tokens(compiled_of(tiny_llama(), policy), step, config)
    torch.compiler.reset()
    model, call = inside(compiled_of(tiny_llama(), policy))
    assert tokens(model, call, config) == expected
    assert expected != tokens(tiny_llama(), step, config)


def test_a_compiled_part_of_a_compiled_model_keeps_its_own_budget() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Gated(), Gated()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    both, x = Both().eval(), torch.randn(1, 5, 16)
    with torch.no_grad():  # else what autograd saves shares storages with the weights
        expected = both(x)
    both.first = popc.compile(both.first, policy="pop", sparsity=0.5, codegen="eager")
    compiled = popc.compile(both, policy="pop", sparsity=0.5, codegen="eager")
    compiled.second = popc.compile(both.second, policy="pop", sparsity=0.2, codegen="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected)
    assert compiled.second.popc_config.sparsity == 0.2 and compiled.second.popc_plan.regions
    assert compiled.first is both.first and both.first.popc_plan.regions


# --- generate() of a part ------------------------------------------------------------------------


class Chat(nn.Module):
    """A wrapper whose generate() is that of its part."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.lm(*args, **kwargs)

    def generate(self, *args: object, **kwargs: object) -> Tensor:
        return self.lm.generate(*args, **kwargs)


HOW = {"max_new_tokens": 8, "do_sample": False}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("depth", [1, 2])
def test_generate_of_a_part_is_pruned(policy: str, depth: int) -> None:
    expected = compiled_of(tiny_llama(), policy).generate(prompt(0), **HOW)
    dense = tiny_llama().generate(prompt(0), **HOW)
    torch.compiler.reset()
    model = tiny_llama()
    for _ in range(depth):
        model = Chat(model).eval()
    compiled = compiled_of(model, policy)
    assert torch.equal(compiled.generate(prompt(0), **HOW), expected)
    assert compiled.popc_plan.regions if policy == "pop" else compiled.popc_plan.inputs
    assert torch.equal(model.generate(prompt(0), **HOW), dense)
    assert not torch.equal(expected, dense)
    # Called as a whole it is one graph, not one in another.
    torch._dynamo.utils.counters.clear()
    assert relative(generated(compiled, prompt(0)), generated(model, prompt(0))) > 1e-2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_lora_model_generates_pruned() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_llama(), config, autocast_adapter_dtype=False).eval()
    compiled = compiled_of(model)
    dense = model.generate(input_ids=prompt(0), **HOW)
    with warnings.catch_warnings():
        warnings.simplefilter("error", popc.PopcWarning)
        got = compiled.generate(input_ids=prompt(0), **HOW)
    assert compiled.popc_plan.inputs and not torch.equal(got, dense)
    exact = compiled_of(model, sparsity=0.0)
    assert torch.equal(exact.generate(input_ids=prompt(0), **HOW), dense)


class Loop(Chat):
    """Its generate() calls a part that has none."""

    def generate(self, ids: Tensor) -> Tensor:
        return self.lm(ids)


def test_a_generate_that_calls_nothing_compiled_says_so_once() -> None:
    compiled = popc.compile(Loop(Gated()).eval(), policy="pop", codegen="eager")
    with pytest.warns(popc.PopcWarning, match=r"ran dense. Compile the part"):
        compiled.generate(torch.randn(1, 4, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled.generate(torch.randn(1, 4, 16))


@torch.no_grad()
def test_hidden_states_are_collected_once() -> None:
    model, ids = tiny_llama(), prompt(0)
    compiled = compiled_of(model)
    for _ in range(2):
        for each in (compiled, model):
            assert len(each(ids, output_hidden_states=True).hidden_states) == 3


class Nested(Chat):
    """Reaches its part from code that Dynamo does not trace; the part makes the cache."""

    @torch.compiler.disable
    def inner(self, ids: Tensor, **options: object) -> object:
        return self.lm(ids, use_cache=True, **options)

    def forward(self, ids: Tensor, **options: object) -> object:
        return self.inner(ids, **options)


@torch.no_grad()
def test_a_cache_keeps_the_session_of_the_call_that_made_it() -> None:
    alone, nested = (
        compiled_of(tiny_llama(), "pop"),
        compiled_of(Nested(tiny_llama()).eval(), "pop"),
    )
    logits = []
    for call in (alone, nested):
        options = {} if call is nested else {"use_cache": True}
        cache = call(prompt(0), **options)[CACHE]
        logits.append(call(prompt(1, 1), **{CACHE: cache}, **options).logits)
    assert torch.equal(*logits)


# --- caches that are no objects ------------------------------------------------------------------


class Buffered(nn.Module):
    """One layer whose keys and values are in buffers, as gpt-fast has it, or in tuples."""

    def __init__(self, in_buffers: bool, d: int = 32, longest: int = 24) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.in_buffers, self.mlp = in_buffers, Gated(d=d, f=64)
        self.table, self.head = nn.Embedding(96, d), nn.Linear(d, 96, bias=False)
        self.qkv, self.o = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.register_buffer("k", torch.zeros(1, 4, longest, d // 4))
        self.register_buffer("v", torch.zeros(1, 4, longest, d // 4))

    def forward(self, ids: Tensor, at: Tensor, past: tuple[Tensor, Tensor] | None = None):
        x = self.table(ids)
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.in_buffers:
            k, v = self.k.index_copy_(2, at, k), self.v.index_copy_(2, at, v)
        elif past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        mask = torch.arange(k.shape[2])[None] <= at[:, None]
        h = F.scaled_dot_product_attention(q, k, v, mask)
        x = x + self.o(h.transpose(1, 2).flatten(2))
        return self.head(x + self.mlp(x)), (k, v)


@torch.no_grad()
def decoded(call: Callable[..., tuple[Tensor, tuple[Tensor, Tensor]]], in_buffers: bool) -> Tensor:
    ids, past, outputs = prompt(0, 8), None, []
    for number in range(5):
        at = torch.arange(8) if not number else torch.tensor([7 + number])
        rest = () if in_buffers or past is None else (past,)
        logits, past = call(ids, at, *rest)
        outputs.append(logits[:, -1].clone())
        ids = outputs[-1].argmax(-1, keepdim=True)
    return torch.stack(outputs)


@pytest.mark.parametrize("in_buffers", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
def test_caches_that_are_tensors_are_followed(policy: str, in_buffers: bool) -> None:
    options = {"policy": policy, "sparsity": 0.5, "codegen": "eager"}
    model = Buffered(in_buffers).eval()
    dense = decoded(model, in_buffers)
    outputs = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", popc.PopcWarning)
        for way in (
            lambda m: popc.compile(m, **options),
            lambda m: torch.compile(m, backend="popc", options=options),
        ):
            torch.compiler.reset()
            call = way(Buffered(in_buffers).eval())
            outputs += [decoded(call, in_buffers)]
            if in_buffers:
                call.k.zero_()
                call.v.zero_()
            outputs += [decoded(call, in_buffers)]
    assert all(torch.equal(outputs[0], other) for other in outputs)
    assert torch.equal(outputs[0][0], dense[0]) and relative(outputs[0], dense) > 1e-2


def test_a_cache_that_was_filled_elsewhere_is_warned_of_once() -> None:
    model = tiny_llama()
    compiled = compiled_of(model)
    with torch.no_grad():
        cache = model(prompt(0), use_cache=True)[CACHE]
        options = {CACHE: cache, "use_cache": True}
        with pytest.warns(popc.PopcWarning, match="nothing is known of its prompt"):
            compiled(prompt(1, 1), **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error", popc.PopcWarning)
            compiled(prompt(2, 1), **options)


# --- prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("length", [9, 10])
def test_the_last_chunk_of_a_prompt_may_be_of_one_token(policy: str, length: int) -> None:
    model, compiled = tiny_llama(), compiled_of(tiny_llama(), policy)
    ids = prompt(0, length)
    how = {**HOW, "output_logits": True, "return_dict_in_generate": True}
    chunked = compiled.generate(ids, prefill_chunk_size=4, **how)
    whole = compiled.generate(ids, **how)
    dense = model.generate(ids, max_new_tokens=1, **{k: v for k, v in how.items() if k[0] != "m"})
    assert relative(chunked.logits[0], dense.logits[0]) < 1e-5
    if policy == "pop":
        assert torch.equal(chunked.sequences, whole.sequences)
        for got, expected in zip(chunked.logits, whole.logits, strict=True):
            assert relative(got, expected) < 1e-4


@torch.no_grad()
def test_a_loop_of_ones_own_says_what_its_prompt_is() -> None:
    compiled, ids = compiled_of(tiny_llama(), "pop"), prompt(0, 9)

    def after(chunks: tuple[int, ...]) -> Tensor:
        cache = StaticCache(config=compiled.config, max_cache_len=16)
        with popc.prefill():
            for chunk in ids.split(chunks, 1):
                compiled(chunk, **{CACHE: cache})
        return compiled(prompt(1, 1), **{CACHE: cache}).logits

    assert relative(after((4, 4, 1)), after((9,))) < 1e-4


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_first_call_says_what_the_tenth_does(policy: str, breaks: bool) -> None:
    model = tiny_llama()
    if breaks:
        for layer in model.model.layers:
            layer.self_attn.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    compiled = compiled_of(model, policy)
    first = [generated(compiled, prompt(seed, 7 + seed), 6) for seed in range(3)]
    for _ in range(3):
        again = [generated(compiled, prompt(seed, 7 + seed), 6) for seed in range(3)]
        assert all(map(torch.equal, first, again))
    assert relative(first[0], generated(tiny_llama(), prompt(0, 7), 6)) > 1e-2


def test_a_cache_that_breaks_graphs_decodes_the_same_each_time() -> None:
    pytest.importorskip("hqq")
    from transformers import QuantizedCache

    model = tiny_llama(head_dim=64, num_hidden_layers=1)
    how = {"nbits": 4, "axis_key": 1, "axis_value": 1, "q_group_size": 32, "residual_length": 8}
    compiled = compiled_of(model, sparsity=0.4)
    outputs = [
        compiled.generate(
            prompt(0, 12),
            max_new_tokens=12,
            do_sample=False,
            past_key_values=QuantizedCache("hqq", model.config, **how),
        )
        for _ in range(3)
    ]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


# --- a prefix that several prompts share ---------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("tail", [0, 3])
@torch.no_grad()
def test_one_row_that_is_repeated_keeps_its_statistics(policy: str, tail: int) -> None:
    from transformers import DynamicCache

    compiled = compiled_of(tiny_llama(), policy, scope="sequence")

    def after(rows: int, repeat: bool) -> Tensor:
        cache = DynamicCache()
        options = {CACHE: cache, "use_cache": True}
        compiled(prompt(0, 20).expand(1 if repeat else rows, -1), **options)
        if repeat and rows > 1:
            cache.batch_repeat_interleave(rows)
        if tail:
            compiled(prompt(1, tail).expand(rows, -1), **options)
        return compiled(prompt(2, 1).expand(rows, -1), **options).logits

    alone, repeated, from_start = after(1, True), after(3, True), after(3, False)
    for row in range(3):
        assert relative(repeated[row], alone[0]) < 1e-4
        assert relative(from_start[row], alone[0]) < 1e-4


class Pieces(nn.Module):
    """Two MLPs. Dynamo breaks the graph of a prompt between the channels of the first, so that
    nothing is known of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Gated(), Gated()

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.first.a(x)) * self.first.b(x)
        if x.shape[1] > 1:
            torch._dynamo.graph_break()
        return self.second(self.first.c(h))


@torch.no_grad()
def test_what_no_prompt_measured_is_dense_and_the_rest_is_pruned() -> None:
    model, x = Pieces().eval(), torch.randn(1, 9, 16)
    options = {"policy": "pop", "sparsity": 0.5, "codegen": "eager"}
    compiled, session = torch.compile(model, backend="popc", options=options), sessions.Session()
    with sessions.use(session):
        torch.testing.assert_close(compiled(x), model(x))
        with pytest.warns(popc.PopcWarning, match="1 of 3 regions"):
            got = compiled(x[:, :1])
        again = compiled(x[:, :1])
    regions = [
        r for r in popc.analyze(model, (x[:, :1],)).regions if r.key in session.units.regions
    ]
    assert len(regions) == 2  # the outputs of the first are the inputs of the second
    oracle = MaskedAnywhere(model, popc.Plan(regions=regions), popc.Config(**options))
    with oracle:
        oracle.begin()
        model(x)
        oracle.begin(False)
        expected = model(x[:, :1])
    assert torch.equal(got, again) and relative(got, expected) < 1e-5
    assert relative(expected, model(x[:, :1])) > 1e-2

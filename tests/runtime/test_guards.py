"""``guards="prompt"``: a decode step does not look at the model, and a changed one is noticed."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import DynamicCache, StaticCache

import popc
from popc.errors import ConfigError
from popc.quant import QuantizedTensor
from popc.runtime.guards import KeptGuards
from tests.helpers.generation import POLICIES, compiled_of, generated, prompt
from tests.helpers.models import tiny_llama

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def kept(caplog: pytest.LogCaptureFixture) -> list[tuple[int, int]]:
    """How many guards decode steps keep, of how many, one after the other."""
    pairs = re.findall(r"a decode step keeps (\d+) of (\d+) guards", caplog.text)
    return [(int(some), int(whole)) for some, whole in pairs]


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def epsilon(model: nn.Module, value: float = 9.0) -> None:
    model.model.norm.variance_epsilon = value


def activation(model: nn.Module) -> None:
    model.model.layers[1].mlp.act_fn = nn.ReLU()


def scaling(model: nn.Module) -> None:
    model.model.layers[0].self_attn.scaling = 0.9


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_leaves_out_what_its_prompt_checks(
    policy: str, static: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def cache(model: nn.Module):
        return StaticCache(config=model.config, max_cache_len=32) if static else DynamicCache()

    model = tiny_llama()
    whole, before = compiled_of(model, policy), graphs()
    expected = [generated(whole, prompt(i, 9 + 4 * i), cache=cache(model)) for i in range(3)]
    after = graphs()
    torch.compiler.reset()
    with caplog.at_level(logging.INFO, "popc"):
        compiled = compiled_of(model, policy, guards="prompt")
        got = [generated(compiled, prompt(i, 9 + 4 * i), cache=cache(model)) for i in range(3)]
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
    # Prompts of other lengths are no change of the model.
    assert graphs() - after == after - before
    assert "after all" not in caplog.text
    assert kept(caplog)
    # What is left is of the cache, a few for each layer, and of the call.
    assert all(some < 0.3 * of for some, of in kept(caplog))


@pytest.mark.parametrize("change", [epsilon, activation, scaling])
def test_a_change_is_noticed_with_the_next_prompt(change: Callable[[nn.Module], None]) -> None:
    model = tiny_llama()
    compiled = compiled_of(model, guards="prompt")
    before = generated(compiled, prompt(0))
    change(model)
    got = generated(compiled, prompt(0))
    again = generated(compiled, prompt(0))
    torch.compiler.reset()
    changed = tiny_llama()
    change(changed)
    expected = generated(compiled_of(changed), prompt(0))
    assert torch.equal(got, expected)
    assert torch.equal(again, expected)
    assert not torch.allclose(got, before, atol=1e-3)


def test_changes_to_and_fro_are_noticed(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama()
    compiled, whole = compiled_of(model, guards="prompt"), compiled_of(tiny_llama())
    mlp = model.model.layers[1].mlp
    plain, other = mlp.act_fn, nn.ReLU()
    first = generated(whole, prompt(0))
    activation(whole)
    second = generated(whole, prompt(0))
    with caplog.at_level(logging.WARNING, "popc"):
        for i in range(3):
            for mlp.act_fn, expected in ((plain, first), (other, second)):
                assert torch.equal(generated(compiled, prompt(0)), expected)
                assert torch.equal(generated(compiled, prompt(0)), expected)
            assert ("again and again" in caplog.text) == (i > 0)


class Scaled(nn.Module):
    """Its decode steps read what its prompts do not."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_llama()
        self.config = self.inner.config
        self.factor = 1.0

    def forward(self, input_ids: Tensor, **options: object) -> object:
        out = self.inner(input_ids, **options)
        if input_ids.shape[1] == 1:
            out.logits = out.logits * self.factor
        return out


def test_what_no_prompt_reads_is_guarded_at_each_token() -> None:
    model = Scaled().eval()
    compiled = compiled_of(model, guards="prompt")
    before = generated(compiled, prompt(0))
    model.factor = 2.0
    got = generated(compiled, prompt(0))
    assert torch.equal(got[:, 0], before[:, 0])
    torch.testing.assert_close(got[:, 1], 2 * before[:, 1])


class Asking(Scaled):
    """Its prompts ask whether a dict has one key, its steps for another."""

    extra: dict[str, int]

    def forward(self, input_ids: Tensor, **options: object) -> object:
        out = self.inner(input_ids, **options)
        name = "twice" if input_ids.shape[1] == 1 else "once"
        if name in self.extra:
            out.logits = out.logits * 2
        return out


def test_what_a_guard_asks_for_counts() -> None:
    model = Asking().eval()
    model.extra = {"never": 1}
    compiled = compiled_of(model, guards="prompt")
    before = generated(compiled, prompt(0))
    del model.extra["never"]
    model.extra["twice"] = 1
    got = generated(compiled, prompt(0))
    assert torch.equal(got[:, 0], before[:, 0])
    torch.testing.assert_close(got[:, 1], 2 * before[:, 1])


class Counting(Scaled):
    """Each call goes by what the one before left."""

    def forward(self, input_ids: Tensor, **options: object) -> object:
        out = self.inner(input_ids, **options)
        self.factor = 3.0 - self.factor  # 1, 2, 1, 2
        if self.factor > 1.5:
            out.logits = out.logits * 2
        return out


def test_a_model_that_changes_itself_keeps_its_guards(caplog: pytest.LogCaptureFixture) -> None:
    whole = compiled_of(Counting().eval())
    expected = [generated(whole, prompt(0), 7) for _ in range(2)]
    torch.compiler.reset()
    with caplog.at_level(logging.WARNING, "popc"):
        compiled = compiled_of(Counting().eval(), guards="prompt")
        assert all(torch.equal(generated(compiled, prompt(0), 7), one) for one in expected)
    assert "changes itself" in caplog.text
    # Every second row is doubled.
    assert not torch.allclose(expected[0][:, 1], expected[0][:, 2], rtol=0.2)


class Named(Scaled):
    """Takes an argument with the name that the model has in guards."""

    def forward(self, input_ids: Tensor, popc_forward: float, **options: object) -> object:
        out = self.inner(input_ids, **options)
        out.logits = out.logits * popc_forward
        return out


def test_an_argument_is_no_model_whatever_its_name() -> None:
    model = Named().eval()
    compiled = compiled_of(model, guards="prompt")

    def logits(factor: float) -> Tensor:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            compiled(prompt(0), popc_forward=1.0, past_key_values=cache)
            return compiled(prompt(0)[:, :1], popc_forward=factor, past_key_values=cache).logits

    torch.testing.assert_close(3 * logits(1.0), logits(3.0))


doubled = False


class Alternating(Scaled):
    """Each call goes by a global that the one before wrote to."""

    def forward(self, input_ids: Tensor, **options: object) -> object:
        global doubled
        out = self.inner(input_ids, **options)
        out.logits = out.logits * (2 if doubled else 1)
        doubled = not doubled
        return out


def test_a_global_that_calls_write_to_is_guarded(caplog: pytest.LogCaptureFixture) -> None:
    global doubled
    outputs = []
    for options in ({}, {"guards": "prompt"}):
        torch.compiler.reset()
        doubled = False
        compiled = compiled_of(Alternating().eval(), **options)
        with caplog.at_level(logging.INFO, "popc"):
            outputs.append([generated(compiled, prompt(0), 7) for _ in range(2)])
    assert all(map(torch.equal, *outputs))
    assert not torch.allclose(outputs[0][0][:, 1], outputs[0][0][:, 2], rtol=0.2)
    assert any(some < of for some, of in kept(caplog))  # the model's are left out all the same


class Broken(Scaled):
    """Dynamo breaks its graph in two."""

    def forward(self, input_ids: Tensor, **options: object) -> object:
        out = self.inner.model(input_ids, **options)
        torch._dynamo.graph_break()
        out.logits = self.inner.lm_head(out.last_hidden_state)
        return out


def test_graphs_in_pieces_are_right() -> None:
    model = Broken().eval()
    expected = generated(compiled_of(model), prompt(0))
    torch.compiler.reset()
    compiled = compiled_of(model, guards="prompt")
    for change in (lambda _: None, epsilon):
        change(model.inner)
        got = generated(compiled, prompt(0))
        assert torch.equal(got, generated(compiled_of(model), prompt(0)))
    assert not torch.allclose(got, expected, atol=1e-3)


def test_torch_compile_makes_the_guards_itself() -> None:
    compiled = torch.compile(tiny_llama(), backend="popc", options={"guards": "prompt"})
    with torch.no_grad(), pytest.raises(Exception, match="guards='prompt' is not allowed"):
        compiled(prompt(0))
    with pytest.raises(ConfigError, match="'token', 'prompt'"):
        popc.Config(guards="never")


def test_what_a_quantised_weight_holds_is_not_guarded_on(monkeypatch) -> None:
    left_out = []
    keep = KeptGuards.__call__

    def record(self: KeptGuards, entries: list) -> list[bool]:
        kept = keep(self, entries)
        left_out.append(
            [entry for entry, is_kept in zip(entries, kept, strict=True) if not is_kept]
        )
        return kept

    monkeypatch.setattr(KeptGuards, "__call__", record)
    model = tiny_llama()
    compiled = popc.compile(model, weights="int8", codegen="eager")
    compiled.generate(torch.arange(3, 12)[None], max_new_tokens=3, do_sample=False)
    prompt, step = left_out
    weights = sum(isinstance(p, QuantizedTensor) for p in compiled.parameters())
    assert not prompt, "it was traced on the model's own weights"
    kinds = Counter(entry.guard_type for entry in step)
    assert set(kinds.values()) == {weights} and len(kinds) == 3
    before = len(left_out)
    compiled.lm_head.weight = nn.Parameter(torch.zeros_like(model.lm_head.weight))
    assert not compiled(torch.arange(3, 12)[None]).logits.any(), "another weight is noticed"
    assert len(left_out) == before + 1

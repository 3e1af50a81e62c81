"""Architectures nobody tuned for: regions as an expert counts them, pruned equal to the oracle."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

import popc
from popc.compat import cache_keyword
from popc.testing.oracle import MaskedAnywhere
from tests.helpers.oracle import relative
from tests.helpers.profiles import THOROUGH, few
from tests.helpers.support import PAGE, START, with_table
from tests.helpers.zoo import ZOO, Entry

CONFIG = popc.Config(
    policy="pop",
    sparsity=0.5,
    candidate=0.25,
    targets=("mlp", "attention", "experts"),
    codegen="eager",
)
INDUCTOR = {"codegen": "inductor"}
CACHES = ("cache", "past_key_values", "cache_params", "state")


def result(out: object) -> Tensor:
    """Logits, or the first tensor that the model gives."""
    logits = getattr(out, "logits", None)
    if logits is not None:
        return logits
    return next(v for v in out.values() if isinstance(v, Tensor) and v.dim())


def steps(entry: Entry, model: nn.Module, call, begin=lambda first: None, follow=None):
    """The first call, then two of one token: greedy ones, or those in ``follow``."""
    names = inspect.signature(model.forward).parameters
    keyword = next((k for k in CACHES if k in names), None) or cache_keyword(model.forward)
    inputs = entry.inputs(model)
    begin(True)
    if entry.kind == "encoder":
        return [result(call(**inputs))], []
    out = first = call(**inputs, use_cache=True)
    results, tokens = [result(out)], []
    for step in range(2):
        begin(False)
        cache = next(getattr(out, k) for k in CACHES if getattr(out, k, None) is not None)
        token = follow[step] if follow else result(out)[:, -1:].argmax(-1)
        tokens.append(token)
        if entry.kind == "seq2seq":
            state = BaseModelOutput(last_hidden_state=first.encoder_last_hidden_state)
            more = {"decoder_input_ids": token, "encoder_outputs": state}
        else:
            more = {"input_ids": token}
        out = call(**more, use_cache=True, **{keyword: cache})
        results.append(result(out))
    return results, tokens


def first_call_compiled(entry: Entry, model: nn.Module) -> tuple[Tensor, Tensor]:
    """By popc at sparsity 0, and by torch.compile; the model itself gives something else."""
    inputs = entry.inputs(model)
    with torch.no_grad():
        torch._dynamo.reset()
        compiled = result(torch.compile(model, backend="eager")(**inputs))
        torch._dynamo.reset()
        popcs = result(popc.compile(model, sparsity=0, codegen="eager")(**inputs))
        assert relative(compiled, result(model(**inputs))) > 1e-2
    return popcs, compiled


def unlike() -> list[Entry]:
    """The first of each kind in which the same is found, and refused; all with POPC_THOROUGH=1."""
    first: dict[tuple[object, ...], Entry] = {}
    for entry in ZOO:
        first.setdefault((entry.kind, *map(bool, entry.expected), any(entry.refused)), entry)
    return list(ZOO) if THOROUGH else list(first.values())


@pytest.mark.parametrize("entry", unlike(), ids=lambda entry: entry.name)
def test_counts_and_oracle(entry: Entry) -> None:
    torch._dynamo.reset()
    model = entry.make()
    plan = popc.analyze(model, (), entry.inputs(model))
    counted = tuple(plan.count(kind) for kind in ("mlp", "attention", "experts"))
    assert counted == entry.expected, [skip for skip in plan.skipped if "unit" not in skip.reason]
    with torch.no_grad():
        torch._dynamo.reset()
        compiled = popc.compile(model, CONFIG)
        pruned, tokens = steps(entry, model, compiled)
        # The units that the first call shows; a later one may find what no prompt has measured.
        oracle = MaskedAnywhere(model, plan, CONFIG)
        with oracle:
            expected, _ = steps(entry, model, model, oracle.begin, tokens)
        dense, _ = steps(entry, model, model, follow=tokens)
    if not entry.traced_right:
        # torch.compile itself gives other numbers than the model: then popc gives its numbers.
        assert relative(*first_call_compiled(entry, model)) < 1e-4
        return
    for step, (a, b) in enumerate(zip(pruned, expected, strict=True)):
        assert relative(a, b) < 1e-3, f"step {step}"
    shows = max(relative(a, b) for a, b in zip(expected, dense, strict=True))
    assert (oracle.masked > 0) == (shows > 1e-2), "pruning must show where there is any"


def chosen() -> list[Entry]:
    """The first of each kind; all with POPC_THOROUGH=1."""
    first: dict[str, Entry] = {}
    for entry in ZOO:
        first.setdefault(entry.kind, entry)
    return list(ZOO) if THOROUGH else list(first.values())


def entries_to_compile() -> list[Entry]:
    """Decoders run compiled in other tests."""
    return [entry for entry in chosen() if THOROUGH or entry.kind != "causal"]


@pytest.mark.parametrize("entry", entries_to_compile(), ids=lambda entry: entry.name)
def test_two_greedy_steps_run_compiled(entry: Entry) -> None:
    """Generated code gives what the rewritten graph gives, node by node."""
    torch._dynamo.reset()
    model = entry.make()
    with torch.no_grad():
        outputs, tokens = steps(entry, model, popc.compile(model, replace(CONFIG, **INDUCTOR)))
        torch._dynamo.reset()
        expected, _ = steps(entry, model, popc.compile(model, CONFIG), follow=tokens)
    for step, (a, b) in enumerate(zip(outputs, expected, strict=True)):
        assert relative(a, b) < 1e-3, f"step {step}"


@pytest.mark.parametrize("entry", few(chosen(), 2), ids=lambda entry: entry.name)
def test_a_threshold_that_leaves_little_out_is_dense(entry: Entry) -> None:
    """By the default policy; at half of the bytes it shows."""
    torch._dynamo.reset()
    model = entry.make()
    little = popc.Config(budget="elastic", mass=1 - 1e-9, sparsity=0.01, candidate=0.0, count=True)
    with torch.no_grad():
        compiled = popc.compile(
            model, little, codegen="eager", targets=("mlp", "attention", "other")
        )
        pruned, tokens = steps(entry, model, compiled)
        torch._dynamo.reset()
        half = popc.compile(model, sparsity=0.5, codegen="eager")
        less, _ = steps(entry, model, half, follow=tokens)
        dense, _ = steps(entry, model, model, follow=tokens)
    if not entry.traced_right:
        return
    assert all(step.isfinite().all() for step in less)
    if entry.kind == "encoder":
        assert not compiled.popc_plan.inputs or relative(pruned[0], dense[0]) < 1e-4
        return
    assert compiled.popc_plan.inputs
    for step, (a, b) in enumerate(zip(pruned, dense, strict=True)):
        assert relative(a, b) < 1e-2, f"step {step}"
    shows = max(relative(a, b) for a, b in zip(less, dense, strict=True)) > 1e-2
    assert shows or not any(entry.expected)  # without regions, weights may change as it runs


def test_the_support_page_has_the_table() -> None:
    text = PAGE.read_text()
    assert START in text
    assert with_table(text) == text, "run: python -m tests.helpers.support"


def test_the_zoo_is_wide() -> None:
    names = [entry.name for entry in ZOO]
    assert len(set(names)) == len(names) >= 100

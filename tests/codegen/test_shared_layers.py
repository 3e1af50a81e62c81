"""Models in pieces: the same logits, bit for bit, as their graphs as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from transformers import LlamaConfig, LlamaForCausalLM

import popc
from popc import backend
from popc.codegen import generate, repeats
from popc.codegen.outline import Outline
from popc.runtime.interpreter import Interpreted
from tests.helpers.zoo import Entry
from tests.test_zoo import steps, unlike


class Watch:
    """What graphs were cut into."""

    def __init__(self) -> None:
        self.graphs: list[int] = []  # of each, how often its most repeated piece is called

    def outline(self, gm: fx.GraphModule) -> Outline | None:
        cut = generate_outline(gm)
        pieces = () if cut is None else range(len(cut.pieces))
        self.graphs.append(1 if cut is None else max(map(cut.repetitions, pieces)))
        return cut


generate_outline = generate.outline


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    made = Watch()
    monkeypatch.setattr(generate, "outline", made.outline)
    return made


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces are interpreted, and of two layers each pair is shared."""
    monkeypatch.setattr(repeats, "MIN_COUNT", 2)

    def inductor(self: Any, graph: fx.GraphModule, inputs: Sequence[Any], options: Any) -> Any:
        return Interpreted(graph)

    monkeypatch.setattr(backend._Codegen, "_inductor", inductor)


def logits_of(entry: Entry, tokens: Sequence[Tensor] | None, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = entry.make()
    with torch.no_grad():
        return steps(entry, model, popc.compile(model, **options), follow=tokens)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("entry", unlike(), ids=lambda entry: entry.name)
def test_the_same_logits_with_and_without(entry: Entry) -> None:
    whole, tokens = logits_of(entry, None, sparsity=0.3, codegen="eager")
    pieces, _ = logits_of(entry, tokens or None, sparsity=0.3)
    for step, (one, other) in enumerate(zip(pieces, whole, strict=True)):
        assert torch.equal(one, other), f"step {step}"


CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}


@pytest.mark.parametrize(("weights", "cache"), [(None, None), ("int8", "static")])
def test_a_model_compiled_in_pieces(
    weights: str | None, cache: str | None, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_cpp: list[bool] = []  # of each piece

    def inductor(self: Any, graph: fx.GraphModule, inputs: Sequence[Any], options: Any) -> Any:
        in_cpp.append(options.get("cpp_wrapper", False))
        return plain_inductor(self, graph, inputs, options)

    plain_inductor = backend._Codegen._inductor
    monkeypatch.setattr(backend._Codegen, "_inductor", inductor)
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
    prompt = torch.randint(0, 128, (2, 9))

    def generated(compiled: Any) -> tuple[Tensor, Tensor]:
        out = compiled.generate(
            prompt,
            max_new_tokens=6,
            do_sample=False,
            cache_implementation=cache,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return out.sequences, torch.stack(out.logits)

    options: dict[str, Any] = {"weights": weights, "sparsity": 0.3}
    tokens, logits = generated(popc.compile(model, **options))
    assert watch.graphs and set(watch.graphs) == {4}
    # Of each graph three pieces; of a decode step the layer.
    assert len(in_cpp) == 3 * len(watch.graphs) and any(in_cpp) and not all(in_cpp)
    torch._dynamo.reset()
    expected_tokens, expected = generated(popc.compile(model, codegen="eager", **options))
    assert torch.equal(tokens, expected_tokens)
    assert (logits - expected).norm() < 1e-3 * expected.norm()

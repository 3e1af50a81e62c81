"""SmolLM2-135M on real text."""

from __future__ import annotations

import pytest
import torch

import popc
from popc.models import load_model
from popc.tools import text
from tests.helpers.generation import oracle_run, run
from tests.helpers.oracle import relative
from tests.helpers.profiles import THOROUGH, few


@pytest.fixture(scope="module")
def smollm2():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return load_model()


def test_every_layer_is_a_region(smollm2) -> None:
    model, _ = smollm2
    plan = popc.analyze(model)
    assert [r.units for r in plan.regions if r.kind == "mlp"] == [1536] * 30
    assert [r.units for r in plan.regions if r.kind == "attention"] == [3] * 30
    assert plan.breaks == []
    config = popc.Config(policy="pop", sparsity=0.4, candidate=0.1)
    assert plan.decode_share(config) == pytest.approx((2 * 0.65 + 0.6) / 3, abs=1e-3)


@pytest.mark.parametrize("candidate", few([0.1, 0.4], 1))
def test_is_the_oracle_on_real_text(smollm2, candidate: float) -> None:
    """In float64, so that rounding does not decide between near-equal scores of 46,080 channels."""
    _, tokenizer = smollm2
    model, _ = load_model(dtype=torch.float64)
    if not THOROUGH:
        del model.model.layers[10:]
        model.config.num_hidden_layers = 10
    ids = text.windows(tokenizer, 1, 80)
    config = popc.Config(policy="pop", sparsity=0.4, candidate=candidate, codegen="eager")
    torch._dynamo.reset()
    expected = oracle_run(model, config, ids, 64)
    assert relative(run(popc.compile(model, config), ids, 64), expected) < 1e-4
    assert not torch._dynamo.utils.counters["graph_break"]


def test_the_text_is_real() -> None:
    articles = text.wikipedia_articles()
    assert 80 <= len(articles) <= 110
    assert all("{{" not in article[:2000] for article in articles[:20])

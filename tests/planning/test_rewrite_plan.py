"""What is measured and pruned in a graph, also where the layout pass refuses some of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

import popc
from popc import sessions
from tests.helpers.generation import prompt
from tests.helpers.models import CACHE, tiny_llama

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def test_a_refused_head_takes_no_statistics_from_the_rest() -> None:
    """A prompt's tied head sees one token, as ``generate`` asks for its last logits alone."""
    model = tiny_llama(tie_word_embeddings=True)
    targets = ("mlp", "attention", "other", "head")
    options = {"targets": targets, "sparsity": 0.5, "codegen": "eager"}
    compiled = popc.compile(model, policy="threshold", **options)
    cache = DynamicCache()
    with torch.no_grad():
        compiled(prompt(length=9), **{CACHE: cache}, logits_to_keep=1)
        statistics = sessions.of_cache(cache).inputs
        measured = [statistics.histogram(group.key, "batch") for group in compiled.popc_plan.inputs]
        assert len(measured) == 8 and all(histogram is not None for histogram in measured)
        assert {skip.name for skip in compiled.popc_plan.skipped if skip.kind == "layout"} == {
            "lm_head"
        }
        compiled(prompt(length=1), **{CACHE: cache})
    assert len(statistics.thresholds) == 8


class WithContext(nn.Module):
    """An MLP on a token, and one on a context, whose weight is tied, in the same graph."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.context, self.table = nn.Linear(32, 64), nn.Embedding(32, 64)

    def forward(self, x: Tensor, context: Tensor, ids: Tensor) -> Tensor:
        seen = F.linear(F.silu(self.context(context)), self.table.weight)
        return (
            self.down(F.silu(self.up(x))) + seen.mean(1, keepdim=True) + self.table(ids)[..., :32]
        )


def test_a_graph_whose_rest_is_refused_is_one_of_decode_steps() -> None:
    """So a token that is said to be of a prompt is measured in it, dense."""
    model = WithContext().eval()
    compiled = popc.compile(model, policy="pop", sparsity=0.4, codegen="eager")

    def call(tokens: int) -> float:
        context, ids = torch.randn(1, 7, 32), torch.zeros(1, tokens, dtype=torch.int64)
        compiled(torch.randn(1, tokens, 32), context, ids)
        (sums,) = (session.units.statistics(key, "batch") for key in session.units.regions)
        return float(sums.sum())

    session = sessions.Session()
    with torch.no_grad(), sessions.use(session):
        before = call(5)
        with popc.prefill():
            assert call(1) > before
    assert any(skip.kind == "layout" for skip in compiled.popc_plan.skipped)


def test_a_cache_that_an_earlier_version_pickled_has_its_class() -> None:
    with pytest.warns(DeprecationWarning, match="popc.sessions"):
        from popc.runtime import sessions as earlier
    assert earlier.Session is sessions.Session


def test_earlier_names_of_a_session_serve_on() -> None:
    session = sessions.Session()
    with pytest.warns(DeprecationWarning, match=r"Session.inputs.reads"):
        assert session.reads is session.inputs.reads
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(session, "nothing")  # noqa: B009

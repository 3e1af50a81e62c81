"""Mask pass: attentions that share a mask read one mask of numbers, and give what they gave."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import popc
from popc.analysis.capture import capture_module
from popc.ops import additive_mask
from popc.passes.dense.hoist_masks import hoist_masks
from popc.planning.rewrite_plan import RewritePlan
from popc.runtime.interpreter import Interpreted
from tests.helpers.checks import assert_meta_is_true
from tests.helpers.models import tiny_llama
from tests.helpers.oracle import relative

TOKENS = 5


def causal() -> Tensor:
    return torch.ones(1, 1, TOKENS, TOKENS).tril().bool()


class Layers(nn.Module):
    """Attentions of x to itself, one after the other."""

    def __init__(self, count: int = 3, expand: bool = False, positional: bool = True) -> None:
        super().__init__()
        self.count, self.expand, self.positional = count, expand, positional

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for _ in range(self.count):
            attn_mask = mask.expand(len(x), -1, -1, -1) if self.expand else mask
            if self.positional:
                x = scaled_dot_product_attention(x, x, x, attn_mask) + x
            else:
                x = scaled_dot_product_attention(x, x, x, attn_mask=attn_mask, scale=0.5) + x
        return x


def shared(module: nn.Module, x: Tensor, mask: Tensor) -> int:
    """How many masks of numbers there are, once the graph is seen to give what the module gives."""
    captured = capture_module(module, (x, mask))
    made = hoist_masks(captured, RewritePlan()).matches
    (y,) = assert_meta_is_true(captured.gm, module, x, mask)
    assert relative(y, module(x, mask)) < 1e-6
    count = len(captured.gm.graph.find_nodes(op="call_function", target=additive_mask))
    assert made == count
    return count


@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("positional", [False, True])
def test_one_mask_serves_all(expand: bool, positional: bool) -> None:
    assert shared(Layers(3, expand, positional), torch.randn(2, 3, TOKENS, 8), causal()) == 1


def test_a_token_that_sees_nothing_stays_so() -> None:
    mask = causal()
    mask[..., 2, :] = False
    assert shared(Layers(), torch.randn(2, 3, TOKENS, 8), mask) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_it_has_the_type_of_the_queries(dtype: torch.dtype) -> None:
    assert shared(Layers(), torch.randn(2, 3, TOKENS, 8, dtype=dtype), causal()) == 1


def test_what_gains_nothing_is_left() -> None:
    x = torch.randn(2, 3, TOKENS, 8)
    assert shared(Layers(1), x, causal()) == 0
    assert shared(Layers(), x, torch.zeros(1, 1, TOKENS, TOKENS)) == 0  # numbers already
    assert shared(Layers(), x[:, :, :1], causal()[:, :, :1, :1]) == 0  # a decode step


class Rewritten(nn.Module):
    """Its mask changes between two attentions."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        copied = mask.clone()
        x = scaled_dot_product_attention(x, x, x, copied)
        copied[..., 0].fill_(False)
        return scaled_dot_product_attention(x, x, x, copied)


def test_a_mask_that_changes_in_between_is_left() -> None:
    mask = causal()
    mask[..., 1] = True
    assert shared(Rewritten(), torch.randn(2, 3, TOKENS, 8), mask) == 0


def test_a_prefill_has_one(monkeypatch) -> None:
    torch.compiler.reset()
    counts: list[int] = []

    def noting(gm: torch.fx.GraphModule) -> Interpreted:
        counts.append(len(gm.graph.find_nodes(op="call_function", target=additive_mask)))
        return Interpreted(gm)

    monkeypatch.setattr("popc.backend.Interpreted", noting)
    model = tiny_llama()
    compiled = popc.compile(model, sparsity=0.4, codegen="eager")
    ids = torch.arange(1, 13)[None].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with torch.no_grad():
        got = compiled(ids, attention_mask=mask).logits
        assert relative(got, model(ids, attention_mask=mask).logits) < 1e-5
    assert counts == [1]

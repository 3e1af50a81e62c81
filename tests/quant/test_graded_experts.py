"""Experts read their channels by grade: as an eager model does that is written out by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import DynamicCache

import popc
from popc import ops, sessions
from popc.quant import QuantizedTensor
from popc.testing import assert_equivalent
from tests.helpers.generation import prompt, step
from tests.helpers.oracle import PLANES, relative
from tests.helpers.quantized import (
    counted_ops,
    tiny_gpt_oss,
    tiny_mixtral,
    tiny_qwen_moe,
    with_values_of,
)

pytestmark = pytest.mark.usefixtures("fresh_compiler")

OPTIONS = {"weights": "int8", "targets": ("experts",), "codegen": "eager", "count": True}
HIGH = (2 + 16) / (2 + 32)  # of a block's bytes: its scale, and one or two planes
MODELS = [tiny_mixtral, tiny_qwen_moe]
TOKENS = [7, 11, 5]


def read(stack: QuantizedTensor, bits: int) -> Tensor:
    stored = list(stack.stored.sizes), stack.stored.row_dim, stack.stored.planes, torch.float32
    return ops.dequantize(stack.packed, None, None, *stored, bits)


class Graded:
    """One stack of experts; ``by_grade`` is whether a policy of two grades reads it."""

    def __init__(self, stack: QuantizedTensor, threshold: float, by_grade: bool) -> None:
        self.both, self.coarse, self.threshold = read(stack, 8), read(stack, 4), threshold
        norm = self.both.norm(dim=1)  # [E, K]
        error = ((self.coarse - self.both).norm(dim=1) / norm).square()
        self.high = norm * (1 - error).clamp(min=HIGH).sqrt() if by_grade else norm
        self.low = norm * (error * HIGH / (1 - HIGH)).sqrt() if by_grade else norm
        self.counts: list[tuple[int, int]] = []

    def __call__(self, x: Tensor, e: int) -> Tensor:
        high, low = (x.abs() * scale[e] > self.threshold for scale in (self.high, self.low))
        low = low & high
        self.counts.append((int(high.sum()), int(low.sum())))
        fine = linear(x.where(low, 0.0), self.both[e])
        return fine + linear(x.where(high & ~low, 0.0), self.coarse[e])


class ByHand:
    """``experts`` of one layer, in a call of one token."""

    def __init__(self, experts: nn.Module, first: Graded, second: Graded) -> None:
        self.first, self.second, self.act = first, second, experts.act_fn
        self.dense, experts.forward = experts.forward, self.forward

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        if len(x) > 1:
            return self.dense(x, chosen, weights)
        y = torch.zeros_like(x)
        for e, share in zip(chosen[0].tolist(), weights[0], strict=True):
            gate, up = self.first(x[0], e).chunk(2)
            y[0] += share * self.second(self.act(gate) * up, e)
        return y


def by_hand(compiled: nn.Module, model: nn.Module, cache: DynamicCache, by_grade: bool):
    """The eager model, and its stacks in the order of the plan's groups."""
    plain = with_values_of(compiled, model)
    known = sessions.of_cache(cache).inputs.thresholds
    groups = compiled.popc_plan.inputs
    assert [group.kind for group in groups] == ["experts"] * 4
    limits = iter(float(known[group.key]) for group in groups)
    stacks = []
    for ours, theirs in zip(layers(compiled), layers(plain), strict=True):
        pair = [
            Graded(stack, next(limits), by_grade) for stack in (ours.gate_up_proj, ours.down_proj)
        ]
        ByHand(theirs, *pair)
        stacks += pair
    return plain, stacks


def layers(model: nn.Module) -> Iterator[nn.Module]:
    return (layer.mlp.experts for layer in model.model.layers)


@pytest.mark.parametrize("policy", ["graded", "threshold"])
@pytest.mark.parametrize("form", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("make", MODELS)
def test_by_grade(make: Callable[..., nn.Module], form: str, policy: str) -> None:
    model, ids = make(experts_implementation=form), prompt(length=24)
    compiled = popc.compile(model, policy=policy, bits=5.0, **OPTIONS)
    ours, cache = [], DynamicCache()
    step(compiled, cache, ids)
    with counted_ops() as counts:
        ours = [step(compiled, cache, torch.tensor([[token]])) for token in TOKENS]
    assert counts["graded_experts"] == 4 * len(TOKENS) and not counts["quantized_experts"]
    by_grade = policy == "graded"
    plain, stacks = by_hand(compiled, model, cache, by_grade)
    other = DynamicCache()
    step(plain, other, ids)
    theirs = [step(plain, other, torch.tensor([[token]])) for token in TOKENS]
    assert relative(torch.stack(ours), torch.stack(theirs)) < PLANES
    counted = sessions.of_cache(cache).inputs.reads
    for group, stack in zip(compiled.popc_plan.inputs, stacks, strict=True):
        read_by_hand = torch.tensor(stack.counts).view(len(TOKENS), 2, 2).float().mean(1).round()
        expected = HIGH * read_by_hand[:, 0] + (1 - HIGH) * read_by_hand[:, 1]
        assert counted[group.key] == pytest.approx(expected.tolist())
        assert all(0 < low <= high for high, low in stack.counts)
        if not by_grade:
            assert all(low == high for high, low in stack.counts)


@pytest.mark.parametrize("make", MODELS)
def test_budgets(make: Callable[..., nn.Module]) -> None:
    """Prompts in chunks or whole, and calls with budgets of their own."""
    model, ids, token = make(), prompt(length=24), torch.tensor([[7]])
    compiled = popc.compile(model, bits=4.5, **OPTIONS)
    cache, chunked, dense = DynamicCache(), DynamicCache(), DynamicCache()
    step(compiled, cache, ids)
    for part in ids.split(8, 1):
        step(compiled, chunked, part)
    ours = step(compiled, cache, token)
    assert relative(step(compiled, chunked, token), ours) < PLANES
    known = [sessions.of_cache(c).inputs.thresholds for c in (cache, chunked)]
    for key, threshold in known[0].items():
        torch.testing.assert_close(threshold, known[1][key], rtol=2 * PLANES, atol=0)
    plain = with_values_of(compiled, model)
    step(plain, dense, ids)
    expected = step(plain, dense, token)
    assert relative(ours, expected) > 1e-3
    cache.crop(-1)
    with compiled.budget(sparsity=0.0):
        assert relative(step(compiled, cache, token), expected) < PLANES
    cache.crop(-1)
    shares = {}
    for bits in (3.0, 6.0):
        with compiled.budget(bits=bits):
            step(compiled, cache, token)
        cache.crop(-1)
        reads = sessions.of_cache(cache).inputs.reads
        shares[bits] = sum(reads[g.key][-1] / g.width for g in compiled.popc_plan.inputs)
    assert shares[3.0] < shares[6.0]


@torch.no_grad()
def test_padding_is_not_measured() -> None:
    model, ids = tiny_mixtral(), prompt(length=12, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    compiled = popc.compile(model, bits=4.5, **OPTIONS)
    found = []
    for garbage in (1, 2):
        ids[1, :5], cache = garbage, DynamicCache()
        compiled(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        mask_now = torch.cat((mask, mask[:, :1] * 0 + 1), 1)
        token = torch.tensor([[7], [9]])
        compiled(token, attention_mask=mask_now, past_key_values=cache, use_cache=True)
        found.append(sessions.of_cache(cache).inputs.thresholds)
    for key, threshold in found[0].items():
        torch.testing.assert_close(threshold, found[1][key], rtol=1e-5, atol=0)


@pytest.mark.parametrize("make", [tiny_mixtral, tiny_qwen_moe, tiny_gpt_oss])
def test_equivalent_to_the_oracle(make: Callable[..., nn.Module]) -> None:
    """With attention read by grade beside the experts, which GPT-OSS has biases for."""
    options = {**OPTIONS, "targets": ("experts", "attention"), "dtype": torch.float32}
    result = assert_equivalent(make(), prompt(length=24), bits=5.0, **options)
    assert result.decided and result.masked

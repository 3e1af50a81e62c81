"""Heads pass: attentions read keys and values before they are repeated, and give what they gave."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.functional import scaled_dot_product_attention

import popc
from popc.analysis.capture import capture_module
from popc.ops import attend, native
from popc.passes.dense.fold_repeat_kv import fold_repeat_kv
from popc.planning.rewrite_plan import RewritePlan
from popc.runtime.interpreter import Interpreted
from tests.helpers.checks import assert_meta_is_true
from tests.helpers.models import tiny_llama
from tests.helpers.oracle import relative

aten = torch.ops.aten
HEADS, GROUPS, KEYS, WIDTH = 6, 2, 9, 8
COPIES = (aten.reshape.default, aten.repeat_interleave.self_int, aten.clone.default)


def expanded(x: Tensor) -> Tensor:
    """As transformers do it: ``[B, G, S, E]`` to ``[B, H, S, E]``."""
    b, g, s, e = x.shape
    return x[:, :, None].expand(b, g, HEADS // g, s, e).reshape(b, HEADS, s, e)


def before_turning(x: Tensor) -> Tensor:
    """As Llama's own code does it: on ``[B, S, G, E]``."""
    b, g, s, e = x.shape
    x = x.transpose(1, 2)[:, :, :, None, :].expand(b, s, g, HEADS // g, e)
    return x.reshape(b, s, HEADS, e).permute(0, 2, 1, 3)


def interleaved(x: Tensor) -> Tensor:
    return x.repeat_interleave(HEADS // x.shape[1], dim=-3).contiguous()


def tiled(x: Tensor) -> Tensor:
    """Heads in another order: ``h`` with ``h % G``."""
    return x.repeat(1, HEADS // x.shape[1], 1, 1)


def folded(x: Tensor) -> Tensor:
    """The same by an expanded dim before the heads, not after."""
    b, g, s, e = x.shape
    return x[:, None].expand(b, HEADS // g, g, s, e).reshape(b, HEADS, s, e)


def turned(x: Tensor) -> Tensor:
    """Repeated along the heads, but then read as another value altogether."""
    b, g, s, e = x.shape
    return x[:, :, None].expand(b, g, HEADS // g, s, e).reshape(b, HEADS, e, s).mT


def split(x: Tensor) -> Tensor:
    """All heads alike, from a value without heads."""
    b, _, s, e = x.shape
    return x[:, 0].flatten(1).expand(HEADS, b, s * e).reshape(HEADS, b, s, e).transpose(0, 1)


class Attention(nn.Module):
    def __init__(
        self, repeat: Callable[[Tensor], Tensor], values: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.repeat, self.values = repeat, values or repeat

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return scaled_dot_product_attention(q, self.repeat(k), self.values(v), mask, scale=0.3)


def inputs(tokens: int = 1, dtype: torch.dtype = torch.float32, groups: int = GROUPS) -> list:
    q = torch.randn(3, HEADS, tokens, WIDTH, dtype=dtype)
    return [q, *(torch.randn(3, groups, KEYS, WIDTH, dtype=dtype) for _ in "kv")]


def count(graph: fx.Graph, *targets: object) -> int:
    return sum(node.target in targets for node in graph.nodes)


def shared(module: nn.Module, *args: Tensor) -> fx.Graph | None:
    """The graph, if it changed, once it is seen to give what the module gives."""
    captured = capture_module(module, args)
    done = fold_repeat_kv(captured, RewritePlan()).matches
    (y,) = assert_meta_is_true(captured.gm, module, *args)
    assert relative(y, module(*args)) < (1e-5 if args[0].dtype != torch.bfloat16 else 2e-2)
    assert done == count(captured.gm.graph, attend) + sum(
        bool(node.kwargs.get("enable_gqa")) for node in captured.gm.graph.nodes
    )
    return captured.gm.graph if done else None


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("repeat", [expanded, before_turning, interleaved])
def test_heads_are_read_once(repeat: Callable[[Tensor], Tensor], tokens: int) -> None:
    graph = shared(Attention(repeat), *inputs(tokens))
    assert graph is not None
    assert count(graph, attend) == (tokens == 1)
    assert not count(graph, *COPIES, aten.expand.default)


def test_masks_stay() -> None:
    mask = torch.rand(3, 1, 1, KEYS) < 0.6
    mask[..., 0] = True
    for each in (mask, torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)):
        graph = shared(Attention(expanded), *inputs(), each)
        assert graph is not None and count(graph, attend) == 1


@pytest.mark.parametrize("repeat", [tiled, folded, turned, split])
def test_what_is_repeated_otherwise_is_left(repeat: Callable[[Tensor], Tensor]) -> None:
    assert shared(Attention(repeat), *inputs()) is None
    assert shared(Attention(expanded, repeat), *inputs()) is None
    assert shared(Attention(repeat, expanded), *inputs()) is None


def test_keys_and_values_of_other_numbers_of_heads_are_left() -> None:
    q, k, _ = inputs()
    assert shared(Attention(expanded), q, k, torch.randn(3, 3, KEYS, WIDTH)) is None


def test_without_kernels_aten_reads_them_once(monkeypatch) -> None:
    monkeypatch.setattr(native, "load", lambda: False)
    graph = shared(Attention(expanded), *inputs())
    assert graph is not None and not count(graph, attend, *COPIES)


def test_heads_of_their_own() -> None:
    """In float32, where all keys are seen, nothing is gained."""

    def plain(x: Tensor) -> Tensor:
        return x

    mask = torch.ones(1, 1, 1, KEYS, dtype=torch.bool)
    qkv = inputs(groups=HEADS)
    assert shared(Attention(plain), *qkv) is None
    assert shared(Attention(plain), *qkv, mask) is not None
    assert shared(Attention(plain), *inputs(dtype=torch.bfloat16, groups=HEADS)) is not None
    assert shared(Attention(plain), *inputs(5, torch.bfloat16, HEADS)) is None


class Grouped(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, enable_gqa=True)


def test_what_says_so_itself() -> None:
    assert shared(Grouped(), *inputs()) is not None
    captured = capture_module(Grouped(), tuple(inputs(5)))
    assert fold_repeat_kv(captured, RewritePlan()).matches == 0


class Named(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        arguments = {"query": q, "key": expanded(k), "value": expanded(v), "attn_mask": mask}
        return torch.nn.functional.scaled_dot_product_attention(**arguments, dropout_p=0.0)


@pytest.mark.parametrize("tokens", [1, 5])
def test_arguments_by_name(tokens: int) -> None:
    assert shared(Named(), *inputs(tokens), torch.arange(KEYS)[None] < 5) is not None


class Alike(nn.Module):
    """Keys are values."""

    def forward(self, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        keys = expanded(k)
        return scaled_dot_product_attention(q, keys, keys, mask)


def test_one_value_for_both() -> None:
    q, k, _ = inputs()
    graph = shared(Alike(), q, k, torch.arange(KEYS)[None] < 5)
    assert graph is not None and count(graph, attend) == 1


class First(nn.Module):
    """``is_causal`` counts from the first key: of many, one token sees one."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, expanded(k), expanded(v), is_causal=True)


def test_a_causal_token_is_not_taken_for_one_that_sees_all() -> None:
    graph = shared(First(), *inputs())
    assert graph is not None and not count(graph, attend)


class Overwritten(nn.Module):
    """Its cache changes after it was repeated."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.late = late

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        copied = k.clone()
        if not self.late:
            copied[:, :, 1] = 2.0
        keys, values = expanded(copied), expanded(v)
        if self.late:
            copied[:, :, 1] = 2.0
        return scaled_dot_product_attention(q, keys, values)


def test_copies_of_what_is_overwritten_since_stay() -> None:
    assert shared(Overwritten(late=True), *inputs()) is None
    assert shared(Overwritten(late=False), *inputs()) is not None


@pytest.mark.parametrize("static", [False, True])
def test_a_generation_reads_its_cache_once(monkeypatch, static: bool) -> None:
    torch.compiler.reset()
    graphs: list[fx.Graph] = []

    def noting(gm: fx.GraphModule) -> Interpreted:
        graphs.append(gm.graph)
        return Interpreted(gm)

    monkeypatch.setattr("popc.backend.Interpreted", noting)
    model = tiny_llama()
    layers = model.config.num_hidden_layers
    compiled = popc.compile(model, sparsity=0.0, codegen="eager")
    ids = torch.arange(1, 12)[None].repeat(2, 1)
    options = {"max_new_tokens": 4, "do_sample": False}
    if static:
        options["cache_implementation"] = "static"
    assert torch.equal(compiled.generate(ids, **options), model.generate(ids, **options))
    prefill, *decode = graphs
    assert decode and all(count(graph, attend) == layers for graph in decode)
    attentions = prefill.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    )
    assert [node.kwargs["enable_gqa"] for node in attentions] == [True] * layers

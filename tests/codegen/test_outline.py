"""Graphs in pieces give what they give as a whole; what can't be shared is left whole."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from popc.codegen import repeats
from popc.codegen.outline import outline
from popc.codegen.program import Program
from tests.codegen.test_repeats import layer

W = [torch.randn(4, 4) for _ in range(6)]


def traced(function: Callable, *inputs: Tensor, symbolic: bool = False) -> fx.GraphModule:
    mode = "symbolic" if symbolic else "fake"
    gm = make_fx(function, tracing_mode=mode, pre_dispatch=True)(*inputs)
    gm.graph.eliminate_dead_code()
    return gm


def in_pieces(gm: fx.GraphModule) -> tuple[Program, int]:
    """It, and how many pieces it has."""
    cut = outline(gm)
    assert cut is not None
    return Program(gm, cut, cut.pieces), len(cut.pieces)


def assert_same(function: Callable, *inputs: Tensor, pieces: int = 2) -> None:
    """What it returns and what it writes to its inputs, as a whole and in pieces."""
    gm = traced(function, *(x.clone() for x in inputs))
    program, count = in_pieces(gm)
    assert count == pieces
    mine, whole = [x.clone() for x in inputs], [x.clone() for x in inputs]
    for given, expected in zip(program(*mine), gm(*whole), strict=True):
        assert torch.equal(given, expected) if isinstance(given, Tensor) else given == expected
    for one, other in zip(mine, whole, strict=True):
        assert torch.equal(one, other)


def test_a_stack_of_layers() -> None:
    def model(x: Tensor, *weights: Tensor) -> tuple[Tensor, None, int]:
        x = x.sin()
        for w in weights:
            x = layer(x, w)
        return x.cos(), None, 3

    assert_same(model, torch.randn(3, 4), *W, pieces=3)


def test_values_that_pass_between_layers() -> None:
    """The first layer's value goes to all others, each one's to the end."""

    def model(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        first, kept = x, []
        for w in weights:
            x = layer(x, w) + first
            kept.append(x)
        return (torch.stack(kept), kept[2])

    assert_same(model, torch.randn(3, 4), *W)


def test_caches_that_are_written_in_place() -> None:
    def model(x: Tensor, at: Tensor, *states: Tensor) -> tuple[Tensor]:
        for cache, w in zip(states[:6], states[6:], strict=True):
            cache.index_copy_(0, at, x)
            x = layer(x, w) + cache.sum(0)
            at.add_(0)
        return (x,)

    caches = [torch.zeros(5, 4) for _ in range(6)]
    assert_same(model, torch.randn(2, 4), torch.tensor([1, 3]), *caches, *W, pieces=1)


def test_symbolic_sizes() -> None:
    def model(x: Tensor, *weights: Tensor) -> tuple[Tensor]:
        for w in weights:
            x = layer(x, w) + torch.arange(x.shape[0]).unsqueeze(1)
        return (x,)

    gm = traced(model, torch.randn(7, 4), *W, symbolic=True)
    program, _ = in_pieces(gm)
    for length in (2, 7, 30):
        x = torch.randn(length, 4)
        assert torch.equal(program(x, *W)[0], model(x, *W)[0])


@pytest.mark.parametrize("scales", [[0.5, 0.5, 0.5, 0.25, 0.5, 0.5], [0.5] * 5 + [0.25]])
def test_layers_almost_alike_are_not_shared_wrongly(scales: list[float]) -> None:
    def model(x: Tensor, *weights: Tensor) -> tuple[Tensor]:
        for scale, w in zip(scales, weights, strict=True):
            x = layer(x, w, scale)
        return (x,)

    gm = traced(model, torch.randn(3, 4), *W)
    program, _ = in_pieces(gm)
    x = torch.randn(3, 4)
    assert torch.equal(program(x, *W)[0], model(x, *W)[0])


def test_weights_of_another_dtype_are_not_shared() -> None:
    def model(x: Tensor, *weights: Tensor) -> tuple[Tensor]:
        for w in weights:
            x = layer(x, w.to(torch.float32))
        return (x,)

    assert outline(traced(model, torch.randn(3, 4), *W[:2], W[2].double(), *W[3:])) is None


def test_layers_that_share_memory_otherwise_are_left_whole() -> None:
    def model(x: Tensor, *states: Tensor) -> tuple[Tensor]:
        for i, w in enumerate(states[6:]):
            source = states[0] if i == 3 else states[i]
            source.add_(1)
            x = layer(x, w) + source + states[i]
        return (x,)

    caches = [torch.zeros(3, 4) for _ in range(6)]
    assert outline(traced(model, torch.randn(3, 4), *caches, *W)) is None


def test_what_one_piece_made_no_other_writes_to() -> None:
    def model(x: Tensor, *weights: Tensor) -> tuple[Tensor]:
        total = torch.zeros(3, 4)
        for w in weights:
            x = layer(x, w)
            total.add_(x)
        return (total,)

    assert outline(traced(model, torch.randn(3, 4), *W)) is None


def stack(x: Tensor, *weights: Tensor) -> tuple[Tensor]:
    for w in weights:
        x = layer(x, w)
    return (x,)


def test_states_that_hold_for_what_follows() -> None:
    gm = traced(stack, torch.randn(3, 4), *W)
    assert outline(gm) is not None
    first = next(node for node in gm.graph.nodes if node.op == "call_function")
    with gm.graph.inserting_before(first):
        gm.graph.call_function(torch._C._set_grad_enabled, (False,))
    assert outline(gm) is None


def test_nothing_is_kept_longer_than_it_is_read() -> None:
    gm = traced(stack, torch.randn(3, 4), *W)
    cut = outline(gm)
    assert cut is not None and [cut.repetitions(i) for i in range(len(cut.pieces))] == [6]
    alive: list[int] = []
    made: list[weakref.ref[Tensor]] = []

    def piece(*args: Tensor) -> tuple[Tensor, ...]:
        alive.append(sum(ref() is not None for ref in made))
        (y,) = cut.pieces[0](*args)
        made.append(weakref.ref(y))
        return (y,)

    Program(gm, cut, [piece])(torch.randn(3, 4), *W)
    assert max(alive) == 1 and len(alive) == 6


def test_short_stretches_are_not_worth_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def model(x: Tensor, *weights: Tensor) -> tuple[Tensor]:
        for w in weights:
            x = (x @ w).relu()
        return (x,)

    gm = traced(model, torch.randn(3, 4), *W)
    assert outline(gm) is None
    monkeypatch.setattr(repeats, "MIN_NODES", 2)
    cut = outline(gm)
    assert cut is not None and max(map(cut.repetitions, range(len(cut.pieces)))) == 6


def test_layers_with_sizes_of_their_own() -> None:
    def model(x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        caches = []
        for cache, w in zip(states[:6], states[6:], strict=True):
            caches.append(torch.cat((cache, x)))
            x = layer(x, w) + caches[-1].sum(0)
        return (x, *caches)

    # Sizes that differ have symbols of their own.
    caches = [torch.randn(5 + i, 4) for i in range(6)]
    gm = traced(model, torch.randn(2, 4), *caches, *W, symbolic=True)
    program, count = in_pieces(gm)
    cut = outline(gm)
    assert count == 1 and cut is not None and len(cut.own_sizes[0]) == 1
    inputs = torch.randn(2, 4), *(torch.randn(9 - i, 4) for i in range(6)), *W
    for one, other in zip(program(*inputs), model(*inputs), strict=True):
        assert torch.equal(one, other)


def test_a_layer_whose_sizes_go_together_otherwise_is_another() -> None:
    def model(x: Tensor, *states: Tensor) -> tuple[Tensor]:
        for one, other, w in zip(states[:6], states[6:12], states[12:], strict=True):
            x = layer(x, w) + one.sum() + torch.cat((one, other)).sum()
        return (x,)

    ones = [torch.randn(5 if i == 0 else 10 + i, 4) for i in range(6)]
    twos = [torch.randn(5 if i == 0 else 20 + i, 4) for i in range(6)]
    gm = traced(model, torch.randn(2, 4), *ones, *twos, *W, symbolic=True)
    program, _ = in_pieces(gm)
    cut = outline(gm)
    assert cut is not None and list(map(cut.repetitions, range(2))) == [1, 5]
    inputs = torch.randn(2, 4), *ones, *twos, *W
    assert torch.equal(program(*inputs)[0], model(*inputs)[0])

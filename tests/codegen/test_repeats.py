"""Where a graph repeats itself."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from popc.codegen import repeats
from popc.codegen.repeats import Stretch, find_repeats


def layer(x: Tensor, w: Tensor, scale: float = 0.5) -> Tensor:
    """Eighteen ops, the residual stream alone passes on."""
    y = x * scale
    for _ in range(5):
        y = (y @ w).relu() + 1
    return x + y.tanh()


def traced(function, *inputs: Tensor) -> list[fx.Node]:
    graph = make_fx(function, tracing_mode="fake")(*inputs).graph
    return [node for node in graph.nodes if node.op == "call_function"]


def stack(scales: list[float], before: int = 2, after: int = 3):
    def model(x: Tensor, *weights: Tensor) -> Tensor:
        for _ in range(before):
            x = x.sin()
        for scale, w in zip(scales, weights, strict=True):
            x = layer(x, w, scale)
        for _ in range(after):
            x = x.cos()
        return x

    return traced(model, torch.ones(3, 4), *[torch.ones(4, 4)] * len(scales))


def test_layers_are_found_where_fewest_values_pass() -> None:
    nodes = stack([0.5] * 6)
    assert len(nodes) == 2 + 6 * 18 + 3
    assert find_repeats(nodes) == [Stretch(0, 2), Stretch(2, 18, 6), Stretch(110, 3)]


def test_another_constant_is_another_layer() -> None:
    found = find_repeats(stack([0.5] * 4 + [0.25] + [0.5] * 3))
    assert [(s.length, s.count) for s in found if s.count > 1] == [(18, 4), (18, 3)]
    assert sum(s.length * s.count for s in found) == 2 + 8 * 18 + 3


def test_layers_in_turn_are_shared_in_pairs() -> None:
    found = find_repeats(stack([0.5, 0.25] * 3))
    assert [(s.length, s.count) for s in found if s.count > 1] == [(36, 3)]


def test_another_shape_is_another_layer() -> None:
    def model(x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(3):
            x = layer(x, w)
        for _ in range(3):
            y = layer(y, w)
        return x, y

    found = find_repeats(traced(model, torch.ones(3, 4), torch.ones(5, 4), torch.ones(4, 4)))
    assert found == [Stretch(0, 18, 3), Stretch(54, 18, 3)]


def test_two_of_a_kind_are_left_alone() -> None:
    assert find_repeats(stack([0.5] * 2)) == [Stretch(0, 2 + 2 * 18 + 3)]


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 4), st.integers(3, 5))
def test_stretches_are_all_of_it_and_truly_repeated(around, length, count) -> None:
    period = list(range(10, 10 + repeats.MIN_NODES + length))
    kinds = [*around, *period * count, *around]
    nodes = [fx.Graph().placeholder("x") for _ in kinds]
    found = repeats._cut(nodes, kinds, 0, len(kinds))
    assert [s.start for s in found] == [0, *(s.stop for s in found)][:-1]
    assert found[-1].stop == len(kinds)
    assert max(s.count for s in found) >= count - 1
    for s in found:
        one = kinds[s.start : s.start + s.length]
        assert kinds[s.start : s.stop] == one * s.count

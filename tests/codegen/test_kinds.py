"""Which symbols a value tells the code that it is given to."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from popc.codegen.kinds import Correspondence, symbols_of, told_by, value_kind


def test_a_number_that_equals_another_tells_no_symbol() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False))
    x, y = (mode.from_tensor(torch.ones(5)) for _ in range(2))
    size, other = x.shape[0], y.shape[0]
    assert len(told_by(size) | told_by(other)) == 2
    assert size == other  # a guard: from here on they have one symbol
    assert symbols_of(size) == symbols_of(other)
    assert told_by(size) == told_by(other) == set()
    assert symbols_of(size) <= told_by(x) == told_by(y)


def test_sizes_of_their_own_correspond_from_value_to_value() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False))
    x, y, z = (mode.from_tensor(torch.ones(n)) for n in (5, 6, 7))
    assert value_kind(x) == value_kind(y) != value_kind(x.new_empty(x.shape[0] + 1))
    symbols = Correspondence()
    assert symbols.extend(x, y) and symbols.extend(x + 1, y + 1)
    assert not symbols.extend(x, z)

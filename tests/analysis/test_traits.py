"""What asks for traits sees the same in ops of the same traits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from popc.analysis.capture import capture_module
from popc.analysis.linears import all_linears
from popc.analysis.regions import find_regions
from popc.analysis.tokens import is_one_token, rows_of

D, HIDDEN = 16, 24

FLATTENED: dict[str, Callable[[Tensor], Tensor]] = {
    "reshape": lambda x: x.reshape(-1, D),
    "flatten": lambda x: x.flatten(0, 1),
    "view_as": lambda x: x.view_as(torch.zeros(10, D)),
    "reshape_as": lambda x: x.reshape_as(torch.zeros(10, D)),
    "masked_fill": lambda x: x.reshape(-1, D).masked_fill(torch.zeros(10, 1).bool(), x.sum() * 0),
    "clone": lambda x: x.reshape(-1, D).clone(),
    "type_as": lambda x: x.reshape(-1, D).type_as(torch.zeros((), dtype=torch.float64)).float(),
    "narrow": lambda x: torch.cat([x, x], -1).reshape(-1, 2 * D).narrow(-1, 0, D),
    "tensor_split": lambda x: torch.cat([x, x], -1).reshape(-1, 2 * D).tensor_split(2, -1)[1],
}


class Flat(nn.Module):
    """A linear on rows that were flattened in some way."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.linear = how, nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(FLATTENED[self.how](x))


@pytest.mark.parametrize("how", FLATTENED)
def test_rows_are_followed_to_batch_and_tokens(how: str) -> None:
    captured = capture_module(Flat(how), (torch.randn(2, 5, D),))
    (linear,) = all_linears(captured)
    rows = rows_of(linear.x)
    assert rows is not None and rows.is_plain
    assert tuple(rows.grid.meta["val"].shape[:2]) == (2, 5)
    assert is_one_token(linear.x) is False


TURNED: dict[str, Callable[[Tensor], Tensor]] = {
    "t": lambda w: w.t(),
    "transpose": lambda w: w.transpose(-2, -1),
    "swapaxes": lambda w: w.swapaxes(0, 1),
    "swapdims": lambda w: w.swapdims(1, 0),
    "permute": lambda w: w.permute(1, 0),
    "mT": lambda w: w.mT,
    "numpy_T": lambda w: torch.ops.aten.numpy_T.default(w),
    "twice": lambda w: w.t().t().mT,
    "detached": lambda w: w.detach().t(),
}


class Turned(nn.Module):
    """The same linear with a weight ``[K, N]``."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.weight = how, nn.Parameter(torch.randn(D, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, TURNED[self.how](self.weight))


@pytest.mark.parametrize("how", TURNED)
def test_a_weight_is_found_behind_any_transpose(how: str) -> None:
    captured = capture_module(Turned(how), (torch.randn(2, 5, D),))
    (linear,) = all_linears(captured)
    assert (linear.inputs, linear.outputs) == (D, HIDDEN)
    assert linear.weight.parameter in captured.parameters
    assert linear.weight.out_dim == 1


PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": lambda w: w[HIDDEN:],
    "narrow": lambda w: w.narrow(0, HIDDEN, HIDDEN),
    "chunk": lambda w: w.chunk(2)[1],
    "split": lambda w: w.split([HIDDEN, HIDDEN])[1],
    "tensor_split": lambda w: w.tensor_split(2)[1],
    "select": lambda w: w.unflatten(0, (2, HIDDEN))[1],
}


@pytest.mark.parametrize("how", PARTS)
def test_a_part_of_a_weight_is_found(how: str) -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2 * HIDDEN, D))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, PARTS[how](self.weight))

    module = Part()
    captured = capture_module(module, (torch.randn(2, 5, D),))
    linears = all_linears(captured)
    if how == "select":  # behind a reshape, which may copy a weight that is laid out anew
        assert not linears
        return
    (linear,) = linears
    assert torch.equal(linear.weight.replayed(module.weight), module.weight[HIDDEN:])


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "permute": lambda h: h.permute(2, 0, 1),
    "swapaxes": lambda h: h.swapaxes(0, 2),
    "squeeze": lambda h: h[:1].squeeze(),
    "unsqueeze": lambda h: h.unsqueeze(1),
    "alias": lambda h: torch.ops.aten.alias.default(h),
}


@pytest.mark.parametrize("how", VIEWS)
def test_what_is_written_to_a_view_is_in_its_source(how: str) -> None:
    """Other channels, each to its place, so both linears make the units."""

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(D, HIDDEN), nn.Linear(D, HIDDEN)
            self.out = nn.Linear(HIDDEN, D)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            VIEWS[how](h).mul_(VIEWS[how](self.b(x)))
            return self.out(h)

    (region,) = find_regions(capture_module(Writes(), (torch.randn(3, 5, D),))).regions
    assert region.units == HIDDEN and len(region.producers) == 2
    assert all((p.rows[:, 0] == region.columns[:, 0]).all() for p in region.producers)

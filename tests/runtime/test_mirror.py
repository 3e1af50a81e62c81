"""Mirrors of models: modules of their own, weights shared."""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import popc
from popc.runtime.mirror import Mirror
from tests.helpers.models import Plain, tiny_llama


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Plain(), Plain()
        self.again = self.a
        self.register_buffer("shift", torch.zeros(16))
        self.listed = [self.b, "text"]
        self.by_name = {"a": self.a}
        self.bound = self.b.forward
        self.partial = functools.partial(self.apply_to, self.a)
        self.gain = 1.0

    @staticmethod
    def apply_to(module: nn.Module, x: Tensor) -> Tensor:
        return module(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * (self.a(x) + self.b(x)) + self.shift


def test_modules_are_its_own_and_weights_are_shared() -> None:
    net = Net()
    root = Mirror(net).root
    assert type(root) is Net and root is not net
    mine, theirs = list(root.modules()), list(net.modules())
    assert len(mine) == len(theirs) and not {*map(id, mine)} & {*map(id, theirs)}
    for ours, other in zip(root.parameters(), net.parameters(), strict=True):
        assert ours is other
    assert root.shift is net.shift
    assert root.again is root.a and root.listed[0] is root.b and root.by_name["a"] is root.a
    assert root.bound.__self__ is root.b and root.partial.args == (root.a,)
    assert net.listed[0] is net.b and net.bound.__self__ is net.b


def test_what_is_set_on_the_mirror_stays_there() -> None:
    net, x = Net(), torch.randn(2, 3, 16)
    expected = net(x)
    root = Mirror(net).root
    root.gain = 3.0
    root.train(False)
    root.b = nn.Identity()
    root.a.act = torch.relu
    root.register_buffer("more", torch.ones(1), persistent=False)
    root.a.register_forward_hook(lambda *_: torch.zeros(2, 3, 16))
    del root.gain
    assert torch.equal(net(x), expected)
    assert net.training and net.a.training and net.gain == 1.0
    assert "more" not in net.state_dict() and not net._non_persistent_buffers_set
    assert not net.a._forward_hooks


def set_gain(net: Net) -> None:
    net.gain = 5.0


def replace_part(net: Net) -> None:
    net.b = Plain(torch.tanh)


def replace_nested(net: Net) -> None:
    net.a.c = nn.Sequential(nn.Linear(40, 8), nn.Linear(8, 16))


def add_hook(net: Net) -> None:
    net.a.register_forward_hook(lambda module, args, out: 2 * out)


def replace_buffer(net: Net) -> None:
    net.shift = torch.ones(16)


def replace_weight(net: Net) -> None:
    net.b.a.weight = nn.Parameter(torch.randn(40, 16))


def remove_bias(net: Net) -> None:
    net.b.a.bias = None


CHANGES = [
    set_gain,
    replace_part,
    replace_nested,
    add_hook,
    replace_buffer,
    replace_weight,
    remove_bias,
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_set_on_the_original_follows(change) -> None:
    net, x = Net(), torch.randn(2, 3, 16)
    mirror = Mirror(net)
    before = net(x)
    change(net)
    assert torch.equal(mirror.root(x), before)
    mirror.follow()
    assert torch.equal(mirror.root(x), net(x)) and not torch.equal(net(x), before)
    assert not {*map(id, mirror.root.modules())} & {*map(id, net.modules())}


def test_following_keeps_what_was_set_on_the_mirror_alone() -> None:
    net = Net()
    mirror = Mirror(net)
    mirror.root.gain = 7.0
    mirror.root.b.act = torch.tanh
    replace_nested(net)
    net.eval()
    mirror.follow()
    assert mirror.root.gain == 7.0 and mirror.root.b.act is torch.tanh
    assert not mirror.root.training and not mirror.root.a.c[0].training
    del net.gain
    mirror.follow()
    assert not hasattr(mirror.root, "gain")


def test_mode_is_seen_both_ways_but_not_backwards() -> None:
    net = Net()
    mirror = Mirror(net)
    mirror.root.eval()
    mirror.follow()
    assert net.training and not mirror.root.training
    net.eval()
    net.train()
    mirror.follow()  # nothing has changed in between
    assert not mirror.root.training


def test_hooks_keep_their_order_and_buffers_their_persistence() -> None:
    net, x = Net(), torch.randn(2, 3, 16)
    net.register_forward_hook(lambda module, args, out: out + 1)
    mirror = Mirror(net)
    net.register_forward_hook(lambda module, args, out: 10 * out, prepend=True)
    net.register_buffer("left", torch.ones(1), persistent=False)
    mirror.follow()
    assert torch.equal(mirror.root(x), net(x))
    assert mirror.root.state_dict().keys() == net.state_dict().keys()


def test_what_is_installed_on_each_once_is_not_there_twice() -> None:
    """As transformers installs hooks when hidden states are first asked for."""

    def install(net: Net, seen: list[Tensor]) -> None:
        def hook(module: nn.Module, args: object, out: Tensor, key: str = "a") -> None:
            collected.append(key)

        net.a.register_forward_hook(hook)

    net, x, collected = Net(), torch.randn(2, 3, 16), []
    mirror = Mirror(net)
    install(mirror.root, [])
    install(net, [])
    mirror.follow()
    mirror.root(x)
    assert collected == ["a"]


class Pair(NamedTuple):
    first: nn.Module
    second: int


def test_functions_and_tuples_refer_to_the_mirrors_parts() -> None:
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4))
    old = net.forward
    net.forward = lambda x: old(x)
    net.pair, net.by_name = Pair(net[0], 1), defaultdict(list, {"a": net[1]})
    root, x = Mirror(net).root.eval(), torch.randn(8, 4)
    assert torch.equal(root(x), root(x)) and not torch.equal(net(x), net(x))
    assert root.pair == Pair(root[0], 1) and root.by_name["a"] is root[1]
    assert root.by_name["new"] == [] and "new" not in net.by_name


def test_another_class_and_removed_modules_are_followed() -> None:
    net, x = Net(), torch.randn(2, 3, 16)
    mirror = Mirror(net)
    count = len(mirror._snapshots)
    torch.nn.utils.parametrizations.weight_norm(net.a.a)
    for _ in range(5):
        net.b = Plain()
        mirror.follow()
        assert torch.equal(mirror.root(x), net(x))
    assert len(mirror._snapshots) == len(mirror._copies) == len(list(net.modules())) > count


class Slotted(nn.Module):
    __slots__ = ("scale",)

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "scale", 3.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


def test_values_in_slots_are_mirrored() -> None:
    assert Mirror(Slotted()).root(torch.ones(1)) == 3.0


def test_a_transformer_is_mirrored_whole() -> None:
    model, ids = tiny_llama(), torch.arange(1, 9)[None]
    root = Mirror(model).root
    assert torch.equal(root(ids).logits, model(ids).logits)
    assert root.config is model.config and root.state_dict().keys() == model.state_dict().keys()


def test_a_part_that_is_compiled_later_stays_what_it_is() -> None:
    """Set on the original, it is pruned as it was compiled, not as the whole is."""
    model = nn.Sequential(Plain(), nn.LayerNorm(16), Plain()).eval()
    compiled = popc.compile(model, policy="dense", codegen="eager")
    x = torch.randn(1, 5, 16)
    with torch.no_grad():
        compiled(x)
        model[2] = popc.compile(model[2], policy="pop", sparsity=0.5, codegen="eager")
        compiled(x)
    assert compiled[2] is model[2]
    assert compiled[2].popc_plan.regions  # of its own graphs: it was called as it is

"""Weights that are no plain tensors: dense, refused with a reason, and no others with them."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import popc
from popc import sessions
from popc.ops import gather_linear
from tests.helpers.generation import run, tokens
from tests.helpers.models import Gated, tiny_llama
from tests.helpers.oracle import relative
from tests.helpers.profiles import few

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Halved(Tensor):
    """A wrapper subclass of one's own: it holds half of what it stands for."""

    @staticmethod
    def __new__(cls, half: Tensor) -> Tensor:
        kept = {"dtype": half.dtype, "device": half.device, "strides": half.stride()}
        return Tensor._make_wrapper_subclass(cls, half.shape, **kept)

    def __init__(self, half: Tensor) -> None:
        self.half = half

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["half"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], _: None, size: object, strides: object):
        return Halved(inner["half"])

    @classmethod
    def __torch_dispatch__(cls, func: Callable, types: object, args=(), kwargs=None):
        views = (torch.ops.aten.detach, torch.ops.aten.t, torch.ops.aten.alias)
        views += (torch.ops.aten.view, torch.ops.aten.clone, torch.ops.aten.slice)
        inner = pytree.tree_map_only(
            Halved, lambda w: w.half if func.overloadpacket in views else w.half * 2, args
        )
        out = func(*inner, **(kwargs or {}))
        return Halved(out) if func.overloadpacket in views else out


def halved(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(Halved(linear.weight.detach() / 2), requires_grad=False)


def by_torchao(linear: nn.Linear) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(linear, quantization.Int8WeightOnlyConfig())


QUANTISE = {"own": halved, "torchao": by_torchao}


def names(model: nn.Module, kind: type = nn.Linear) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def refused(plan: popc.Plan) -> list[str]:
    """Linears of such weights, without those whose channels they read."""
    return [skip.name for skip in plan.skipped if skip.reason.startswith("its weight is a ")]


@pytest.mark.parametrize("how", few(QUANTISE, 1))
@pytest.mark.parametrize("policy", ["threshold", "pop"])
def test_all_weights(how: str, policy: str) -> None:
    model, ids = tiny_llama(), tokens()
    for linear in names(model).values():
        QUANTISE[how](linear)
    types = {type(linear.weight).__name__ for linear in names(model).values()}
    expected = run(copy.deepcopy(model), ids, 10)
    compiled = popc.compile(model, policy=policy, sparsity=0.5, codegen="eager")
    with pytest.warns(UserWarning, match="nothing to prune"):
        got = run(compiled, ids, 10)
    assert relative(got, expected) < 1e-5
    for plan in (compiled.popc_plan, popc.analyze(model, (ids,))):
        assert not plan.regions and not plan.inputs
        assert sorted(refused(plan)) == sorted(names(model))
        (reason,) = {skip.reason for skip in plan.skipped if skip.kind == "subclass"}
        assert reason == f"its weight is a {types.pop()}: popc reads plain tensors alone yet"
        types = {reason.split()[4].strip(":")}
    text = str(popc.explain(model, input_ids=ids))
    assert "15 refusals" in text and "plain weights" in text


class Hidden(nn.Module):
    """The same linear of a plain weight, by an op in which the analysis sees none."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        with torch.no_grad():
            self.weight = nn.Parameter(linear(torch.eye(linear.in_features)).t().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return gather_linear(x, self.weight * 1.0, None, None, None, 0)


# Inductor alone, after torchao was used, breaks the graph at a class of one's own.
@pytest.mark.parametrize(
    ("how", "codegen"), few([("own", "eager"), ("torchao", "eager"), ("torchao", "inductor")], 1)
)
@pytest.mark.parametrize("policy", ["pop", "threshold"])
def test_plain_weights_beside_them_are_pruned(policy: str, how: str, codegen: str) -> None:
    """The last layer as a whole, and of the others one linear of a region."""
    model, ids = tiny_llama(num_hidden_layers=3), tokens()
    first, second, third = model.model.layers
    plain = [*names(third).values(), first.self_attn.o_proj, second.mlp.up_proj]
    called = [name for name, linear in names(model).items() if linear in plain]
    for linear in plain:
        QUANTISE[how](linear)
    hidden = copy.deepcopy(model)
    for name in called:
        hidden.set_submodule(name, Hidden(hidden.get_submodule(name)))
    targets = {"targets": ("mlp", "attention")} if policy == "pop" else {}
    outputs = []
    for each in (model, hidden):
        compiled = popc.compile(each, policy=policy, sparsity=0.4, codegen=codegen, **targets)
        outputs.append(run(compiled, ids, 10))
        plan = compiled.popc_plan
        assert sorted(refused(plan)) == (sorted(called) if each is model else [])
        if policy == "pop":
            assert [region.kind for region in plan.regions] == ["mlp", "attention", "mlp"]
        else:
            assert plan.inputs and "layers.2" not in str([group.name for group in plan.inputs])
    assert relative(outputs[0], outputs[1]) < 1e-4
    assert relative(outputs[0], run(model, ids, 10)) > 1e-2


class Held(nn.Module):
    """A linear that keeps its weight in a buffer, or a view of what it keeps, or makes it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.up, self.down = how, nn.Linear(16, 40), nn.Linear(40, 16)
        weight = torch.randn(16, 16)
        if how == "buffer":
            self.register_buffer("w", Halved(weight / 2))
        else:
            self.w = nn.Parameter(Halved(weight / 2), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(torch.relu(self.up(x)))
        if self.how == "method":
            return F.layer_norm(x, (16,)).matmul(self.w.t())
        if self.how == "product":
            return F.layer_norm(x, (16,)) @ self.w.t()
        made = {"view": lambda w: w.view(16, 16), "plain": lambda w: w * 1.0}
        return F.linear(F.layer_norm(x, (16,)), made.get(self.how, lambda w: w)(self.w))


@pytest.mark.parametrize("how", ["buffer", "view", "plain", "method", "product"])
def test_wherever_the_weight_comes_from(how: str) -> None:
    torch.manual_seed(0)
    model, x = Held(how).eval(), torch.randn(1, 5, 16)
    plan = popc.analyze(model, (x,))
    assert [skip.reason.split(":")[0] for skip in plan.skipped if skip.kind == "subclass"] == [
        "its weight is a Halved"
    ]
    assert [region.units for region in plan.regions] == [40]
    expected = model(x).detach()
    options = {"sparsity": 0.5, "policy": "pop", "codegen": "eager"}
    compiled = torch.compile(model, backend="popc", options=options)
    with torch.no_grad(), sessions.use(sessions.Session()):
        assert relative(compiled(x), expected) < 1e-5
        assert relative(compiled(x[:, :1]), expected[:, :1]) > 1e-3  # a decode step


def test_channels_that_such_a_linear_reads_are_not_pruned() -> None:
    model, x = Gated().eval(), torch.randn(1, 5, 16)
    halved(model.c)
    plan = popc.analyze(model, (x,))
    assert not plan.regions
    why = "linear reads them, and its weight is a Halved: popc reads plain tensors alone yet"
    assert [skip.reason for skip in plan.skipped].count(why) == 2
    assert all(popc.report.explain.remedy(skip) for skip in plan.skipped if skip.kind == "subclass")


class Packed(nn.Parameter):
    """A parameter of another type, as bitsandbytes has them: bytes, and what they are of."""


class Unpacking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = Packed(torch.randint(0, 255, (16, 16), dtype=torch.uint8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.linear(x, (self.w.float() - 128) / 64)


def test_parameters_of_another_type() -> None:
    model, x = Unpacking().eval(), torch.randn(1, 5, 16)
    compiled = popc.compile(model, codegen="eager")
    with torch.no_grad(), pytest.warns(UserWarning, match="nothing to prune"):
        assert torch.equal(compiled(x), model(x))
    (skip,) = compiled.popc_plan.skipped
    assert (skip.kind, "a Packed" in skip.reason) == ("subclass", True)


def test_a_model_spread_over_devices(tmp_path) -> None:
    """One process alone, so that nothing has to be spread; the tensors are what they would be."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = Gated(bias=True).eval()
        for module in (model.a, model.b, model.c):
            for name, value in list(module.named_parameters()):
                spread = distribute_tensor(value.detach(), mesh, [Replicate()])
                setattr(module, name, nn.Parameter(spread, requires_grad=False))
        x = DTensor.from_local(torch.randn(1, 5, 16), mesh, [Replicate()])
        compiled = popc.compile(model, sparsity=0.5, codegen="eager")
        with torch.no_grad(), pytest.warns(UserWarning, match="nothing to prune"):
            assert torch.equal(compiled(x).to_local(), model(x).to_local())
        assert len(refused(compiled.popc_plan)) == 3
        assert "a DTensor" in compiled.popc_plan.skipped[0].reason
    finally:
        distributed.destroy_process_group()


def test_nothing_is_said_of_plain_models() -> None:
    compiled = popc.compile(tiny_llama(), sparsity=0.4, codegen="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(compiled, tokens(), 10)
    assert not refused(compiled.popc_plan)

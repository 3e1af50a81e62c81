"""What popc relies on in the private APIs that :mod:`popc.compat` names: one check for each.

A check raises where an API is not as popc knows it. ``tests/test_compat.py`` says what then breaks.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from popc import compat
from popc.errors import PopcError

aten = torch.ops.aten


class Block(nn.Module):
    """Reads a parameter and a global, and writes an attribute of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 2]`` to ``[N, 3]``."""
        self.calls += SCALE
        return self.linear(x) * SCALE


SCALE = 2


@functools.cache
def compiled() -> SimpleNamespace:
    """What a backend and a guard filter were given as Dynamo compiled a :class:`Block`."""
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._guards import TracingContext

    module = Block()
    record = SimpleNamespace(module=module, guards=[])

    def backend(gm: Any, inputs: Any) -> Callable[..., Any]:
        context, output = TracingContext.get(), InstructionTranslator.current_tx().output
        record.gm, record.inputs, record.mode = gm, inputs, compat.dynamo_fake_mode()
        record.weight = compat.fakify(record.mode, module.linear.weight)
        record.x = compat.fakify(record.mode, x)
        record.written = compat.written_places()
        record.modified = output.side_effects._get_modified_vars()
        record.strides = dict(output.input_source_to_sizes_strides)
        record.contexts = {id(key): value for key, value in context.tensor_to_context.items()}
        describer = record.mode.fake_tensor_converter.meta_converter.describer
        record.memo = {id(value) for value in describer.lookup_tensor}
        return gm.forward

    def keep(entries: Any) -> list[bool]:
        record.guards += entries
        return [True] * len(entries)

    torch.compiler.reset()
    x = torch.ones(4, 2)
    assert compat.mark_dynamic(x, (4,))
    compat.compile_alone(module, backend, keep)(x)
    return record


def inputs_tell_where_they_come_from() -> None:
    graph = compiled().gm.graph.find_nodes(op="placeholder")
    fixed = [n.meta["tensor_dict"].get("_dynamo_static_input_type") for n in graph if tensor(n)]
    assert all(hasattr(node, "_dynamo_source") for node in graph)
    assert sorted(fixed, key=str) == [None, "unguarded", "unguarded"]
    assert "dynamo_compile_id" in compiled().gm.meta


def tensor(node: torch.fx.Node) -> bool:
    return isinstance(node.meta["example_value"], Tensor)


def parameters_tell_where_they_come_from() -> None:
    from torch._dynamo.source import ConstantSource

    assert "linear.weight" in str(list(compiled().gm._param_name_to_source))
    assert compat.guards._name(ConstantSource("linear.weight")) == "linear.weight"


def fake_mode_is_shared() -> None:
    record = compiled()
    assert record.x.fake_mode is record.mode and isinstance(record.x.shape[0], torch.SymInt)
    source = record.contexts[id(record.module.linear.weight)].tensor_source
    assert "weight" in compat.guards._name(source)


def fake_mode_stands_alone() -> None:
    from torch._subclasses.fake_tensor import FakeTensor

    mode = compat.new_fake_mode()
    fake = mode.from_tensor(torch.ones(2, 3), static_shapes=True)
    with mode:
        assert isinstance(fake + torch.ones(3), FakeTensor)  # with a real one mixed in
    known = inspect.signature(mode.from_tensor).parameters
    assert {"symbolic_context", "source", "static_shapes"} <= known.keys()
    assert compat.is_trace_only(fake)


def strides_are_kept_in_two_places() -> None:
    record = compiled()
    weight = record.module.linear.weight
    assert id(weight) in record.memo
    assert record.strides[record.contexts[id(weight)].tensor_source]["stride"] == weight.stride()


def frame_tells_what_it_writes_to() -> None:
    assert compiled().modified
    assert [place.root for place in compiled().written] == ["model"]


def guards_tell_their_place() -> None:
    roots = {compat.guard_place(entry).root for entry in compiled().guards}
    assert roots == {"model", "global", "call"}


def guards_tell_what_they_ask() -> None:
    conditions = [(entry.guard_type, compat.guard_condition(entry)) for entry in compiled().guards]
    assert ("TENSOR_MATCH", "") in conditions and ("TYPE_MATCH", "") in conditions
    assert any(asked for _, asked in conditions)  # a key, or an attribute
    assert not any(asked is None for _, asked in conditions)


def inductor_takes_options() -> None:
    from torch._inductor.compile_fx import compile_fx

    known = list(inspect.signature(compile_fx).parameters)
    assert known[:2] == ["model_", "example_inputs_"] and "config_patches" in known
    assert "inner_compile" in known  # by which tests see what CUDA graphs would be told


def modes_have_options() -> None:
    assert compat.mode_options("reduce-overhead")["triton.cudagraphs"] is True


def cpp_is_built() -> None:
    path = compat.load_cpp('extern "C" int popc_canary() { return 7; }')
    assert Path(path).is_file()


def cache_is_a_folder() -> None:
    assert Path(compat.inductor_cache()).is_absolute()


def errors_are_unwrapped() -> None:
    def failing(*_: Any) -> Any:
        raise PopcError("meant for the user")

    torch.compiler.reset()
    with pytest.raises(PopcError, match="meant for the user"):
        compat.call_compiled(torch.compile(torch.sin, backend=failing), torch.ones(2))


def backend_asks_for_another_trace(error: str) -> None:
    calls = []

    def backend(gm: Any, _: Any) -> Any:
        calls.append(gm)
        if len(calls) == 1:
            kind = getattr(torch._dynamo.exc, error)
            made = kind("skipped") if error == "SkipFrame" else kind(restart_reason="again")
            assert compat.is_for_dynamo(made)
            raise made
        return gm.forward

    torch.compiler.reset()
    out = torch.compile(lambda x: x.sin(), backend=backend)(torch.zeros(2))
    assert not out.any() and len(calls) == (1 if error == "SkipFrame" else 2)


def graph_breaks_are_counted() -> None:
    graphs = []

    def backend(gm: Any, _: Any) -> Any:
        graphs.append(compat.breaks_off(gm))
        return gm.forward

    def broken(x: Tensor) -> Tensor:
        y = x.sin()
        compat.graph_break()
        return y.cos()

    torch.compiler.reset()
    before = compat.graph_breaks()
    torch.compile(broken, backend=backend)(torch.ones(2))
    assert compat.breaks_since(before) and graphs == [True, False]


def call_is_recorded_whole() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_method("softmax", (x, -1))

    def run(value: Tensor) -> Tensor:
        return compat.record_whole(node, lambda v, dim: v.softmax(dim), (value, -1), {})

    nodes = [n for n in make_fx(run)(torch.ones(2, 3)).graph.nodes if n.op == "call_method"]
    assert [n.target for n in nodes] == ["softmax"] and compat.is_whole(nodes[0])


def functorch_tensors_are_recognised() -> None:
    trace_only = []

    def inner(row: Tensor) -> Tensor:
        trace_only.append(compat.is_trace_only(row))
        return row

    torch.vmap(inner)(torch.ones(2, 2))
    assert trace_only == [True] and not compat.is_trace_only(torch.ones(2))


def ops_have_schemas() -> None:
    assert isinstance(aten.relu_.default, compat.OpOverload)
    schema = aten.relu_.default._schema
    assert schema.is_mutable and schema.name == "aten::relu_" and schema.overload_name == ""
    assert schema.arguments[0].alias_info.is_write
    assert aten.add.Tensor._schema.overload_name == "Tensor"


def ops_have_overloads() -> None:
    assert aten.add.Tensor in compat.overloads(aten.add)
    assert compat.overloads(torch.add) == []

    @torch.library.custom_op("popc_canary::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    assert compat.overloads(twice) == [torch.ops.popc_canary.twice.default]


def grouped_matmul_runs() -> None:
    x, w = torch.ones(4, 16, dtype=torch.bfloat16), torch.ones(2, 16, 8, dtype=torch.bfloat16)
    out = compat.grouped_mm(x, w, offs=torch.tensor([1, 4], dtype=torch.int32))
    assert out.shape == (4, 8) and bool((out == 16).all())


def subclasses_are_told() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    assert compat.is_traceable_wrapper_subclass(TwoTensor(torch.ones(2), torch.ones(2)))
    assert not compat.is_traceable_wrapper_subclass(nn.Parameter(torch.ones(2)))


def trees_are_taken_apart() -> None:
    tree = ([1, {"a": 2}], 3)
    flat, spec = compat.pytree.tree_flatten(tree)
    assert flat == [1, 2, 3] == compat.pytree.tree_leaves(tree)
    assert compat.pytree.tree_unflatten(flat, spec) == tree
    assert compat.pytree.tree_map_only(int, str, tree) == (["1", {"a": "2"}], "3")


def compiled_call_is_an_attribute() -> None:
    module = nn.Linear(2, 2)
    module.compile(backend="eager")
    assert module.__dict__[compat.COMPILED_CALL] is not None


def writes_are_counted() -> None:
    tensor = torch.ones(4)
    before = compat.writes_to(tensor)
    tensor[:2].mul_(2)  # through a view
    assert before is not None and compat.writes_to(tensor) == before + 1
    with torch.inference_mode():
        assert compat.writes_to(torch.ones(2)) is None


def storages_count_their_users() -> None:
    tensor = torch.ones(4)
    assert compat.storage_users(tensor) == 1
    view = tensor[1:]
    assert compat.storage_users(view) == 2


def prompts_are_marked() -> None:
    from transformers import GenerationMixin

    class Model(nn.Module, GenerationMixin):
        pass

    assert "_prefill" in compat.marked_prefill(Model(), lambda: pytest.fail("not called here"))


def subclasses_stand_for_others() -> None:
    """A wrapper subclass has the shape that it is given, and sees ops on it."""

    class Double(Tensor):
        inner: Tensor
        __torch_function__ = compat.no_torch_function

        @classmethod
        def __torch_dispatch__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func(*(2 * a.inner if isinstance(a, cls) else a for a in args))

    inner = torch.arange(6.0).reshape(2, 3)
    double = compat.wrapper_subclass(Double, (2, 3), (3, 1), torch.float32, inner.device)
    double.inner = inner
    assert type(double) is Double and double.shape == (2, 3)
    torch.testing.assert_close(torch.add(double, inner), 3 * inner)

"""Canaries: each private API that popc uses is there and does what popc relies on.

Where a new version of torch or transformers changes one, the canary's message says what of popc
breaks, and the module of ``popc/compat/`` that names it is the one to mend.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from popc import compat
from tests.helpers import canaries, private_names

SOURCES = sorted(Path(compat.__file__).parent.glob("*.py"))


class Canary(NamedTuple):
    """One private API.

    Attributes:
        name: dotted, of something that can be imported or of an object's attribute.
        breaks: what of popc does not work without it.
        check: raises where it is not as popc knows it.
    """

    name: str
    breaks: str
    check: Callable[[], None]


SHARED = "a graph is traced again with symbols of its own: guards on sizes are lost"
FIXED = "CUDA graphs copy weights and caches at each call, or are not used at all"
STRIDES = "a graph compiled after weights were laid out assumes their earlier strides"
PLACES = 'guards="prompt" can\'t tell which guards look at the model, and keeps all'
WRITES = 'guards="prompt" can\'t tell what a decode step changes, and keeps all guards'
BREAKS = "a graph break is not seen: no reason in the plan, and half a step is pruned"
WHOLE = "quantised and other wrapped weights come apart in the graph, and nothing is pruned"
BUILD = "the C++ kernels are not built: decode on a CPU runs the slow reference"
SUBCLASS = "quantised weights can't be tensors of a model"
PROXIES = "torch.fx.experimental.proxy_tensor"
DISPATCH = "torch.utils._python_dispatch"
CANARIES = [
    Canary(
        "torch._C._disabled_torch_function_impl", SUBCLASS, canaries.subclasses_stand_for_others
    ),
    Canary("torch.Tensor._make_wrapper_subclass", SUBCLASS, canaries.subclasses_stand_for_others),
    Canary("torch._guards.TracingContext", SHARED, canaries.fake_mode_is_shared),
    Canary("torch._subclasses.fake_tensor.FakeTensorMode", SHARED, canaries.fake_mode_stands_alone),
    Canary("torch._subclasses.fake_tensor.FakeTensor", SHARED, canaries.fake_mode_stands_alone),
    Canary(
        "torch.fx.experimental.symbolic_shapes.ShapeEnv", SHARED, canaries.fake_mode_stands_alone
    ),
    Canary(
        "torch._dynamo.source.ConstantSource", FIXED, canaries.parameters_tell_where_they_come_from
    ),
    Canary(
        "GraphModule._param_name_to_source", FIXED, canaries.parameters_tell_where_they_come_from
    ),
    Canary("Node._dynamo_source", FIXED, canaries.inputs_tell_where_they_come_from),
    Canary("Node.meta._dynamo_static_input_type", FIXED, canaries.inputs_tell_where_they_come_from),
    Canary(
        "torch._dynamo.symbolic_convert.InstructionTranslator",
        STRIDES,
        canaries.strides_are_kept_in_two_places,
    ),
    Canary(
        "torch._dynamo.exc.TensorifyScalarRestartAnalysis",
        STRIDES,
        functools.partial(
            canaries.backend_asks_for_another_trace, "TensorifyScalarRestartAnalysis"
        ),
    ),
    Canary(
        "torch._dynamo.exc.RestartAnalysis",
        "what asks Dynamo to trace anew is taken for a failed pass, and the graph is left dense",
        functools.partial(
            canaries.backend_asks_for_another_trace, "TensorifyScalarRestartAnalysis"
        ),
    ),
    Canary(
        "torch._dynamo.exc.SkipFrame",
        "what asks Dynamo not to trace is taken for a failed pass",
        functools.partial(canaries.backend_asks_for_another_trace, "SkipFrame"),
    ),
    Canary(
        "torch._dynamo.exc.BackendCompilerFailed",
        "popc's errors reach the user as a page of Dynamo's",
        canaries.errors_are_unwrapped,
    ),
    Canary("SideEffects._get_modified_vars", WRITES, canaries.frame_tells_what_it_writes_to),
    Canary("torch._guards.Source", PLACES, canaries.guards_tell_their_place),
    Canary("torch._guards.ChainedSource", PLACES, canaries.guards_tell_their_place),
    Canary("torch._dynamo.source.GlobalSource", PLACES, canaries.guards_tell_their_place),
    Canary("torch._dynamo.source.LocalSource", PLACES, canaries.guards_tell_their_place),
    Canary("torch._dynamo.guards.GuardBuilder", PLACES, canaries.guards_tell_what_they_ask),
    Canary("torch._dynamo.utils.counters", BREAKS, canaries.graph_breaks_are_counted),
    Canary(
        "torch._dynamo.graph_break",
        "popc.testing draws no model with a graph break",
        canaries.graph_breaks_are_counted,
    ),
    Canary("GraphModule.compile_subgraph_reason", BREAKS, canaries.graph_breaks_are_counted),
    Canary(
        "torch._dynamo.maybe_mark_dynamic",
        "a decode step is compiled anew at each length of a growing cache",
        canaries.fake_mode_is_shared,
    ),
    Canary(
        "torch._inductor.compile_fx.compile_fx",
        "no graph is compiled",
        canaries.inductor_takes_options,
    ),
    Canary(
        "torch._inductor.list_mode_options",
        "torch.compile's modes are not passed on: no CUDA graphs",
        canaries.modes_have_options,
    ),
    Canary("torch._inductor.codecache.CppCodeCache", BUILD, canaries.cpp_is_built),
    Canary("CDLL._name", BUILD, canaries.cpp_is_built),
    Canary(
        "torch._inductor.runtime.cache_dir_utils.cache_dir",
        "the kernels are looked for, and built, at each start",
        canaries.cache_is_a_folder,
    ),
    Canary(f"{PROXIES}.get_proxy_mode", WHOLE, canaries.call_is_recorded_whole),
    Canary(f"{PROXIES}.disable_proxy_modes_tracing", WHOLE, canaries.call_is_recorded_whole),
    Canary(f"{PROXIES}.track_tensor_tree", WHOLE, canaries.call_is_recorded_whole),
    Canary(f"{DISPATCH}.is_traceable_wrapper_subclass", WHOLE, canaries.subclasses_are_told),
    Canary(
        "torch._C._functorch.is_functorch_wrapped_tensor",
        "models with flex attention fail where their block masks are traced again",
        canaries.functorch_tensors_are_recognised,
    ),
    Canary("torch.utils._pytree", "no graph is captured", canaries.trees_are_taken_apart),
    Canary(
        "torch._ops.OpOverload",
        "what a graph writes to in place is not made functional, and is refused",
        canaries.ops_have_schemas,
    ),
    Canary(
        "torch._ops.OpOverloadPacket",
        "popc.register_rule does not find the overloads of an op",
        canaries.ops_have_overloads,
    ),
    Canary(
        "CustomOpDef._opoverload",
        "popc.register_rule does not take what torch.library.custom_op gives",
        canaries.ops_have_overloads,
    ),
    Canary(
        "torch._grouped_mm",
        "the oracle does not follow mixtures of experts",
        canaries.grouped_matmul_runs,
    ),
    Canary(
        "Module._compiled_call_impl",
        "the compiled call of the original is copied into a compiled model, and runs dense",
        canaries.compiled_call_is_an_attribute,
    ),
    Canary(
        "torch.Tensor._version",
        "a cache that was written to between two calls is taken for the same generation's",
        canaries.writes_are_counted,
    ),
    Canary(
        "torch._C._storage_Use_Count",
        "memory that others hold is laid out anew beneath them",
        canaries.storages_count_their_users,
    ),
    Canary(
        "UntypedStorage._cdata",
        "memory that others hold is laid out anew beneath them",
        canaries.storages_count_their_users,
    ),
    Canary(
        "transformers.GenerationMixin._prefill",
        "the last chunk of a prompt, if of one token, is taken for a decode step",
        canaries.prompts_are_marked,
    ),
]


def exists(name: str) -> bool:
    """Whether a dotted name can be reached by imports and attributes."""
    parts = name.split(".")
    value: Any = importlib.import_module(parts[0])
    for number, part in enumerate(parts[1:], 2):
        if not hasattr(value, part):
            try:
                importlib.import_module(".".join(parts[:number]))
            except ImportError:
                return False
        value = getattr(value, part)
    return True


def look_at(canary: Canary) -> None:
    """Raise with what breaks if the canary is dead."""
    if canary.name.split(".")[0] in ("torch", "transformers") and not exists(canary.name):
        pytest.fail(f"{canary.name} is gone: {canary.breaks}")
    try:
        canary.check()
    except Exception as error:
        pytest.fail(f"{canary.name} is not as popc knows it ({error!r}): {canary.breaks}")


@pytest.mark.parametrize("canary", CANARIES, ids=lambda canary: canary.name)
def test_private_api_is_as_known(canary: Canary) -> None:
    look_at(canary)


def test_every_private_name_has_a_canary() -> None:
    names = {canary.name for canary in CANARIES}
    parts = {name.rsplit(".", 1)[1] for name in names}
    for path in SOURCES:
        assert private_names.of_torch(path) <= names, path.name
        assert private_names.of_objects(path) <= parts, path.name
    text = "".join(path.read_text(encoding="utf-8") for path in SOURCES)
    assert [part for part in parts if part not in text] == [], "canaries of what is not used"


def test_a_dead_canary_says_what_breaks() -> None:
    def changed() -> None:
        raise AttributeError("renamed")

    gone = Canary("torch._no_such_thing", "nothing works", canaries.trees_are_taken_apart)
    other = Canary("torch.Tensor._version", "caches are mistaken", changed)
    for canary, message in ((gone, "is gone: nothing works"), (other, "renamed.*: caches are mi")):
        with pytest.raises(pytest.fail.Exception, match=message):
            look_at(canary)

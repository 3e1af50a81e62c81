"""Every private torch API that popc uses, each with its reason. Seen working on torch 2.11 - 2.13.

No other module of popc names one, which ``tests/test_imports.py`` holds. What all read is an op's
``_schema``, whose arguments and aliases nothing public tells.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import re
import types
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import torch
from torch import fx
from torch._guards import ChainedSource, Source, TracingContext
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from popc.errors import PopcError

RECOMPILE_LIMIT = 64
OpOverload = torch._ops.OpOverload  # the type of an op in a graph
grouped_mm = torch._grouped_mm  # what torch.nn.functional.grouped_mm was before torch 2.10
graph_break = torch._dynamo.graph_break  # documented, but in a private module
_NUMBER = re.compile(r"___\d+\b")  # of names that Dynamo makes up, for each graph anew


def dynamo_fake_mode() -> FakeTensorMode:
    """The fake mode of the Dynamo compilation under way.

    Private because a re-trace must share Dynamo's ShapeEnv, so that guards on its symbols reach
    Dynamo's guards; the public ``detect_fake_mode`` finds the placeholders' other mode.
    """
    mode = TracingContext.get().fake_mode
    assert mode is not None
    return mode


def fakify(mode: FakeTensorMode, value: Any) -> Any:
    """``value`` as a fake tensor of ``mode``, with the symbols that Dynamo gave its sizes."""
    if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
        return value
    context = TracingContext.try_get()
    symbolic = context.tensor_to_context.get(value) if context is not None else None
    if symbolic is None:
        return mode.from_tensor(value, static_shapes=True)
    # With the source that Dynamo gave: a view's base would otherwise get symbols without one.
    return mode.from_tensor(value, symbolic_context=symbolic, source=symbolic.tensor_source)


def inductor(
    gm: fx.GraphModule, inputs: Sequence[Any], options: Mapping[str, Any], tag: str = ""
) -> Callable[..., Any]:
    """Inductor's ``compile_fx``, the entry that ``torch.compile`` itself calls.

    ``torch._inductor.compile`` is documented, but takes no fake inputs with symbolic shapes.

    Args:
        tag: what generated code is kept for; under another tag it is not found again.
    """
    tag = torch.compiler.config.cache_key_tag + tag
    with torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
        return compile_fx(  # type: ignore[return-value]
            gm, list(inputs), config_patches=dict(options) or None
        )


def mode_options(mode: str | None) -> dict[str, Any]:
    """What a mode of ``torch.compile`` is to Inductor. Documented, but in a private module."""
    return dict(torch._inductor.list_mode_options(mode)) if mode else {}


def keep_inputs(
    gm: fx.GraphModule, original: fx.GraphModule, written: Callable[[fx.Node], bool]
) -> None:
    """Let ``gm`` say of its inputs what Dynamo's ``original``, which it was made of, says of them.

    That is where they come from, and which lie at fixed addresses, as parameters and static caches
    do: CUDA graphs copy all others at each call, and are not used at all where one of those is
    written to. AOTAutograd takes it from attributes that nothing public sets, so a graph that was
    traced again has to be given them.

    Args:
        gm: its inputs are those of ``original``, in their order, then others.
        written: whether an input is written to. Such a one is taken to lie at a fixed address: a
            static cache that was allocated in a compiled prefill is not marked as one. At another
            address, CUDA graphs are recorded anew.
    """
    from torch._dynamo.source import ConstantSource

    known = original.graph.find_nodes(op="placeholder")
    if "dynamo_compile_id" not in original.meta or not all(map(_has_source, known)):
        return
    given = gm.graph.find_nodes(op="placeholder")
    for node, like in itertools.zip_longest(given, known):
        node._dynamo_source = getattr(like, "_dynamo_source", None)
        said = {} if like is None else like.meta.get("tensor_dict", {})
        fixed = {"_dynamo_static_input_type": "unguarded"} if written(node) else {}
        node.meta["tensor_dict"] = {**said, **fixed}
    held = (name for name, _ in (*gm.named_parameters(), *gm.named_buffers()))
    gm._param_name_to_source = {name: ConstantSource(name) for name in held}  # type: ignore[assignment]
    gm.meta["dynamo_compile_id"] = original.meta["dynamo_compile_id"]


def _has_source(node: fx.Node) -> bool:
    return hasattr(node, "_dynamo_source")


def compile_alone(
    function: Callable[..., Any],
    backend: Callable[..., Any],
    guard_filter: Callable[[Sequence[Any]], Sequence[bool]] | None = None,
) -> Callable[..., Any]:
    """``torch.compile(function, backend)`` with a recompile limit of its own.

    Dynamo counts recompilations by code object, which all models of a class share: a few compiled
    twins would use up the limit and fall back to eager. ``isolate_recompiles=True`` does the same
    from torch 2.13 on; a frame with a copied code object does it everywhere.

    Args:
        guard_filter: says which guards of a graph are kept: Dynamo's ``guard_filter_fn``.
    """
    popc_forward = function  # _place knows the model by this variable

    def frame(*args: Any, **kwargs: Any) -> Any:
        return popc_forward(*args, **kwargs)

    own = types.FunctionType(
        frame.__code__.replace(), frame.__globals__, frame.__name__, None, frame.__closure__
    )
    # The limit is for each code object, and a decorator's wrapper is one for all it decorates: in
    # a model traced in pieces it would be reached by the number of layers. From torch 2.13 on.
    known = inspect.signature(torch.compile).parameters
    limit: Any = {"recompile_limit": RECOMPILE_LIMIT} if "recompile_limit" in known else {}
    options: Any = None if guard_filter is None else {"guard_filter_fn": guard_filter}
    return torch.compile(own, backend=backend, options=options, **limit)


def call_compiled(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``; an error of popc's own is raised as it is, not in Dynamo's wrapping."""
    try:
        return function(*args)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if isinstance(error.inner_exception, PopcError):
            raise error.inner_exception from None
        raise


_running: ContextVar[object] = ContextVar("popc_running", default=None)


class running:
    """A context in which the frames that Dynamo traces are ``owner``'s: see :func:`traces_for`."""

    __slots__ = ("_owner", "_token")

    def __init__(self, owner: object) -> None:
        self._owner = owner

    def __enter__(self) -> None:
        self._token = _running.set(self._owner)

    def __exit__(self, *_: object) -> None:
        _running.reset(self._token)


def traces_for(owner: object) -> Callable[[], bool]:
    """A function that Dynamo calls as it traces: whether the frame that it compiles is ``owner``'s.

    Its answer is a constant of the graph, without a guard: which frame is compiled never changes.
    """

    def own() -> bool:
        return _running.get() is owner

    return torch.compiler.assume_constant_result(own)


def marked_prefill(
    module: torch.nn.Module, mark: Callable[[], contextlib.AbstractContextManager[Any]]
) -> dict[str, Any]:
    """``module``'s own attribute for transformers' ``_prefill``, which runs it under ``mark()``.

    Private because nothing public tells the last chunk of a prompt, if it is a single token, from a
    decode step. An assistant's drafts go through it too, and are left alone: they say that they are
    no first iteration. Empty where this transformers, or the model, has no such method.
    """
    dense = getattr(type(module), "_prefill", None)
    if dense is None or "is_first_iteration" not in inspect.signature(dense).parameters:
        return {}

    @functools.wraps(dense)
    def prefill(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(dense).bind(self, *args, **kwargs).arguments
        begins = given.get("is_first_iteration", True)
        with mark() if begins else contextlib.nullcontext():
            return dense(self, *args, **kwargs)

    return {"_prefill": types.MethodType(prefill, module)}


class Place(NamedTuple):
    """Where Dynamo finds an object: ``path`` names all that it is reached through, from what
    ``root`` tells on: the function given to :func:`compile_alone`, a global, or what a call brings.
    """

    root: Literal["model", "global", "call"]
    path: tuple[str, ...]

    def within(self, other: Place) -> bool:
        """Whether this is, or is reached through, what is at ``other``."""
        return self.path[: len(other.path)] == other.path


def _place(source: Source) -> Place:
    """Private because a guard and a write tell of a place by ``Source`` alone."""
    from torch._dynamo.source import GlobalSource, LocalSource

    sources = [source]
    while isinstance(source, ChainedSource):
        sources.append(source := source.base)
    path = tuple(_NUMBER.sub("", _name(each)) for each in reversed(sources))
    if isinstance(source, GlobalSource):
        return Place("global", path)
    # The one variable of the frame that is no argument of it.
    is_model = isinstance(source, LocalSource) and source.local_name == "popc_forward"
    return Place("model" if is_model else "call", path)


def _name(source: Source) -> str:
    name: Any = source.name  # a method in earlier versions
    return name() if callable(name) else name


def written_places() -> list[Place] | None:
    """What the frame that Dynamo compiles now writes to, attributes and globals; None if this torch
    does not tell. For a backend; private because nothing public tells."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    places = []
    try:
        for variable in InstructionTranslator.current_tx().output.side_effects._get_modified_vars():
            with contextlib.suppress(NotImplementedError):  # of the frame alone, so without a name
                if variable.source is not None:
                    places.append(_place(variable.source))
    except AttributeError:
        return None
    return places


def guard_place(entry: Any) -> Place:
    """Where the object is that a guard looks at; ``entry`` is what a ``guard_filter_fn`` is given.

    An entry's own name does not tell a local variable from a key of the same name. What this torch
    does not tell is taken for the call's: such a guard is kept.
    """
    try:
        return _place(entry.orig_guard.originating_source)
    except (AttributeError, NotImplementedError):
        return Place("call", ())


def guard_asks(entry: Any) -> str | None:
    """What makes a guard besides the object it looks at: an attribute, a key, another object.

    It stands in what makes the guard, and nothing public tells. None if that can't be read: two
    guards may then differ in it.
    """
    from torch._dynamo.guards import GuardBuilder

    make = getattr(getattr(entry, "orig_guard", None), "create_fn", None)
    if entry.guard_type == "TENSOR_MATCH":
        return ""  # of a tensor, what it is made of is the tensor
    if make is not None and make is getattr(GuardBuilder, entry.guard_type, None):
        return ""  # the method itself, which is given the guard alone
    if not isinstance(make, functools.partial):
        return None
    given: dict[Any, Any] = {**dict(enumerate(make.args)), **make.keywords}
    readable = all(isinstance(v, Source | str | int | type(None)) for v in given.values())
    return _NUMBER.sub("", repr(given)) if readable else None


def mark_dynamic(tensor: torch.Tensor, sizes: Sequence[int]) -> bool:
    """Let Dynamo take the one dim of ``tensor`` with one of ``sizes`` for dynamic, if it can.

    Where several dims have such a size nothing tells which one is meant, and none is marked; 0 and
    1 are constants to Dynamo. Returns whether one was. Documented, but in a private module.
    """
    found = [dim for dim, size in enumerate(tensor.shape) if size in sizes and size > 1]
    if len(found) == 1:
        torch._dynamo.maybe_mark_dynamic(tensor, found[0])
    return len(found) == 1


def is_trace_only(value: Any) -> bool:
    """Whether ``value`` is a tensor that means nothing outside the trace that it was made in.

    A re-trace holds such constants where a vmap was traced, as for flex attention's block masks
    (batched tensors of a vmap that is over), and where a loop was unrolled over a tensor (fake
    tensors). Private because nothing public tells them.
    """
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    if not isinstance(value, torch.Tensor):
        return False
    return isinstance(value, FakeTensor) or wrapped(value)


def overloads(op: Any) -> list[OpOverload]:
    """The overloads of an op, given as one of them, as ``torch.ops.x.y``, or by its definition;
    none if it is no op.

    Private because what ``torch.library.custom_op`` gives does not show its op.
    """
    op = getattr(op, "_opoverload", op)
    if isinstance(op, OpOverload):
        return [op]
    if isinstance(op, torch._ops.OpOverloadPacket):
        return [getattr(op, name) for name in op.overloads()]
    return []


def is_for_dynamo(error: Exception) -> bool:
    """Whether ``error`` is no failure but asks Dynamo to trace anew, or not at all. Private because
    Inductor and Dynamo speak to each other so, through whatever backend is between them."""
    return isinstance(error, torch._dynamo.exc.RestartAnalysis | torch._dynamo.exc.SkipFrame)


def graph_breaks() -> dict[str, int]:
    """Dynamo's count of graph breaks so far, by reason. Private because nothing public tells."""
    return dict(torch._dynamo.utils.counters["graph_break"])


def breaks_off(gm: fx.GraphModule) -> bool:
    """Whether Dynamo broke the model's graph at the end of ``gm``; private as nothing public tells.

    False where this torch does not tell.
    """
    reason = getattr(gm, "compile_subgraph_reason", None)
    return bool(getattr(reason, "graph_break", False))


def breaks_since(before: Mapping[str, int]) -> list[str]:
    """The reasons, a line each, for which Dynamo broke graphs since it had counted ``before``."""
    after = graph_breaks()
    if after == before:
        return []
    new = [reason for reason, count in after.items() if count > before.get(reason, 0)]
    return [reason.strip().splitlines()[0] for reason in new]


def record_whole(node: fx.Node, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """``call(*args, **kwargs)`` within a ``make_fx``, recorded as the one node that ``node`` is.

    Private because ``make_fx`` records the ops that a call comes down to, and nothing public the
    call itself; on tensor subclasses these are ops on tensors that are no inputs of the graph.
    """
    from torch.fx.experimental import proxy_tensor

    mode = proxy_tensor.get_proxy_mode()
    assert mode is not None
    tracer: Any = mode.tracer
    proxies = pytree.tree_map(tracer.unwrap_proxy, (tuple(args), dict(kwargs)))
    proxy = tracer.create_proxy(node.op, node.target, *proxies)
    proxy.node.meta[_WHOLE] = True
    with proxy_tensor.disable_proxy_modes_tracing():
        value = call(*args, **kwargs)
    return proxy_tensor.track_tensor_tree(value, proxy, constant=None, tracer=tracer)


def is_whole(node: fx.Node) -> bool:
    """Whether :func:`record_whole` recorded it."""
    return _WHOLE in node.meta


_WHOLE = "popc_whole"


def is_held_by_module(placeholder: fx.Node) -> bool:
    """Whether an input of a Dynamo graph is a parameter or a buffer of the model. Private because
    nothing public tells the two from inputs of a call."""
    return "_dynamo_static_input_type" in placeholder.meta.get("tensor_dict", {})


def new_fake_mode() -> FakeTensorMode:
    """A fake mode for graphs that do not come from Dynamo; real constants may be mixed in."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def load_cpp(source: str) -> str:
    """Build C++ that registers ops as Inductor builds its own, and load it; the library's path.

    ``torch.utils.cpp_extension`` is public, but needs ninja, does not know this machine's vector
    instructions, and builds in a second cache.
    """
    from torch._inductor.codecache import CppCodeCache

    return str(CppCodeCache.load(source)._name)


def inductor_cache() -> str:
    """The folder in which Inductor keeps what it builds; private because nothing public tells."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return str(cache_dir())


def writes_to(tensor: torch.Tensor) -> int | None:
    """How often ``tensor`` was written to in place; None if that is not counted, as in inference
    mode. PyTorch's notes on autograd tell of ``_version``, but nothing public gives it."""
    return None if tensor.is_inference() else tensor._version


def storage_users(tensor: torch.Tensor) -> int:
    """How many tensors hold the storage of ``tensor``; private because nothing public tells."""
    storage = tensor.untyped_storage()
    # One for the tensor, one for `storage`.
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1


def take_new_strides(parameters: Sequence[torch.Tensor]) -> None:
    """Let the trace under way hold ``parameters`` as they lie now, from within a backend.

    For a backend that changed strides. Two places hold the old ones: the fake mode's memo, and what
    Dynamo's guards are made of. Where those are not as they are known here, Dynamo traces the frame
    again, by the one exception that it lets through from a backend for that purpose.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    context = TracingContext.get()
    try:
        known = dynamo_fake_mode().fake_tensor_converter.meta_converter.describer.lookup_tensor
        strides = InstructionTranslator.current_tx().output.input_source_to_sizes_strides
        sources = [context.tensor_to_context[p].tensor_source for p in parameters]
        held = [strides[source] for source in sources]
        if not all(parameter in known for parameter in parameters):
            raise KeyError("the memo")
    except (AttributeError, KeyError) as error:
        raise torch._dynamo.exc.TensorifyScalarRestartAnalysis(
            restart_reason="popc laid weights out"
        ) from error
    for parameter, recorded in zip(parameters, held, strict=True):
        del known[parameter]
        recorded["stride"] = parameter.stride()

"""Bring any traced program to popc's one IR: a pre-dispatch ATen graph with fake values.

In that IR ``aten.linear``, ``aten.silu`` and ``aten.scaled_dot_product_attention`` are still whole,
every parameter is a graph input, and ``node.meta["val"]`` holds a fake tensor.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta, set_current_meta
from torch.utils.weak import WeakTensorKeyDictionary

from popc import compat
from popc.analysis.mutation import may_alias
from popc.analysis.unwrap import Unwrapping
from popc.compat import is_traceable_wrapper_subclass, pytree
from popc.errors import GraphError
from popc.quant import QuantizedTensor, Stored

aten = torch.ops.aten

_numbers = itertools.count()
_identities = WeakTensorKeyDictionary()
_lock = threading.Lock()


def identity(parameter: torch.Tensor) -> int:
    """A number that is this parameter's for good, unlike ``id``, which is reused."""
    known = _identities.get(parameter)
    if known is None:
        with _lock:  # of two threads that ask first, both get the same
            known = _identities.setdefault(parameter, next(_numbers))
    return int(known)


@dataclass
class Captured:
    """An ATen graph and the real parameters behind its inputs.

    ``parameters`` maps a placeholder to its tensor; every other placeholder is an activation. Of
    these ``wrapped`` are no plain tensors: quantised, or spread over devices. Of a tensor subclass
    what reads it is in the graph as the program has it, not as ATen ops: see :class:`_Program`.
    ``quantized`` says how those of popc's own are stored, by the placeholder of what they hold, and
    ``unwrapping`` makes the graph's inputs of Dynamo's.
    ``runnable`` is False where the graph can be read but not run: values of the trace are in it.
    ``breaks_off``: the model goes on in another graph, as Dynamo broke this one here.
    ``number`` is this capture's alone.
    """

    gm: fx.GraphModule
    parameters: dict[fx.Node, torch.Tensor]
    fake_mode: Any
    runnable: bool = True
    wrapped: dict[fx.Node, torch.Tensor] = field(default_factory=dict)
    quantized: dict[fx.Node, Stored] = field(default_factory=dict)
    unwrapping: Unwrapping = field(default_factory=Unwrapping)
    breaks_off: bool = False
    number: int = field(default_factory=itertools.count().__next__)


def capture_dynamo(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Captured:
    """Re-trace a Dynamo graph; call it inside a Dynamo backend, where its fake mode is known."""
    _intern_traces(gm.graph)
    mode = compat.dynamo_fake_mode()
    fakes = [compat.fakify(mode, value) for value in example_inputs]
    known = map(compat.is_held_by_module, gm.graph.find_nodes(op="placeholder"))
    captured = _trace(gm, fakes, example_inputs, mode, list(known))
    captured.breaks_off = compat.breaks_off(gm)
    return captured


def capture_module(
    gm: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> Captured:
    """Re-trace a plain ``fx.GraphModule`` or the module of an exported program.

    Raises:
        GraphError: the graph does not run on ``args``.
    """
    state = {**dict(gm.named_parameters()), **dict(gm.named_buffers())}
    names = list(state)
    flat, spec = pytree.tree_flatten((tuple(args), dict(kwargs or {})))

    class Lifted(torch.nn.Module):
        """``gm`` with its parameters and inputs as one flat argument list."""

        def forward(self, *values: Any) -> Any:
            tensors, rest = values[: len(names)], values[len(names) :]
            call_args, call_kwargs = pytree.tree_unflatten(list(rest), spec)
            out = torch.func.functional_call(
                gm, dict(zip(names, tensors, strict=True)), call_args, call_kwargs
            )
            return tuple(pytree.tree_leaves(out))

    mode = compat.new_fake_mode()
    inputs = [*state.values(), *flat]
    fakes = [compat.fakify(mode, value) for value in inputs]
    return _trace(Lifted(), fakes, inputs, mode, [True] * len(names) + [False] * len(flat))


def _trace(
    program: torch.nn.Module,
    fakes: Sequence[Any],
    reals: Sequence[Any],
    mode: Any,
    of_model: Sequence[bool],
) -> Captured:
    """``of_model`` tells for each input whether it is a parameter or buffer of the model."""
    unwrapping = Unwrapping.of(fakes)
    plain = unwrapping(fakes)

    # An Interpreter (not the module itself) carries each node's stack trace and module path over.
    call = _Program(program).run if isinstance(program, fx.GraphModule) else program

    def run(*values: Any) -> Any:
        return call(*unwrapping.within_trace(fakes, values))

    try:
        with mode, preserve_node_meta():
            gm = make_fx(run, pre_dispatch=True)(*plain)
    except Exception as error:
        raise GraphError(f"the graph could not be traced to ATen ops: {error}") from error
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    inputs = list(zip(placeholders, reals, of_model, strict=False))
    wrapped = {node: real for node, real, known in inputs if _is_wrapped(real, known)}
    parameters: dict[fx.Node, torch.Tensor] = {
        node: real for node, real, _ in inputs if isinstance(real, torch.nn.Parameter)
    }
    quantized = {node: real for node, real, _ in inputs if isinstance(real, QuantizedTensor)}
    parameters |= wrapped | {node: real.packed for node, real in quantized.items()}
    # What nothing reads must not count against a channel: attention weights averaged in vain, say.
    drop_dead(gm.graph)
    _drop_inplace(gm)
    _slim(gm.graph)
    constants = [getattr(gm, n.target) for n in gm.graph.nodes if n.op == "get_attr"]
    runnable = not any(map(compat.is_trace_only, constants))
    stored = {node: real.stored for node, real in quantized.items()}
    return Captured(gm, parameters, mode, runnable, wrapped, stored, unwrapping)


class _Program(fx.Interpreter):
    """Runs a program within a trace, node by node.

    What reads a tensor subclass is recorded as it is: what it comes down to are ops on tensors that
    the subclass holds within, and those are no inputs of the graph.
    """

    def run_node(self, n: fx.Node) -> Any:
        if n.op not in ("call_function", "call_method"):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if not any(map(is_traceable_wrapper_subclass, pytree.tree_leaves((args, kwargs)))):
            return super().run_node(n)

        def call(*args: Any, **kwargs: Any) -> Any:
            return getattr(self, n.op)(n.target, args, kwargs)

        with set_current_meta(n):
            return compat.record_whole(n, call, args, kwargs)


def _is_wrapped(value: Any, of_model: bool) -> bool:
    """Whether an input is a weight that is no plain tensor; ``of_model`` as in :func:`_trace`."""
    if isinstance(value, QuantizedTensor):
        return False
    if is_traceable_wrapper_subclass(value):
        return of_model or isinstance(value, torch.nn.Parameter)
    is_parameter = isinstance(value, torch.nn.Parameter)
    return is_parameter and type(value) is not torch.nn.Parameter


def drop_dead(graph: fx.Graph) -> None:
    """Drop what nothing reads; of calls on tensor subclasses nothing tells what they write to."""

    def has_effect(node: fx.Node) -> bool:
        return node.is_impure() or compat.is_whole(node)

    graph.eliminate_dead_code(has_effect)


def _slim(graph: fx.Graph) -> None:
    """Drop metadata that only a compiler asks for: compiled graphs keep what was captured."""
    _intern_traces(graph)
    for node in graph.nodes:
        for key in ("from_node", "tensor_meta", "source_fn_stack", "original_aten", "seq_nr"):
            node.meta.pop(key, None)


def _intern_traces(graph: fx.Graph) -> None:
    """Stack traces are texts of kilobytes, the same in all layers."""
    for node in graph.nodes:
        if "stack_trace" in node.meta:
            node.meta["stack_trace"] = sys.intern(node.meta["stack_trace"])


def _drop_inplace(gm: fx.GraphModule) -> None:
    """Make ``relu_`` and its like out of place where nothing else reads the overwritten value."""
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, compat.OpOverload):
            continue
        schema = node.target._schema
        if not schema.is_mutable or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        name = schema.name.removeprefix("aten::")
        source = node.args[0]
        packet = getattr(aten, name[:-1], None) if name.endswith("_") else None
        overload = getattr(packet, schema.overload_name or "default", None) if packet else None
        is_view = source.op == "call_function" and may_alias(source)
        if (
            overload is None
            or source.op == "placeholder"
            or list(source.users) != [node]
            or is_view
        ):
            continue
        node.target = overload
    gm.recompile()

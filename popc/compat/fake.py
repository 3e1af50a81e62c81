"""Fake tensors: tracing a graph of Dynamo's again, within Dynamo's compilation or outside of one.

Seen working on torch 2.11 - 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from popc.compat.eager import pytree

_WHOLE = "popc_whole"


def dynamo_fake_mode() -> FakeTensorMode:
    """The fake mode of the Dynamo compilation under way.

    Private because a re-trace must share Dynamo's ShapeEnv, so that guards on its symbols reach
    Dynamo's guards; the public ``detect_fake_mode`` finds the placeholders' other mode.
    """
    mode = TracingContext.get().fake_mode
    assert mode is not None
    return mode


def new_fake_mode() -> FakeTensorMode:
    """A fake mode for graphs that do not come from Dynamo; real constants may be mixed in."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


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


def take_new_strides(parameters: Sequence[torch.Tensor]) -> None:
    """Update the strides of ``parameters`` in the trace under way, from within a backend.

    For a backend that changed strides. Two places hold the old ones: the fake mode's memo, and what
    Dynamo's guards are made of. Where this torch has no such places, Dynamo traces the frame again,
    by the one exception that it lets through from a backend for that purpose.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    context = TracingContext.get()
    try:
        memo = dynamo_fake_mode().fake_tensor_converter.meta_converter.describer.lookup_tensor
        strides = InstructionTranslator.current_tx().output.input_source_to_sizes_strides
        sources = [context.tensor_to_context[p].tensor_source for p in parameters]
        recorded_strides = [strides[source] for source in sources]
        if not all(parameter in memo for parameter in parameters):
            raise KeyError("the memo")
    except (AttributeError, KeyError) as error:
        raise torch._dynamo.exc.TensorifyScalarRestartAnalysis(
            restart_reason="popc laid weights out"
        ) from error
    for parameter, record in zip(parameters, recorded_strides, strict=True):
        del memo[parameter]
        record["stride"] = parameter.stride()


def take_new_parameters(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Have the guards of the trace under way made of new tensors, from within a backend.

    For a backend that has put other tensors in the place of parameters. A guard keeps the tensor
    that Dynamo saw. Where this torch has no such guards, Dynamo traces the frame again, as in
    :func:`take_new_strides`.

    Args:
        pairs: each parameter, with the tensor that is in its place now.
    """
    new = {id(parameter): other for parameter, other in pairs}
    found = set()
    try:
        for guard in TracingContext.get().guards_context.dynamo_guards.inner:
            keywords = getattr(guard.create_fn, "keywords", {})
            reference: Any = keywords.get("value")
            parameter = reference() if callable(reference) else None
            if parameter is not None and id(parameter) in new:
                keywords["value"] = type(reference)(new[id(parameter)])
                found.add(id(parameter))
    except AttributeError:
        found.clear()
    if found != new.keys():
        raise torch._dynamo.exc.TensorifyScalarRestartAnalysis(
            restart_reason="popc quantised weights"
        )

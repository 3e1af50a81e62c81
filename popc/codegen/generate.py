"""From a rewritten graph to a function that runs it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import torch
from torch import fx

from popc.codegen.outline import Outline, outline
from popc.codegen.parts import Parts, hoist_parts
from popc.codegen.program import Program
from popc.log import log_graph, logger

Compiled = Callable[..., Sequence[Any]]


class Compiler(Protocol):
    """Compiles one graph, given fake inputs."""

    def __call__(
        self, piece: fx.GraphModule, inputs: Sequence[Any], *, calls: int, whole: bool
    ) -> Compiled:
        """Code of ``piece``, which a step calls ``calls`` times; ``whole``: of all of the graph."""
        ...


def generate_code(gm: fx.GraphModule, fed: Collection[fx.Node], compiler: Compiler) -> Compiled:
    """Code of ``gm``; layers that are alike are compiled once.

    Args:
        gm: changed in place: parts of the inputs ``fed`` become inputs, see
            :mod:`popc.codegen.parts`.
        fed: those of its inputs that are the same tensors from token to token.
    """
    parts = hoist_parts(gm, fed)
    pieces = outline(gm)
    code = _compiled(pieces, compiler) if pieces is not None else None
    if pieces is None or code is None:
        run = compiler(gm, _fake_inputs(gm), calls=1, whole=True)
    else:
        run = Program(gm, pieces, code)
    return _WithParts(run, Parts(parts)) if parts else run


def _compiled(pieces: Outline, compiler: Compiler) -> list[Compiled] | None:
    """Code of each piece; None if one holds for the sizes of one of its calls alone."""
    code = []
    for i, piece in enumerate(pieces.pieces):
        calls = pieces.repetitions(i)
        logger.info("code of %d ops, called %d times", len(piece.graph.nodes), calls)
        log_graph(f"piece {i}, called {calls} times", piece)
        inputs = _fake_inputs(piece)
        before = len(_guards(inputs))
        code.append(compiler(piece, inputs, calls=calls, whole=False))
        if any(guard.expr.free_symbols & pieces.own_sizes[i] for guard in _guards(inputs)[before:]):
            logger.info("its layers are compiled as a whole: the code asks for certain sizes")
            return None
    return code


def _guards(inputs: Sequence[Any]) -> Sequence[Any]:
    """What code that was made of ``inputs`` asks of their symbolic sizes, so far."""
    for value in inputs:
        for size in (value, *getattr(value, "shape", ())):
            if isinstance(size, torch.SymInt):
                return list(size.node.shape_env.guards)
    return []


def fits_cpp_wrapper(gm: fx.GraphModule) -> bool:
    """Whether Inductor's ``cpp_wrapper`` is safe for a graph: on CPUs, of ATen's and custom ops.

    In torch 2.13 it reads a result that is a list of one tensor as that tensor, and crashes.
    """
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.device.type != "cpu":
            return False
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        schema = getattr(node.target, "_schema", None)
        if schema is None and isinstance(value, torch.Tensor | tuple | list):
            return False
        for result in () if schema is None else schema.returns:
            if isinstance(result.type, torch.ListType) and result.alias_info is None:
                return False
    return True


def _fake_inputs(gm: fx.GraphModule) -> list[Any]:
    return [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]


class _WithParts:
    def __init__(self, run: Compiled, parts: Parts) -> None:
        self._run, self._parts = run, parts

    def __call__(self, *args: Any) -> Sequence[Any]:
        return self._run(*args, *self._parts(args))

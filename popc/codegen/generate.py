"""From a rewritten graph to a function that runs it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

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
    if pieces is None:
        run = compiler(gm, _fake_inputs(gm), calls=1, whole=True)
    else:
        run = Program(gm, pieces, _compiled(pieces, compiler))
    return _WithParts(run, Parts(parts)) if parts else run


def _compiled(pieces: Outline, compiler: Compiler) -> list[Compiled]:
    code = []
    for i, piece in enumerate(pieces.pieces):
        calls = pieces.repetitions(i)
        logger.info("code of %d ops, called %d times", len(piece.graph.nodes), calls)
        log_graph(f"piece {i}, called {calls} times", piece)
        code.append(compiler(piece, _fake_inputs(piece), calls=calls, whole=False))
    return code


def _fake_inputs(gm: fx.GraphModule) -> list[Any]:
    return [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]


class _WithParts:
    def __init__(self, run: Compiled, parts: Parts) -> None:
        self._run, self._parts = run, parts

    def __call__(self, *args: Any) -> Sequence[Any]:
        return self._run(*args, *self._parts(args))

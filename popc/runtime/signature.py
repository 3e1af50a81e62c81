"""What the inputs of a graph are, as Dynamo gave it: before passes add theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from popc.analysis.capture import Captured
from popc.analysis.labels import same_size
from popc.analysis.mutation import is_written
from popc.analysis.propagation import shape
from popc.analysis.tokens import rows_of
from popc.planning.rewrite_plan import RewritePlan


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of a graph.

    Attributes:
        activations: positions of inputs that are cache-like: see :func:`is_cache_like`.
        written: those of them that the graph writes to, as static caches are.
        outputs: how many there are.
        batch: from a call's inputs, B where ``scope="sequence"``; else, or if it can't be told,
            None.
    """

    activations: list[int]
    written: list[int]
    outputs: int
    batch: Callable[[Sequence[Any]], int | None]

    @classmethod
    def of(cls, captured: Captured, work: RewritePlan) -> Signature:
        """Of a graph that no pass has rewritten yet."""
        placeholders = captured.gm.graph.find_nodes(op="placeholder")
        activations = [
            i
            for i, node in enumerate(placeholders)
            if node not in captured.parameters and is_cache_like(node.meta.get("val"))
        ]
        written = [i for i in activations if is_written(placeholders[i])]
        (outputs,) = captured.gm.graph.output_node().args
        assert isinstance(outputs, list | tuple)
        return cls(activations, written, len(outputs), _batch_of(work, placeholders))


def is_cache_like(value: Any) -> bool:
    """A floating tensor with batch, token and feature axes, as caches and hidden states are."""
    return isinstance(value, torch.Tensor) and value.dim() >= 3 and value.is_floating_point()


def _batch_of(
    work: RewritePlan, placeholders: Sequence[fx.Node]
) -> Callable[[Sequence[Any]], int | None]:
    """How to tell the batch size of the regions from a call's inputs."""
    values = [slot.region.hidden for slot in work.pruned]
    values += [region.hidden for region in work.measured]
    values += [group.x for group in (*work.pruned_inputs, *work.measured_inputs)]
    if work.config.scope == "batch" or not values:
        return lambda args: None
    rows = rows_of(values[0])
    batch = shape(rows.grid if rows is not None else values[0])[0]
    if isinstance(batch, int):
        return lambda args: batch
    for i, node in enumerate(placeholders):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dim() and same_size(value.shape[0], batch):
            return lambda args: int(args[i].shape[0])
    return lambda args: None

"""What a compiled model's quantised weights are read as, as an eager model with plain weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from popc.analysis.capture import identity
from popc.analysis.plan import InputRecord, Plan, RegionRecord
from popc.compiled_model import dense
from popc.ops import dequantize
from popc.ops.planes import PLANE_BYTES, blocks_of
from popc.quant import QuantizedTensor

V = TypeVar("V")


@dataclass(frozen=True)
class Readings:
    """A weight that can be read by grade.

    Attributes:
        coarse: what reading the high plane alone adds to it, ``[N, K]``, or ``[E, N, K]``; zeros
            without a low plane.
        bytes: of all planes and scales; ``low_bytes`` of the low plane.
    """

    coarse: Tensor
    bytes: int
    low_bytes: int

    @classmethod
    def of(cls, weight: QuantizedTensor) -> Readings:
        """Those of a weight that is stored channel-major."""
        stored, held = weight.stored, (weight.packed, weight.scale, weight.zero)
        both, high = (dequantize(*held, *stored[:4], bits) for bits in (8, 4))
        *lead, outputs, inputs = stored.sizes
        rows = math.prod((*lead, inputs))
        low = rows * PLANE_BYTES * blocks_of(outputs) if stored.planes == 2 else 0
        return cls(high - both, sum(part.nbytes for part in held if part is not None), low)


class Dequantized:
    """A model as a compiled one reads it, and what the compiled one's plan means for it.

    Without quantised weights it is the model itself.

    Args:
        compiled: made of ``model``; it has run.

    Attributes:
        model: eager, with plain weights.
        plain: by the address of its planes, the weight that it is in ``model``.
        readings: of weights that are read by grade, by their identity in ``model``.
    """

    def __init__(self, model: nn.Module, compiled: nn.Module) -> None:
        named = dense(compiled).named_parameters(remove_duplicate=False)
        weights = {name: p for name, p in named if isinstance(p, QuantizedTensor)}
        # What is not quantised is shared, so that it keeps its identity.
        shared = {id(parameter): parameter for parameter in model.parameters()}
        self.model = copy.deepcopy(model, shared) if weights else model
        self.plain: dict[int, nn.Parameter] = {}
        self.readings: dict[Hashable, Readings] = {}
        self._identities: dict[int, int] = {}
        for name, weight in weights.items():
            at = weight.packed.data_ptr()
            if at not in self.plain:  # a weight may be tied to another
                self.plain[at] = nn.Parameter(weight.dequantize(), requires_grad=False)
                number = identity(self.plain[at])
                self._identities[identity(weight.packed)] = number
                if weight.stored.row_dim == 1:
                    self.readings[number,] = Readings.of(weight)
            owner, _, last = name.rpartition(".")
            setattr(self.model.get_submodule(owner), last, self.plain[at])

    def traced(self, found: Plan, plan: Plan) -> Plan:
        """``found``, of :attr:`model`, with inputs of experts as ``plan`` has them.

        They are not found where weights are plain, but the linears are.
        """
        linears = {linear.weight: linear for owner in found.inputs for linear in owner.linears}
        for region in found.regions:
            producers = (producer.linear for producer in region.producers)
            linears |= {linear.weight: linear for linear in (*producers, *region.consumers)}
        known = {group.key for group in found.inputs}
        added = []
        for group in plan.inputs:
            key: Any = self._key(group.key)
            if key not in known:
                own = tuple(linears[weight] for weight in key[0])
                added.append(replace(group, key=key, linears=own))
        return replace(found, inputs=[*found.inputs, *added])

    def plan(self, plan: Plan, traced: Plan) -> Plan:
        """``plan``, of the compiled model, for :attr:`model`, of which ``traced`` is."""
        if not self.plain:
            return plan
        known: dict[Hashable, RegionRecord | InputRecord] = {r.key: r for r in traced.regions}
        known |= {group.key: group for group in traced.inputs}
        regions = []
        for region in plan.regions:
            own: Any = known[self._key(region.key)]
            regions.append(replace(region, key=own.key, consumers=own.consumers))
        inputs: list[Any] = [known[self._key(group.key)] for group in plan.inputs]
        return Plan(regions, inputs=inputs)

    def by_key(self, values: Mapping[Any, V]) -> dict[Hashable, V]:
        """``values`` by keys of the compiled model's plan, by those of this one's."""
        return {self._key(key): value for key, value in values.items()}

    def read_by_grade(self, group: InputRecord) -> Sequence[Readings]:
        """Of each linear of a group; nothing if they are not all read so."""
        found = [self.readings.get(weight) for weight in group.key[0]]
        return [one for one in found if one is not None] if all(found) else []

    def _key(self, key: Any) -> Hashable:
        weights, *rest = key
        return (tuple(map(self._weight, weights)), *rest)

    def _weight(self, weight: Any) -> Hashable:
        parameter, *steps = weight
        if parameter not in self._identities:
            return weight
        return (self._identities[parameter], *steps[1:])  # the first one dequantises


def squared_errors(readings: Sequence[Readings], norm: Tensor) -> tuple[Tensor, float]:
    """κ² of the channels that linears share, float64 ``[K]``, and what part high planes are.

    Args:
        norm: ``‖W[:, c]‖`` over all of them, float64 ``[K]``; of experts all are ``[E, K]``.
    """
    error = torch.stack([one.coarse.double().square().sum(-2) for one in readings]).sum(0)
    low, both = sum(one.low_bytes for one in readings), sum(one.bytes for one in readings)
    return torch.where(norm > 0, error / norm.square(), 0.0), 1 - low / both

"""Regions and input groups of a compiled graph, for the parameters that a call brings.

Dynamo runs one graph for several layers where they differ in their parameters alone, so what
belongs to a parameter is looked up by each call's own inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from popc.analysis.capture import Captured, identity
from popc.analysis.findings import Region
from popc.analysis.input_groups import InputGroup
from popc.analysis.linears import Linear
from popc.analysis.plan import InputRecord, RegionRecord, with_parameters
from popc.passes.stored_weights import StoredWeight, high_plane, squared_norms
from popc.policies import Counts, InputPolicy, UnitPolicy
from popc.policies.allocation import GroupSpec
from popc.sessions.inputs import InputGroupState
from popc.sessions.units import RegionState


@dataclass(frozen=True, eq=False)
class RegionBinding:
    """A region, and at which inputs of the graph the weights are that contract it."""

    region: Region
    weights: tuple[int, ...]

    @classmethod
    def of(cls, region: Region, captured: Captured) -> RegionBinding:
        """``region`` of the graph ``captured``."""
        return cls(region, input_positions(region.consumers, captured))

    def named(self, args: Sequence[Any]) -> RegionRecord:
        """The region as it is for the parameters among ``args``."""
        return with_parameters(self.region.record, [identity(args[i]) for i in self.weights])

    def state(self, args: Sequence[Any], counts: Counts, policy: UnitPolicy) -> RegionState:
        """What sessions must know of it, norms of the weights among ``args`` included."""
        region = self.region
        columns = torch.from_numpy(region.columns)
        squares = []
        for linear, weight in weights_of(region.consumers, self.weights, args):
            norm = norm_of(linear, weight)
            squares.append(norm.square()[..., columns.to(norm.device)].sum(-1))
        return RegionState(
            key=self.named(args).key,
            columns=columns,
            width=region.width,
            experts=region.experts,
            counts=counts,
            norm=torch.stack(squares).sum(0).sqrt().float(),
            cached=region.cached,
            one_pass=region.one_pass,
            policy=policy,
        )


@dataclass(frozen=True, eq=False)
class InputGroupBinding:
    """Linears that share an input, and at which inputs of the graph their weights are.

    ``stored``: how those are that are read by grade; nothing where they aren't.
    """

    group: InputGroup
    weights: tuple[int, ...]
    stored: tuple[StoredWeight, ...] = ()

    @classmethod
    def of(cls, group: InputGroup, captured: Captured) -> InputGroupBinding:
        """``group`` of the graph ``captured``."""
        by_grade = group.linears if group.is_quantized else ()
        positions = _positions(captured)
        stored = tuple(StoredWeight.of(linear, positions) for linear in by_grade)
        return cls(group, input_positions(group.linears, captured), stored)

    def named(self, args: Sequence[Any]) -> InputRecord:
        """The group as it is for the parameters among ``args``."""
        return with_parameters(self.group.record, [identity(args[i]) for i in self.weights])

    def state(self, args: Sequence[Any], policy: InputPolicy) -> InputGroupState:
        """What sessions must know of it."""
        group, high = self.group, None
        if self.stored:
            high = high_plane(self.stored, args, *squared_norms(self.stored, args))
        sizes = group.width, group.record.weight_bytes
        spec = GroupSpec(*sizes, group.alike, high, has_centers=not group.experts)
        return InputGroupState(self.named(args).key, spec, policy)

    def scales(self, args: Sequence[Any], policy: InputPolicy) -> tuple[torch.Tensor, torch.Tensor]:
        """What scores are scaled with, of high planes and of low ones, float32 ``[K]`` each.

        Of experts they are ``[E · K]``, expert by expert.

        Where weights are not read by grade, the first is the scale, and the second means nothing.
        """
        if self.stored:
            norm, error = squared_norms(self.stored, args)
            high = high_plane(self.stored, args, norm, error)
            if high is not None:
                relative = torch.where(norm > 0, error / norm, 0.0)
                return policy.scales(norm.sqrt(), relative, high.share)
        else:
            pairs = weights_of(self.group.linears, self.weights, args)
            squares = [norm_of(linear, weight).square() for linear, weight in pairs]
            norm = torch.stack(squares).sum(0)
        scale = policy.scale(norm.sqrt().float())
        return scale, scale


def input_positions(linears: Sequence[Linear], captured: Captured) -> tuple[int, ...]:
    """At which of the graph's inputs the weights of ``linears`` are."""
    position = _positions(captured)
    return tuple(position[linear.weight.parameter] for linear in linears)


def _positions(captured: Captured) -> dict[fx.Node, int]:
    placeholders = captured.gm.graph.find_nodes(op="placeholder")
    return {node: i for i, node in enumerate(placeholders)}


def weights_of(
    linears: Sequence[Linear], positions: Sequence[int], args: Sequence[Any]
) -> Iterator[tuple[Linear, torch.Tensor]]:
    """Each linear with its weight, a part of the parameter at its position among ``args``."""
    for linear, i in zip(linears, positions, strict=True):
        yield linear, linear.weight.replayed(args[i])


def norm_of(linear: Linear, weight: torch.Tensor) -> torch.Tensor:
    """``‖W[:, c]‖``, at least in float32."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dim=linear.weight.out_dim, dtype=wide)

"""Regions and inputs of a compiled graph, apart from whose parameters it runs with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from popc.analysis.capture import Captured, identity
from popc.analysis.findings import Region
from popc.analysis.input_groups import InputGroup
from popc.analysis.linears import Linear
from popc.analysis.plan import InputRecord, RegionRecord, with_parameters
from popc.config import Config
from popc.policies import Counts, InputPolicy, UnitPolicy
from popc.policies.allocation import GroupSpec
from popc.runtime.partition import InputGroupState, RegionState


@dataclass(frozen=True, eq=False)
class RegionBinding:
    """A region of a compiled graph, and at which inputs the weights are that contract it.

    Dynamo runs one graph for several layers where they differ in their parameters alone, so what
    belongs to a parameter is looked up by each call's own inputs.
    """

    region: Region
    weights: tuple[int, ...]

    @classmethod
    def of(cls, region: Region, captured: Captured) -> RegionBinding:
        return cls(region, places_of(region.consumers, captured))

    def named(self, args: Sequence[Any]) -> RegionRecord:
        """The region as it is for the parameters among ``args``."""
        return with_parameters(self.region.record, [identity(args[at]) for at in self.weights])

    def state(self, args: Sequence[Any], counts: Counts, policy: UnitPolicy) -> RegionState:
        region = self.region
        columns = torch.from_numpy(region.columns)
        squares = []
        for linear, real in held(region.consumers, self.weights, args):
            norm = norm_of(linear, real)
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
    """Linears of a compiled graph that share an input, and at which inputs their weights are."""

    group: InputGroup
    weights: tuple[int, ...]
    policy: InputPolicy | None

    @classmethod
    def of(
        cls, group: InputGroup, captured: Captured, config: Config | None = None
    ) -> InputGroupBinding:
        """``config``: whose policy prunes the group; None, if nothing does."""
        policy = None if config is None else config.input_policy(group.kind)
        return cls(group, places_of(group.linears, captured), policy)

    def named(self, args: Sequence[Any]) -> InputRecord:
        """The group as it is for the parameters among ``args``."""
        return with_parameters(self.group.record, [identity(args[at]) for at in self.weights])

    def state(self, args: Sequence[Any]) -> InputGroupState:
        group = self.group
        demand = GroupSpec(group.width, group.weight_bytes, group.alike)
        assert self.policy is not None
        return InputGroupState(self.named(args).key, demand, self.policy)

    def scale(self, args: Sequence[Any]) -> torch.Tensor:
        """What scores are scaled with, float32 ``[K]``: of ``‖W[:, c]‖`` over all the linears."""
        found = held(self.group.linears, self.weights, args)
        squares = [norm_of(linear, real).square() for linear, real in found]
        assert self.policy is not None
        return self.policy.scale(torch.stack(squares).sum(0).sqrt().float())


def places_of(linears: Sequence[Linear], captured: Captured) -> tuple[int, ...]:
    """At which of the graph's inputs the weights of ``linears`` are."""
    placeholders = [n for n in captured.gm.graph.nodes if n.op == "placeholder"]
    place = {node: i for i, node in enumerate(placeholders)}
    return tuple(place[linear.weight.parameter] for linear in linears)


def held(
    linears: Sequence[Linear], places: Sequence[int], args: Sequence[Any]
) -> Iterator[tuple[Linear, torch.Tensor]]:
    """Each linear with its weight, of the parameter at its place among ``args``."""
    for linear, at in zip(linears, places, strict=True):
        yield linear, linear.weight.replayed(args[at].detach())


def norm_of(linear: Linear, real: torch.Tensor) -> torch.Tensor:
    """``‖W[:, c]‖``, at least in float32."""
    wide = torch.promote_types(real.dtype, torch.float32)
    return torch.linalg.vector_norm(real, dim=linear.weight.out_dim, dtype=wide)

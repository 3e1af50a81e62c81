"""What passes are to do in one graph: what to measure and what to prune."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from popc.analysis.capture import Captured
from popc.analysis.findings import Findings, Region
from popc.analysis.input_groups import InputGroup, find_input_groups
from popc.analysis.linears import all_linears
from popc.analysis.plan import Skipped
from popc.analysis.regions import find_regions
from popc.analysis.tokens import is_one_token
from popc.config import Config
from popc.log import logger
from popc.planning.budget_solver import resolve
from popc.planning.choose import choose, prunable, refuse_where, with_known_units
from popc.planning.packing import Slot, slot_of
from popc.stages import run_stage

Owner = Region | InputGroup
_VMAP = "the graph holds values that only its trace had, of a vmap or a loop"


@dataclass
class RewritePlan:
    """What passes are to do in one graph.

    Attributes:
        config: with a sparsity for this graph.
        findings: what the analysis found and ``config`` prunes; passes add refusals to it.
        owners: regions and input groups that are pruned in this graph or in others.
        measured: regions of which a prompt's statistics are taken here.
        pruned: regions whose units are pruned here.
        measured_inputs, pruned_inputs: likewise of input groups.
        decodes: whether the graph is one of decode steps alone, which go by what a prompt's saw.
    """

    config: Config = field(default_factory=Config)
    findings: Findings = field(default_factory=Findings)
    owners: list[Owner] = field(default_factory=list)
    measured: list[Region] = field(default_factory=list)
    pruned: list[Slot] = field(default_factory=list)
    measured_inputs: list[InputGroup] = field(default_factory=list)
    pruned_inputs: list[InputGroup] = field(default_factory=list)
    decodes: bool = False

    @property
    def measures(self) -> bool:
        """Whether statistics are taken here."""
        return bool(self.measured or self.measured_inputs)

    @property
    def prunes(self) -> bool:
        """Whether something is left out here."""
        return bool(self.pruned or self.pruned_inputs)

    @property
    def device(self) -> torch.device | None:
        """Where it is done; None if there is nothing to do."""
        if not self.owners:
            return None
        owner = self.owners[0]
        value = owner.x if isinstance(owner, InputGroup) else owner.hidden
        return value.meta["val"].device

    def refuse(self, owner: Owner, reason: str, kind: str) -> None:
        """Leave ``owner`` dense: it goes from what is to be done and from the plan."""
        self.findings.skipped.append(Skipped(owner.name, reason, "", owner.source, kind))
        self.pruned = [slot for slot in self.pruned if slot.region is not owner]
        lists: list[list[Any]] = [self.owners, self.measured, self.measured_inputs]
        lists += [self.pruned_inputs, self.findings.regions, self.findings.inputs]
        for owners in lists:
            owners[:] = [other for other in owners if other is not owner]


def plan_rewrite(
    captured: Captured,
    findings: Findings,
    config: Config,
    *,
    measure_only: bool = False,
    only: Collection[Hashable] | None = None,
) -> RewritePlan:
    """Find what a graph has, choose what ``config`` prunes of it, and say how.

    Args:
        findings: gains each result as soon as it is there.
        measure_only, only: see :func:`popc.backend.popc_backend`.
    """
    detected = run_stage("find regions", find_regions, captured)
    findings.regions = [with_known_units(region, captured) for region in detected.regions]
    findings.skipped = detected.skipped
    if not captured.runnable:
        refuse_where(findings, lambda _: _VMAP, "vmap")
    else:
        findings.inputs = run_stage("find inputs", find_input_groups, captured, findings.regions)
    sizes = {id(tensor): tensor.numel() for tensor in captured.parameters.values()}
    # Of the graph as it is now: passes change its nodes.
    plan = run_stage("describe regions", findings.plan)
    config = run_stage("resolve budget", resolve, config, sum(sizes.values()), plan)
    run_stage("choose regions", choose, findings, config, only)
    work = run_stage("choose work", _split, captured, findings, config, measure_only)
    logger.info(
        "%d regions and %d inputs of linears: %d pruned here, %d measured; %d refusals",
        len(findings.regions),
        len(findings.inputs),
        len(work.pruned) + len(work.pruned_inputs),
        len(work.measured) + len(work.measured_inputs),
        len(findings.skipped),
    )
    return work


def _split(
    captured: Captured, findings: Findings, config: Config, measure_only: bool
) -> RewritePlan:
    """What to measure in a graph, and what to prune."""
    regions = [region for region in findings.regions if prunable(region, config)]
    inputs = list(findings.inputs)
    prunes = _runs_on_one_token(captured, regions, inputs)
    slots = [r for r in regions if r.one_pass or (prunes[r] and not measure_only)]
    pruned_inputs = [group for group in inputs if prunes[group] and not measure_only]
    work = RewritePlan(
        config,
        findings,
        owners=[*regions, *inputs],
        measured=[region for region in regions if region not in slots],
        pruned=[slot_of(region, config) for region in slots],
        # What runs on many tokens in a decode step, as on a whole cache, reads all its channels.
        measured_inputs=[] if pruned_inputs else inputs,
        pruned_inputs=pruned_inputs,
    )
    begins = work.measures or any(region.one_pass for region in slots)
    work.decodes = work.prunes and not begins
    return work


def _runs_on_one_token(
    captured: Captured, regions: Sequence[Region], inputs: Sequence[InputGroup]
) -> dict[Owner, bool]:
    """Whether each is run on one token of each sequence.

    Where rows can't be told apart, they are of the tokens that the others are of; where none of
    these can, as with stacked experts alone, of those of the graph's other linears.
    """
    single: dict[Owner, bool | None] = {r: is_one_token(r.hidden) for r in regions}
    single |= {group: is_one_token(group.x) for group in inputs}
    all_answers: Collection[bool | None] = single.values()
    if all(one is None for one in all_answers):
        all_answers = [is_one_token(linear.x) for linear in all_linears(captured)]
    default = any(all_answers)
    return {owner: default if one is None else one for owner, one in single.items()}

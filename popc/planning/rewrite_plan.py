"""What passes are to do in one graph: what to measure and what to prune."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from popc.analysis.capture import Captured
from popc.analysis.findings import Findings, Region
from popc.analysis.input_groups import InputGroup, find_input_groups
from popc.analysis.linears import all_linears
from popc.analysis.regions import find_regions
from popc.analysis.tokens import is_one_token
from popc.config import Config
from popc.planning.budget_solver import Budgets
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
        budgets: what decode steps may read, by the Config and by calls.
        findings: what the analysis found and ``config`` prunes; passes add refusals to it.
        owners: regions and input groups that are pruned in this graph or in others. The rest
            follows from them, by :meth:`assign`.
        measured: regions of which a prompt's statistics are taken here.
        pruned: regions whose units are pruned here.
        measured_inputs, pruned_inputs: likewise of input groups.
        decodes: whether the graph is one of decode steps alone, which go by what a prompt's saw.
        measure_only: whether nothing is pruned but what runs in one pass.
    """

    config: Config = field(default_factory=Config)
    budgets: Budgets = field(default_factory=Budgets)
    findings: Findings = field(default_factory=Findings)
    owners: list[Owner] = field(default_factory=list)
    measured: list[Region] = field(default_factory=list)
    pruned: list[Slot] = field(default_factory=list)
    measured_inputs: list[InputGroup] = field(default_factory=list)
    pruned_inputs: list[InputGroup] = field(default_factory=list)
    decodes: bool = False
    measure_only: bool = False

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
        return _value_of(self.owners[0]).meta["val"].device if self.owners else None

    def assign(self, captured: Captured) -> None:
        """Say of each owner whether it is measured or pruned in the graph."""
        prunes = set() if self.measure_only else _on_one_token(captured, self.owners)
        regions = [owner for owner in self.owners if isinstance(owner, Region)]
        inputs = [owner for owner in self.owners if isinstance(owner, InputGroup)]
        pruned = [region for region in regions if region.one_pass or region in prunes]
        self.pruned = [slot_of(region, self.config) for region in pruned]
        self.measured = [region for region in regions if region not in pruned]
        self.pruned_inputs = [group for group in inputs if group in prunes]
        # What runs on many tokens in a decode step, as on a whole cache, reads all its channels.
        self.measured_inputs = [] if self.pruned_inputs else inputs
        begins = self.measures or any(region.one_pass for region in pruned)
        self.decodes = self.prunes and not begins

    def refuse(self, reasons: Mapping[Owner, str], kind: str) -> None:
        """Leave owners dense: they go from the plan, and :meth:`assign` is to be asked again."""
        self.findings.refuse(reasons, kind)
        self.owners = [owner for owner in self.owners if owner not in reasons]


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
    budgets = Budgets(config, sum(sizes.values()), plan)
    config = run_stage("resolve budget", lambda: budgets.config)
    run_stage("choose regions", choose, findings, config, only)
    owners = _owners(findings, config)
    work = RewritePlan(config, budgets, findings, owners, measure_only=measure_only)
    run_stage("choose work", work.assign, captured)
    return work


def _owners(findings: Findings, config: Config) -> list[Owner]:
    return [*(r for r in findings.regions if prunable(r, config)), *findings.inputs]


def _on_one_token(captured: Captured, owners: Sequence[Owner]) -> set[Owner]:
    """Those that are run on one token of each sequence.

    Where rows can't be told apart, they are of the tokens that the others are of; where none of
    these can, as with stacked experts alone, of those of the graph's other linears.
    """
    single = {owner: is_one_token(_value_of(owner)) for owner in owners}
    answers: Collection[bool | None] = single.values()
    if all(one is None for one in answers):
        answers = [is_one_token(linear.x) for linear in all_linears(captured)]
    default = any(answers)
    return {owner for owner, one in single.items() if (default if one is None else one)}


def _value_of(owner: Owner) -> fx.Node:
    """What its linears read."""
    return owner.x if isinstance(owner, InputGroup) else owner.hidden

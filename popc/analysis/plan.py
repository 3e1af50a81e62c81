"""What the analysis found: regions to prune, and why everything else was left alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table
from torch import fx

from popc.analysis.gates import Gate, find_gate
from popc.analysis.linears import Linear
from popc.config import Config

if TYPE_CHECKING:
    from popc.analysis.input_groups import InputGroup
    from popc.planning.cost import PlanCost


@dataclass(frozen=True, eq=False)
class Producer:
    """A linear that writes channels of a region.

    ``rows`` int64 ``[U, m]``: its output channels that belong to each unit.
    """

    linear: Linear
    rows: np.ndarray


@dataclass(frozen=True, eq=False)
class Region:
    """Units that live and die together in one place of a model, from birth to contraction.

    A *unit* is the least that can be pruned: one channel of an MLP or of each expert, or one KV
    group with all its query heads. Units are numbered by the columns that contract them.

    Attributes:
        kind: ``"mlp"``, ``"attention"`` or ``"experts"``.
        name: where in the model, for people; no rule reads it.
        units: U, how many there are.
        producers: linears that write the units' channels.
        body: the ops between producers and consumers, in graph order.
        hidden: h, what the consumers read.
        columns: int64 ``[U, m]``, the positions of each unit along h's contracted dim.
        consumers: linears that contract h.
        cached: whether the units' keys or values are kept in a cache.
        key: the same in every graph that this region is part of: the identities of the weights
            that contract it, which use of them in the graph it is, and its first column.
        source: file and line in the model's code.
        one_pass: whether it surely runs in one forward pass, as in encoders.
    """

    kind: str
    name: str
    units: int
    producers: tuple[Producer, ...]
    body: tuple[fx.Node, ...]
    hidden: fx.Node
    columns: np.ndarray
    consumers: tuple[Linear, ...]
    cached: bool
    key: tuple[Any, ...]
    source: str = ""
    one_pass: bool = False

    @property
    def experts(self) -> int:
        """E, the number of experts whose weights are stacked; 0 in other regions."""
        held = self.consumers[0].experts
        return held.count if held is not None else 0

    @property
    def linears(self) -> list[Linear]:
        """Those that write its channels, then those that contract them."""
        return [*(producer.linear for producer in self.producers), *self.consumers]

    def by_units(self, config: Config) -> bool:
        """Whether ``config`` prunes its units, not its linears' inputs: see :mod:`popc.policies`.

        Inputs can be left out where all tokens meet one weight, and in a decode phase.
        """
        return config.policy_for(self.kind).prunes_units(self)

    @property
    def width(self) -> int:
        """K, the size of h along the contracted dim."""
        return self.consumers[0].inputs

    @property
    def weight_bytes(self) -> int:
        """Bytes of the region's weights, dense: the rows and columns of its units."""
        return self.producer_bytes + self.consumer_bytes

    @property
    def producer_bytes(self) -> int:
        """Bytes of the weights that compute the region's channels."""
        total = 0
        for producer in self.producers:
            weight = producer.linear.weight
            total += weight.bytes * producer.rows.size // producer.linear.outputs
        return total

    @property
    def consumer_bytes(self) -> int:
        """Bytes of the weights that read the region's channels."""
        return sum(c.weight.bytes * self.columns.size // c.inputs for c in self.consumers)

    @property
    def parameters(self) -> int:
        """How many weights the region has: the rows and columns of its units."""
        return self.weight_bytes // self.consumers[0].weight.element_bytes

    @cached_property
    def gate(self) -> Gate | None:
        """Where its channels are a product of which one factor can be computed first."""
        return find_gate(self)

    def staged(self, config: Config) -> Gate | None:
        """The gate, if ``config`` has a decode step choose channels by it."""
        return None if self.one_pass or not config.unit_policy(self.kind).staged else self.gate

    def coarsened(self, columns: np.ndarray) -> Region:
        """With units that are unions of its own: those of ``columns [U', m']``."""
        coarse = np.full(self.width, -1)
        coarse[columns] = np.arange(len(columns))[:, None]
        order = np.argsort(coarse[self.columns[:, 0]], kind="stable")
        producers = tuple(
            Producer(p.linear, p.rows[order].reshape(len(columns), -1)) for p in self.producers
        )
        return replace(self, units=len(columns), columns=columns, producers=producers)

    def decode_bytes(self, config: Config) -> float:
        """Weight bytes that one decode step reads: live units' rows, active units' columns, and
        of what comes after a gate the rows of active units alone."""
        counts = config.counts(self.units, self.kind)
        live, active = counts.live / self.units, counts.active / self.units
        gate = self.staged(config)
        late = 0 if gate is None else gate.late.weight.bytes
        return (self.producer_bytes - late) * live + (self.consumer_bytes + late) * active


@dataclass(frozen=True)
class Skipped:
    """A linear whose output channels are not pruned, and why.

    Attributes:
        op: what caused it; ``source`` is its file and line in the model's code.
        kind: the class of the reason; what helps against each: :func:`popc.report.explain.remedy`.
        linear: None where no linear is meant.
        key: of what would have been a region, or inputs, had no pass failed.
    """

    name: str
    reason: str
    op: str = ""
    source: str = ""
    kind: str = ""
    linear: Linear | None = field(default=None, compare=False, repr=False)
    key: Any = field(default=None, repr=False)


@dataclass
class Plan:
    """Regions and refusals of one graph, or of all pieces of a model.

    Attributes:
        regions: what can be pruned, in graph order.
        skipped: linears left dense, each with its reason.
        inputs: linears of which a decode step leaves input channels out, by what they read.
        breaks: reasons for which the model was traced in more than one piece.
    """

    regions: list[Region] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    inputs: list[InputGroup] = field(default_factory=list)
    breaks: list[str] = field(default_factory=list)

    def extend(self, other: Plan) -> None:
        """Add another graph's plan; what both hold is listed once.

        What a graph had to leave, since a pass failed, is not listed as pruned for another's sake:
        a prompt's graph only measures what a decode step's is to prune.
        """
        known = {region.key for region in self.regions}
        self.regions += [region for region in other.regions if region.key not in known]
        read = {group.key for group in self.inputs}
        self.inputs += [group for group in other.inputs if group.key not in read]
        self.skipped += [skip for skip in other.skipped if skip not in self.skipped]
        self.breaks += [reason for reason in other.breaks if reason not in self.breaks]
        left = {skip.key for skip in self.skipped if skip.key is not None}
        if left:
            self.regions = [region for region in self.regions if region.key not in left]
            self.inputs = [group for group in self.inputs if group.key not in left]

    def leave(self, reason: str, kind: str) -> None:
        """Make refusals of all that it lists as pruned; where that is nothing yet, of the graph."""
        owners: list[Region | InputGroup] = [*self.regions, *self.inputs]
        left = [Skipped(o.name, reason, "", o.source, kind, key=o.key) for o in owners]
        self.skipped += left or [Skipped("the graph", reason, kind=kind)]
        self.regions, self.inputs = [], []

    def count(self, kind: str) -> int:
        """How many regions there are of a kind."""
        return sum(region.kind == kind for region in self.regions)

    def decode_share(self, config: Config) -> float:
        """The share of the pruned linears' weight bytes that a decode step reads.

        Of pruned inputs it is what thresholds are set for; tokens read more and less than that.
        """
        regions = [region for region in self.regions if region.by_units(config)]
        dense = sum(region.weight_bytes for region in regions)
        read = sum(r.decode_bytes(config) for r in regions)
        for group in self.inputs:
            if config.prunes_inputs(group.kind):
                dense += group.weight_bytes
                read += (1 - config.sparsity) * group.weight_bytes
        return read / dense if dense else 1.0

    def read_share(
        self,
        config: Config,
        reads: Mapping[Any, Sequence[int]] | None = None,
        pruned: Plan | None = None,
    ) -> float:
        """The share of the weight bytes of all linears but the last that a decode step reads.

        For plans of :func:`popc.analyze`, which hold all linears.

        Args:
            reads: what was counted, as sessions hold it under ``Config(count=True)``: the channels
                that groups of ``inputs`` read, step by step. Without it, what thresholds are for.
            pruned: the plan of a twin that has run, without what it found it must leave dense.
        """
        within = pruned or self
        regions = {region.key for region in within.regions if region.by_units(config)}
        contracted = {group.key for group in within.inputs if config.prunes_inputs(group.kind)}
        dense = read = 0.0
        for region in self.regions:
            if region.experts or region.one_pass:  # whose linears are in none of the inputs
                dense += region.weight_bytes
                read += region.weight_bytes
            if region.key in regions:
                read += region.decode_bytes(config) - region.weight_bytes
        for group in self.inputs:
            if group.kind == "head":
                continue
            share = 1.0
            if group.key in contracted:
                share = share_read(group, config, reads)
            dense += group.weight_bytes
            read += share * group.weight_bytes
        return read / dense if dense else 1.0

    def cost(self, B: int = 1, T: int = 1, S: int = 1024, config: Config | None = None) -> PlanCost:
        """FLOPs and bytes read in a call, region by region and in all, dense and pruned.

        Args:
            B: sequences. T: new tokens of each. S: keys that they attend to, their own included.
            config: the default one if not given; a ``model_sparsity`` in it must be resolved.
        """
        from popc.planning.cost import plan_cost  # which imports this module

        return plan_cost(self, B, T, S, config or Config())

    def table(self) -> Table:
        """A rich table: one row for each region, then one for each distinct refusal."""
        table = Table(title=f"popc: {len(self.regions)} regions, {len(self.skipped)} refusals")
        for heading in ("kind", "name", "units", "MB", "linears"):
            table.add_column(heading, justify="right" if heading in ("units", "MB") else "left")
        for region in self.regions:
            linears = f"{len(region.producers)} → {len(region.consumers)}"
            size = f"{region.weight_bytes / 1e6:.1f}"
            table.add_row(region.kind, region.name, str(region.units), size, linears)
        seen = Counter((generic(skip.name), skip.reason) for skip in self.skipped)
        for (name, reason), times in seen.items():
            table.add_row("skipped", f"{name} (×{times})" if times > 1 else name, "", "", reason)
        for reason in self.breaks:
            table.add_row("break", "traced in pieces", "", "", reason)
        return table

    def __str__(self) -> str:
        console = Console(width=140, no_color=True)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


def share_read(
    group: InputGroup, config: Config, reads: Mapping[Any, Sequence[int]] | None = None
) -> float:
    """The share of a contracted group's channels that a step reads: see `Plan.read_share`."""
    steps = (reads or {}).get(group.key)
    return sum(steps) / len(steps) / group.width if steps else 1 - config.sparsity


def generic(name: str) -> str:
    """``layers.3.mlp`` and ``layers.4.mlp`` alike, so that a table shows a repeated row once."""
    return re.sub(r"\b\d+\b", "*", name)

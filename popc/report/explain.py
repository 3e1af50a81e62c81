"""``explain``: what popc does with a model, and what to change where it does nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from html import escape
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.text import Text

from popc.analysis.plan import LinearRecord, Plan, RegionRecord, Skipped
from popc.api import analyze, compile
from popc.config import Config
from popc.planning.budget_solver import resolve
from popc.planning.cost import region_cost, saves
from popc.report.html import CSS, Sheet, page
from popc.report.plan_table import generic
from popc.report.svg import Box, layers, legend, picture

# What helps against each kind of refusal; {op} is the op that caused it.
_REMEDIES = {
    "mixes": "keep {op} out of the way between the two linears, or let it run over groups of "
    "channels; a value that all layers read, as a residual stream, stays whole",
    "attention": "more heads of keys and values: all that attend with one of them are one unit",
    "heads": "mix heads once their values are read, not before",
    "unknown op": "popc.register_rule({op}, ...), if it acts on each channel alone; "
    "or write it with ops that have a rule",
    "not followed": "write {op} so that each channel stays at a place known when it is traced",
    "training": "call model.eval() first",
    "shared": "give each unit channels of its own: those that all units read are always computed",
    "leaves the graph": "keep the channels inside: neither return them nor break the graph there; "
    "the model's own answer stays whole",
    "single unit": "more than one channel, or more than one head of keys and values",
    "no consumer": "a linear that reads the channels, in the same graph",
    "different values": "let every linear read the same value of the channels",
    "uneven units": "give all heads, or groups of channels, the same size",
    "costs more": "wider layers: a list costs the same for a long row as for a short one",
    "policy": "another policy for its kind, as in policy=dict(mlp=..., experts=...)",
    "layout": "give the linear a weight of its own, loaded where it runs",
    "subclass": "plain weights, as before they were quantised or spread over devices",
    "failed": "nothing in the model: it is a fault of popc's. Please report it",
    "vmap": "make masks outside of the model, and hand them to it",
    "traced in pieces": "take the graph break out of the model: TORCH_LOGS=graph_breaks shows it",
}


def remedy(skipped: Skipped) -> str:
    """What would make a refused linear prunable; empty where nothing is known to."""
    return _REMEDIES.get(skipped.kind, "").format(op=_short(skipped.op) or "the op")


def explain(
    model: torch.nn.Module | torch.export.ExportedProgram,
    *args: Any,
    config: Config | None = None,
    **inputs: Any,
) -> Explanation:
    """What popc would prune in ``model`` under ``config``, what a decode step then reads, and what
    would make the rest prunable.

    Args:
        model: whatever :func:`popc.analyze` takes.
        args, inputs: one call's inputs.
        config: the default one if not given.

    Raises:
        ConfigError, ModelError, GraphError: as :func:`popc.analyze` and ``Config.resolved`` do.
    """
    config = config or Config()
    name = type(model).__name__
    if config.weights is not None and isinstance(model, torch.nn.Module):
        model, inputs = _quantized(model, config, args, inputs)
    plan = analyze(model, args, inputs)
    asked = (config.model_sparsity, config.bytes, config.bits)
    if any(budget is not None for budget in asked):
        config = resolve(config, sum(p.numel() for p in model.parameters()), plan)
    return Explanation(plan, config, name)


def _quantized(
    model: torch.nn.Module, config: Config, args: Sequence[Any], inputs: dict[str, Any]
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The model with weights that a first call quantised, and the inputs of that call."""
    if not args and not inputs:
        inputs = dict(getattr(model, "dummy_inputs", {}))
    compiled = compile(model, replace(config, codegen="eager"))
    compiled(*args, **inputs)
    return compiled, inputs


@dataclass(frozen=True)
class Read:
    """Bytes that a decode step of one sequence reads in a region: weights, and lists if pruned.

    Keys and values are read either way, and not counted. ``note`` says why it is left dense.
    """

    region: RegionRecord
    dense: int
    pruned: int
    note: str = ""

    @classmethod
    def of(cls, region: RegionRecord, config: Config) -> Read:
        """What one token of batch 1 reads of ``region`` under ``config``."""
        targeted = config.prunes(region.kind)
        note = (saves(region, config) or "") if targeted else "not a target"
        dense, pruned = (cost.at(B=1, T=1, S=0).bytes for cost in region_cost(region, config))
        return cls(region, dense, dense if note else pruned, note)

    @property
    def share(self) -> float:
        """The part of the dense bytes that is read."""
        return self.pruned / self.dense


@dataclass
class Explanation:
    """A plan and a config, made readable: ``print`` it, or write :meth:`html` to a file."""

    plan: Plan
    config: Config = field(default_factory=Config)
    title: str = "model"

    @cached_property
    def reads(self) -> list[Read]:
        """What a decode step reads in each region."""
        return [Read.of(region, self.config) for region in self.plan.regions]

    def table(self) -> RenderableType:
        """Rich tables: one row for each region, then one for each distinct refusal."""
        lines = f"popc: {self.title}: {self._found()}", self._summary(), ""
        return Group(*map(Text, lines), *(sheet.rich() for sheet in self._sheets()))

    def __str__(self) -> str:
        console = Console(width=160, no_color=True)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()

    def html(self) -> str:
        """A page of its own, with a picture of the layers and the tables."""
        return page(f"popc: {self.title}", self._repr_html_())

    def _repr_html_(self) -> str:
        sheets = "".join(sheet.html() for sheet in self._sheets())
        return (
            f'<style>{CSS}</style>\n<div class="popc"><h1>popc: {escape(self.title)}</h1>\n'
            f"<p>{escape(f'{self._found()}. {self._summary()}')}</p>\n"
            f"{legend()}\n{picture(layers(self._boxes()))}\n"
            f"{sheets}</div>\n"
        )

    def _found(self) -> str:
        return f"{len(self.plan.regions)} regions, {len(self.plan.skipped)} refusals"

    def _summary(self) -> str:
        if not self.plan.regions:
            return "Nothing to prune: it runs dense."
        dense, pruned = (sum(r.dense for r in self.reads), sum(r.pruned for r in self.reads))
        return (
            f"By {self.config.policy_name} at r = {self.config.sparsity:.3g}, a decode step of one "
            f"sequence reads {_size(pruned)} in the regions; dense, {_size(dense)}."
        )

    def _sheets(self) -> list[Sheet]:
        return [sheet for sheet in (self._regions(), self._refusals()) if sheet.rows]

    def _regions(self) -> Sheet:
        place, linears = ("kind", "where", "source", "units"), ("producers", "consumers")
        headings = (*place, *linears, "dense", "pruned", "share", "note")
        rows = []
        for read in self.reads:
            region = read.region
            producers = _ops([producer.linear for producer in region.producers])
            place = (region.kind, region.name, region.source, str(region.units))
            sizes = (_size(read.dense), _size(read.pruned), f"{read.share:.0%}")
            rows.append((*place, producers, _ops(region.consumers), *sizes, read.note))
        return Sheet("regions", headings, rows, (3, 6, 7, 8))

    def _refusals(self) -> Sheet:
        pieces = [Skipped("the model", why, kind="traced in pieces") for why in self.plan.breaks]
        skips = [*self.plan.skipped, *pieces]
        rows = Counter(
            (generic(s.name), s.reason, _short(s.op), s.source, self._advice(s)) for s in skips
        )
        named = [(f"{n} ×{times}" if times > 1 else n, *rest) for (n, *rest), times in rows.items()]
        headings = ("refused", "reason", "op", "source", "what would help")
        return Sheet("refusals", headings, named)

    def _advice(self, skipped: Skipped) -> str:
        region = self._consumed.get(_weight_of(skipped))
        if region is not None:
            return f"none needed: its input channels are those of {generic(region.name)}"
        return remedy(skipped)

    @cached_property
    def _consumed(self) -> dict[Any, RegionRecord]:
        """The region that each weight is a consumer of."""
        return {c.weight: r for r in self.plan.regions for c in r.consumers}

    def _boxes(self) -> list[Box]:
        """Regions and refused linears, in graph order."""
        boxes = []
        order = _Order()
        for read in self.reads:
            region, why = read.region, f"; {read.note}" if read.note else ""
            text = f"{region.kind} {region.name}: {region.units} units, a decode step reads "
            text += f"{_size(read.pruned)}; dense, {_size(read.dense)}{why}"
            place = order.of(region.producers[0].linear)
            boxes.append((place, Box(region.kind, region.name, read.dense, 1 - read.share, text)))
        for skip in self.plan.skipped:
            if skip.linear is None or _weight_of(skip) in self._consumed:
                continue  # part of a region's box
            size = skip.linear.bytes
            text = f"{skip.name}: {_size(size)}, refused: {skip.reason}"
            boxes.append((order.of(skip.linear), Box("refused", skip.name, size, 0.0, text)))
        return [box for _, box in sorted(boxes, key=lambda placed: placed[0])]


class _Order:
    """Where a linear is in the program: which graph, in order of appearance, and where in it."""

    def __init__(self) -> None:
        self.graphs: list[int] = []

    def of(self, linear: LinearRecord) -> tuple[int, int]:
        graph, place, *_ = linear.position
        if graph not in self.graphs:
            self.graphs.append(graph)
        return self.graphs.index(graph), place


def _weight_of(skipped: Skipped) -> Any:
    return skipped.linear.weight if skipped.linear is not None else None


def _ops(linears: Sequence[LinearRecord]) -> str:
    """The ops of linears, as in ``linear ×2``."""
    counts = Counter(_short(linear.op) for linear in linears)
    return ", ".join(f"{op} ×{times}" if times > 1 else op for op, times in counts.items())


def _short(op: str) -> str:
    """``aten.mean.dim`` as ``mean``: overloads are of no interest to people."""
    parts = op.split(".")
    return parts[1] if len(parts) == 3 else op


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"

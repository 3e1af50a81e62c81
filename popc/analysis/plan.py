"""What the analysis found: regions to prune, and why everything else was left alone."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from torch import fx

from popc.config import Config, Counts

Key = tuple[tuple[int, ...], int]


@dataclass(frozen=True)
class Weight:
    """A linear's weight.

    Attributes:
        node: the graph input behind it.
        channel_dim: which of its two dims is the channel's.
        identity: a number that is the same for this parameter in every graph.
    """

    node: fx.Node
    channel_dim: int
    identity: int

    @property
    def bytes(self) -> int:
        value = self.node.meta["val"]
        return value.numel() * value.element_size()


@dataclass(frozen=True)
class Linear:
    """A linear that writes (producer) or contracts (consumer) a channel axis."""

    node: fx.Node
    x: fx.Node
    weight: Weight
    bias: fx.Node | None


@dataclass(frozen=True)
class Region:
    """The whole life of one channel axis: born in ``producers``, contracted by ``consumers``.

    Attributes:
        kind: ``"mlp"``.
        name: where in the model, for people; no rule reads it.
        channels: F, the size of the axis.
        producers: linears with weights of F output channels.
        body: the nodes between, in graph order; each carries the axis.
        axis: for each node of producers and body, the dimension that is the channel.
        hidden: h ``[..., F]``, what the consumers read.
        grid: a node ``[B, T, ...]`` whose tokens are h's, in the same order: ``hidden`` itself, or,
            where that is flattened to ``[B·T, F]``, what it was before, if the graph shows it.
        consumers: linears that contract F.
        key: the same in every graph that this region is part of: the identities of its weights,
            and which use of them it is where weights are shared.
        source: file and line in the model's code.
    """

    kind: str
    name: str
    channels: int
    producers: tuple[Linear, ...]
    body: tuple[fx.Node, ...]
    axis: dict[fx.Node, int]
    hidden: fx.Node
    grid: fx.Node
    consumers: tuple[Linear, ...]
    key: Key
    source: str = ""

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights of the region, dense."""
        return sum(linear.weight.bytes for linear in (*self.producers, *self.consumers))

    def decode_bytes(self, counts: Counts) -> float:
        """Weight bytes that one decode step reads: live rows of producers, active of consumers."""
        produced = sum(linear.weight.bytes for linear in self.producers)
        consumed = sum(linear.weight.bytes for linear in self.consumers)
        return (produced * counts.live + consumed * counts.active) / self.channels


@dataclass(frozen=True)
class Skipped:
    """A linear whose channel axis is not pruned, and why."""

    name: str
    reason: str
    source: str = ""


@dataclass
class Plan:
    """Regions and refusals of one graph, or of all pieces of a model.

    Attributes:
        regions: what will be pruned, in graph order.
        skipped: linears left dense, each with its reason.
        breaks: reasons for which the model was traced in more than one piece.
    """

    regions: list[Region] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    breaks: list[str] = field(default_factory=list)

    def extend(self, other: Plan) -> None:
        """Add another graph's plan; what both hold is listed once."""
        known = {region.key for region in self.regions}
        self.regions += [region for region in other.regions if region.key not in known]
        self.skipped += [skip for skip in other.skipped if skip not in self.skipped]
        self.breaks += [reason for reason in other.breaks if reason not in self.breaks]

    def decode_share(self, config: Config) -> float:
        """The share of the regions' weight bytes that one decode step reads; 1.0 is dense."""
        dense = sum(region.weight_bytes for region in self.regions)
        read = sum(r.decode_bytes(config.counts(r.channels)) for r in self.regions)
        return read / dense if dense else 1.0

    def table(self) -> Table:
        """A rich table: one row for each region, then one for each distinct refusal."""
        table = Table(title=f"popc: {len(self.regions)} regions, {len(self.skipped)} refusals")
        for heading in ("kind", "name", "channels", "MB", "linears"):
            table.add_column(heading, justify="right" if heading in ("channels", "MB") else "left")
        for region in self.regions:
            linears = f"{len(region.producers)} → {len(region.consumers)}"
            size = f"{region.weight_bytes / 1e6:.1f}"
            table.add_row(region.kind, region.name, str(region.channels), size, linears)
        seen = Counter((_generic(skip.name), skip.reason) for skip in self.skipped)
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


def _generic(name: str) -> str:
    """``layers.3.mlp`` and ``layers.4.mlp`` alike, so that a table shows a repeated row once."""
    return re.sub(r"\b\d+\b", "*", name)

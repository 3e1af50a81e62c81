"""What the analysis found: regions to prune, and why everything else was left alone."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from torch import fx


@dataclass(frozen=True)
class Weight:
    """A linear's weight: the graph input behind it, and which of its two dims is the channel's."""

    node: fx.Node
    channel_dim: int

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
        hidden: h ``[..., T, F]``, what the consumers read.
        consumers: linears that contract F.
        source: file and line in the model's code.
    """

    kind: str
    name: str
    channels: int
    producers: tuple[Linear, ...]
    body: tuple[fx.Node, ...]
    axis: dict[fx.Node, int]
    hidden: fx.Node
    consumers: tuple[Linear, ...]
    source: str = ""

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights of the region, dense."""
        return sum(linear.weight.bytes for linear in (*self.producers, *self.consumers))


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
        self.regions += other.regions
        self.skipped += other.skipped

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

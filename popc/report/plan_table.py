"""A plan as a table."""

from __future__ import annotations

import re
from collections import Counter

from rich.console import Console
from rich.table import Table

from popc.analysis.plan import Plan


def plan_table(plan: Plan) -> Table:
    """One row for each region, then one for each distinct refusal."""
    table = Table(title=f"popc: {len(plan.regions)} regions, {len(plan.skipped)} refusals")
    for heading in ("kind", "name", "units", "MB", "linears"):
        table.add_column(heading, justify="right" if heading in ("units", "MB") else "left")
    for region in plan.regions:
        linears = f"{len(region.producers)} → {len(region.consumers)}"
        size = f"{region.weight_bytes / 1e6:.1f}"
        table.add_row(region.kind, region.name, str(region.units), size, linears)
    seen = Counter((generic(skip.name), skip.reason) for skip in plan.skipped)
    for (name, reason), times in seen.items():
        table.add_row("skipped", f"{name} (×{times})" if times > 1 else name, "", "", reason)
    for reason in plan.breaks:
        table.add_row("break", "traced in pieces", "", "", reason)
    return table


def plan_text(plan: Plan) -> str:
    """:func:`plan_table` as plain text, 140 characters wide."""
    console = Console(width=140, no_color=True)
    with console.capture() as capture:
        console.print(plan_table(plan))
    return capture.get()


def generic(name: str) -> str:
    """``layers.3.mlp`` and ``layers.4.mlp`` alike, so that a table shows a repeated row once."""
    return re.sub(r"\b\d+\b", "*", name)

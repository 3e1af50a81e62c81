"""``popc report``: quality and speed against bytes read, and what a prompt's partitions become."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from typing import TYPE_CHECKING

from popc import plots
from popc.report.figures import Figures, Peer, Point, Speed
from popc.report.html import CSS, Sheet, page
from popc.report.stability import Drift, RegionDrift

if TYPE_CHECKING:
    from matplotlib.axes import Axes


UNQUANTISED = 16  # bits of a weight: engines that read so many are in the table, not the picture


def report(figures: Figures, drift: Drift | None, title: str) -> str:
    """A page that needs nothing from outside.

    Raises:
        ModelError: matplotlib is not installed.
    """
    parts = [
        _quality(figures.points),
        _frontier(figures.points, figures.peers),
        _speed(figures.speeds),
    ]
    if drift is not None:
        parts += [_partitions(drift), _drift(drift), _reads(drift)]
    body = f'<style>{CSS}</style>\n<div class="popc"><h1>popc: {escape(title)}</h1>\n'
    return page(f"popc: {title}", body + "\n".join(parts) + "</div>\n")


def _quality(points: Sequence[Point]) -> str:
    if not points:
        return _missing("quality against bytes", "popc eval MODEL --out FILE.json")
    headings = ("model", "policy", "r", "γ", "bytes read", "perplexity", "same top-1", "windows")
    rows = [
        (
            *(p.model, p.kind, f"{p.sparsity:.3g}", f"{p.candidate:.3g}", f"{p.read:.3f}"),
            *(f"{p.rise:+.1%}", f"{p.agreement:.3f}", str(p.windows)),
        )
        for p in points
    ]

    def draw(axes: Axes) -> None:
        _lines(axes, [((p.model, p.kind), 100 * p.read, 100 * p.rise) for p in points])
        axes.set_yscale("symlog", linthresh=1)
        axes.set_xlabel("weight bytes of the layers read in a decode step, %")
        axes.set_ylabel("perplexity over dense, %")
        axes.legend(fontsize="small")

    table = Sheet("quality against bytes", headings, rows, (2, 3, 4, 5, 6, 7))
    return table.html() + _drawn("perplexity against bytes read", draw)


def _frontier(points: Sequence[Point], peers: Sequence[Peer]) -> str:
    """Quality against bits, where there is anything that has both."""
    counted = [(point, point.bits) for point in points if point.bits is not None]
    if not counted and not peers:
        return ""
    headings = ("model", "", "bits read", "perplexity", "same top-1", "windows")
    rows = [
        (p.model, p.kind, f"{bits:.2f}", f"{p.rise:+.1%}", f"{p.agreement:.3f}", str(p.windows))
        for p, bits in counted
    ]
    rows += [
        (p.model, p.name, f"{p.bits:.2f}", f"{p.rise:+.1%}", f"{p.agreement:.3f}", str(p.windows))
        for p in peers
    ]

    def draw(axes: Axes) -> None:
        _lines(axes, [((p.model, p.kind), bits, 100 * p.rise) for p, bits in counted])
        near = [peer for peer in peers if peer.bits < UNQUANTISED]
        axes.plot([p.bits for p in near], [100 * p.rise for p in near], "k^", label="other engines")
        for peer in near:
            place = peer.bits, 100 * peer.rise
            axes.annotate(peer.name, place, (4, 4), textcoords="offset points", fontsize=7)
        axes.set_yscale("symlog", linthresh=1)
        axes.set_xlabel("bits read of each weight of the layers in a decode step, scales included")
        axes.set_ylabel("perplexity over dense, %")
        axes.legend(fontsize="small")

    table = Sheet("quality against bits of each weight", headings, rows, (2, 3, 4, 5))
    return table.html() + _drawn("perplexity against bits read of each weight", draw)


def _speed(speeds: Sequence[Speed]) -> str:
    if not speeds:
        return _missing("speed against bytes", "popc bench MODEL --out FILE.json")
    headings = ("model", "policy", "r", "", "bytes left out", "speed-up", "limit", "tokens/s")
    rows = [
        (
            *(s.model, s.policy, f"{s.sparsity:.3g}", s.size, f"{s.saved:.1%}"),
            *(f"{s.speedup:.2f} ×", f"{s.limit:.2f} ×", f"{s.rate:.1f}"),
        )
        for s in speeds
    ]

    def draw(axes: Axes) -> None:
        _lines(axes, [((s.model, s.policy, s.size), 100 * s.saved, s.speedup) for s in speeds])
        saved = [i / 100 for i in range(round(100 * max(s.saved for s in speeds)) + 5)]
        limits = [1 / (1 - share) for share in saved]
        axes.plot([100 * share for share in saved], limits, color="black", label="limit")
        axes.set_xlabel("bytes of a dense step left unread, %")
        axes.set_ylabel("speed-up over the faster dense run")
        axes.legend(fontsize="small")

    table = Sheet("speed against bytes", headings, rows, (2, 4, 5, 6, 7))
    return table.html() + _drawn("speed-up against bytes left unread", draw)


def _lines(axes: Axes, points: Sequence[tuple[tuple[str, ...], float, float]]) -> None:
    """A line for each name, through its points x, y."""
    lines: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    for name, x, y in points:
        lines.setdefault(name, []).append((x, y))
    for name, line in lines.items():
        axes.plot(*zip(*line, strict=True), marker="o", label=", ".join(name))


def _partitions(drift: Drift) -> str:
    headings = ("kind", "where", "units", "retained", "candidate", "pruned")
    rows, parts = [], []
    for region in drift.regions:
        units = region.partition.size
        counts = [int((region.partition == state).sum()) for state in (2, 1, 0)]
        rows.append((region.kind, region.name, str(units), *map(str, counts)))
    kinds = dict.fromkeys(region.kind for region in drift.regions)
    for kind in kinds:
        regions = [region for region in drift.regions if region.kind == kind]
        title = f"{kind}: retained (dark), candidate, pruned (light), a row for each region"
        parts.append(_drawn(title, partial(_rows_of_units, regions=regions)))
    table = Sheet(f"partitions after {drift.prompt} tokens of prompt", headings, rows, (2, 3, 4, 5))
    return table.html() + "".join(parts)


def _rows_of_units(axes: Axes, regions: Sequence[RegionDrift]) -> None:
    import numpy as np

    widest = max(region.partition.size for region in regions)
    grid = np.full((len(regions), widest), np.nan)
    for row, region in zip(grid, regions, strict=True):
        row[: region.partition.size] = region.partition.ravel()
    axes.imshow(grid, aspect="auto", interpolation="nearest", cmap="Blues", vmin=-0.5, vmax=2)
    axes.set_xlabel("unit")
    axes.set_yticks(range(len(regions)), [region.name[-28:] for region in regions], fontsize=6)


def _drift(drift: Drift) -> str:
    headings = ("kind", "where", "by chance", *(f"chunk {i + 1}" for i in range(_chunks(drift))))
    rows = [
        (r.kind, r.name, f"{r.chance:.2f}", *(f"{share:.2f}" for share in r.overlap))
        for r in drift.regions
    ]

    def draw(axes: Axes) -> None:
        x = [drift.chunk * (i + 0.5) for i in range(_chunks(drift))]
        for region in drift.regions:
            axes.plot(x, region.overlap, alpha=0.6, linewidth=1)
        for chance in {round(region.chance, 3) for region in drift.regions}:
            axes.axhline(chance, color="black", linestyle=":")
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("generated tokens")
        axes.set_ylabel("live units that the prompt kept alive")

    title = f"how long partitions hold, over {drift.generated} generated tokens"
    table = Sheet(title, headings, rows, tuple(range(2, len(headings))))
    return _drawn(f"{title}; dotted: by chance", draw) + table.html()


def _chunks(drift: Drift) -> int:
    return len(drift.regions[0].overlap) if drift.regions else 0


def _reads(drift: Drift) -> str:
    if not drift.reads:
        return ""
    headings = ("where", "mean", "least", "most")
    rows = []
    for group in drift.reads:
        shares = group.shares
        values = (sum(shares) / len(shares), min(shares), max(shares))
        rows.append((group.name, *(f"{value:.3f}" for value in values)))

    def draw(axes: Axes) -> None:
        image = axes.imshow(
            [group.shares for group in drift.reads], aspect="auto", vmin=0, vmax=1, cmap="viridis"
        )
        axes.set_xlabel("decode step")
        axes.set_ylabel("linears of one input")
        axes.figure.colorbar(image, label="share of the channels, or of their bytes")

    title = "what the linears of one input read, step by step"
    return _drawn(title, draw) + Sheet(title, headings, rows, (1, 2, 3)).html()


def _missing(title: str, command: str) -> str:
    return f"<h2>{title}</h2><p>No figures: <code>{escape(command)}</code> writes them.</p>"


def _drawn(title: str, draw: Callable[[Axes], None]) -> str:
    """A picture as part of the page."""
    figure = plots.figure(8, 4.5)
    axes = figure.add_subplot()
    draw(axes)
    axes.grid(alpha=0.25)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f"<figure><img alt='{escape(title, quote=True)}' style='max-width: 100%' "
        f"src='data:image/png;base64,{data}'><figcaption>{escape(title)}</figcaption></figure>\n"
    )

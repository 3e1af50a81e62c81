"""Results for people: tables, and a plot."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from popc import plots
from popc.bench.rates import Decoded
from popc.bench.results import Extras, Result, Run


def show(result: Result) -> RenderableType:
    """A table of the runs, then one of the extras."""
    parts: list[RenderableType] = [_runs(result)]
    if result.extras is not None:
        parts.append(_extras(result.extras))
    return Group(*parts)


def decoded_table(
    title: str, results: Mapping[str, Decoded], bits: Mapping[str, float], stored: int, dense: int
) -> Table:
    """Decode rates, a row for each model.

    Args:
        results: the first ``dense`` of them are dense; the speed-up is over the fastest of these.
        bits: of each weight of the layers, what a model reads; ``stored`` where it isn't named.
    """
    table = Table(title=title)
    for heading in ("", "bits read", "tokens/s (low – high)", "speed-up"):
        table.add_column(heading, justify="left" if not heading else "right")
    fastest = max(result.rate.median for result in list(results.values())[:dense])
    for name, result in results.items():
        rate = result.rate
        table.add_row(
            name,
            f"{bits.get(name, stored):.1f}",
            f"{rate.median:.1f} ({rate.low:.1f} – {rate.high:.1f})",
            f"{rate.median / fastest:.2f} ×",
        )
    return table


def _runs(result: Result) -> Table:
    where = result.machine.gpu or result.machine.cpu
    bandwidth = f"{result.copy_bandwidth.median / 1e9:.1f} GB/s copied"
    bits = any(run.bits is not None for run in result.runs)
    read = (
        "\nBits are read of each weight of the layers; GB/s is all that a step reads by its time."
    )
    table = Table(
        title=f"{result.model.name}, {result.settings['dtype']}, {where}, {bandwidth}",
        caption="Speed-up is over the faster dense run; its limit is dense bytes / bytes read."
        + (read if bits else ""),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    ffn = result.kind == "ffn"
    rate = "µs / block" if ffn else "tokens/s"
    shown = ("bits", "speed-up", "limit", "GB/s") if bits else ("speed-up", "limit", "of limit")
    headings = (f"{rate} (low – high)", *shown, "of copy")
    for heading in ("", *headings):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for size, group in groupby(result.runs, key=_size):
        table.add_row(f"[bold]{sized(*size)}[/]")
        for run in group:
            cells = _cells(run, ffn)
            table.add_row(*(cells[heading] for heading in ("", *headings)))
    return table


def _cells(run: Run, ffn: bool) -> dict[str, str]:
    """By their columns' headings."""
    spread, scale = (run.seconds, 1e6) if ffn else (run.tokens_per_s, 1)
    values = (scale * value for value in (spread.median, spread.low, spread.high))
    median, low, high = (f"{value:.{1 if value < 100 else 0}f}" for value in values)
    return {
        "": run.name,
        f"{'µs / block' if ffn else 'tokens/s'} (low – high)": f"{median} ({low} – {high})",
        "bits": "" if run.bits is None else f"{run.bits:.2f}",
        "speed-up": f"{run.speedup:.2f} ×",
        "limit": f"{run.limit:.2f} ×",
        "of limit": f"{run.of_limit:.0%}",
        "GB/s": f"{run.read_bytes / run.seconds.median / 1e9:.1f}",
        "of copy": f"{run.of_bandwidth:.0%}",
    }


def _extras(extras: Extras) -> Table:
    title = "outside the decode step, batch 1, highest sparsity"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("", "dense, compiled", "popc", "popc / dense"):
        table.add_column(heading, justify="right" if heading else "left")
    dense, popc = extras.cold["dense"], extras.cold["popc"]

    def row(name: str, first: float, second: float, form: str = "{:.1f}") -> None:
        ratio = f"{second / first:.3f}" if first else ""
        table.add_row(name, form.format(first), form.format(second), ratio)

    table.add_row("popc's CPU kernels, built once, s", "", f"{popc.kernels_s:.1f}", "")
    row("first prefill, s", dense.prefill_s, popc.prefill_s)
    row("first two decode steps, s", dense.decode_s, popc.decode_s)
    row("peak memory, MB", dense.peak_bytes / 1e6, popc.peak_bytes / 1e6)
    if dense.running_peak_bytes and popc.running_peak_bytes:
        both = (dense.running_peak_bytes / 1e6, popc.running_peak_bytes / 1e6)
        row("peak memory once compiled, MB", *both)
    both = (1e3 * extras.dense_prefill.median, 1e3 * extras.popc_prefill.median)
    row(f"prefill of {extras.prefill_tokens} tokens, ms", *both)
    compilations = (extras.dense_compilations, extras.popc_compilations)
    row(f"graphs for {extras.prompts} lengths of prompts", *compilations, form="{:d}")
    table.add_row("popc's Python, µs per token", "", f"{1e6 * extras.host.median:.0f}", "")
    return table


def plot(result: Result, path: Path) -> None:
    """Speed-up against the share of bytes left unread, with the limit; the suffix is the format.

    Raises:
        ModelError: matplotlib is not installed.
    """
    figure = plots.figure(7, 5)
    axes = figure.add_subplot()
    pruned = [run for run in result.runs if run.policy is not None]
    saved = np.linspace(0, min(0.9, max(run.saved for run in pruned) + 0.05), 100)
    axes.plot(100 * saved, 1 / (1 - saved), color="black", label="limit")
    axes.axhline(1, color="grey", linestyle=":", label="faster dense run")
    for number, (key, group) in enumerate(groupby(pruned, key=lambda r: (_kind(r), _size(r)))):
        runs = sorted(group, key=lambda run: run.saved)
        speeds = np.array([run.speedup for run in runs])
        # A round's rate over the median one, at the median's speed-up.
        low, high = (
            np.array([getattr(run.tokens_per_s, end) / run.tokens_per_s.median for run in runs])
            for end in ("low", "high")
        )
        policy, size = key
        axes.errorbar(
            [100 * run.saved for run in runs],
            speeds,
            yerr=np.stack((speeds * (1 - low), speeds * (high - 1))),
            label=f"{policy}, {sized(*size)}",
            marker="osD^v"[number % 5],
            capsize=3,
        )
    axes.set_xlabel("bytes of a dense step left unread, %")
    axes.set_ylabel("speed-up over the faster dense run")
    where = result.machine.gpu or result.machine.cpu
    axes.set_title(f"{result.model.name}, {result.settings['dtype']}, {where}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _kind(run: Run) -> str:
    """The policy, and the weights where they are quantised."""
    return ", ".join(filter(None, (run.policy, run.weights)))


def _size(run: Run) -> tuple[int, int | None]:
    return run.batch, run.context


def sized(batch: int, context: int | None) -> str:
    """A run's size, in words."""
    return f"batch {batch}" + ("" if context is None else f", context {context}")

"""``popc report``: a page of quality and speed against what is read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from popc.cli import options
from popc.cli.common import console, errors, load, say_written
from popc.files import write_whole
from popc.models import DEFAULT


def report(
    out: Annotated[Path, typer.Argument(help="The page to write, as .html.")],
    model: options.Model = DEFAULT,
    figures: Annotated[
        list[Path] | None, typer.Option(help="A file of eval --out or bench --out; repeat it.")
    ] = None,
    peers: Annotated[
        list[Path] | None,
        typer.Option(help="A file of benchmarks/peers.py --out: other engines; repeat it."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Else a Wikipedia text.")] = None,
    tokens: Annotated[int, typer.Option(min=0, help="New tokens after it; 0: no model.")] = 128,
    chunk: Annotated[int, typer.Option(min=2, help="Tokens of each later partition.")] = 32,
    sparsity: options.Sparsity = 0.4,
    candidate: options.Candidate = 0.1,
    weights: options.Weights = None,
    bits: options.Bits = None,
    dtype: options.Dtype = "float32",
) -> None:
    """Write a page: quality and speed against bytes, and what partitions of MODEL become."""
    from popc.report.figures import Figures
    from popc.report.pareto import report as frontier_report
    from popc.report.stability import measure
    from popc.tools import text

    with errors():
        chosen = {"sparsity": sparsity, "candidate": candidate, "weights": weights, "bits": bits}
        config = options.config_of(None, None, **chosen)
        results = Figures.read(figures or [], peers or [])
        drift = None
        if tokens:
            loaded, tokenizer = load(model, dtype)
            with console.status("generating, and comparing partitions"):
                passage = text.wikipedia_articles()[0][:1200] if prompt is None else prompt
                ids = tokenizer(passage, return_tensors="pt").input_ids
                drift = measure(loaded, ids, config, tokens, chunk)
        page = frontier_report(results, drift, model)
        write_whole(out, page)
        say_written(out)

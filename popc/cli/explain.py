"""``popc analyze`` and ``popc explain``: what there is to prune in a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import popc
from popc.cli import options
from popc.cli.common import console, errors, load, say_written
from popc.files import write_whole
from popc.models import DEFAULT


def analyze(model: options.Model = DEFAULT, dtype: options.Dtype = "float32") -> None:
    """Show what popc would prune in MODEL, and why it leaves the rest."""
    with errors():
        loaded, _ = load(model, dtype)
        with console.status("tracing"):
            plan = popc.analyze(loaded)
        console.print(plan.table())


def explain(
    model: options.Model = DEFAULT,
    html: Annotated[Path | None, typer.Option(help="Write a page with a picture.")] = None,
    policy: options.Policy = None,
    sparsity: options.Sparsity = 0.2,
    candidate: options.Candidate = 0.1,
    weights: options.Weights = None,
    bits: options.Bits = None,
    dtype: options.Dtype = "float32",
) -> None:
    """Show what is pruned in MODEL, what a decode step reads, and what would help the rest."""
    with errors():
        chosen = {"sparsity": sparsity, "candidate": candidate, "weights": weights, "bits": bits}
        config = options.config_of(policy, None, **chosen)
        loaded, _ = load(model, dtype)
        with console.status("tracing"):
            explanation = popc.explain(loaded, config=config)
        explanation.title = model
        console.print(explanation.table())
        if html is not None:
            write_whole(html, explanation.html())
            say_written(html)

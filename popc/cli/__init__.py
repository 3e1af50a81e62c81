"""The command ``popc``: demo, analyze, explain, report, generate, eval, bench.

Each command imports what it needs when it runs: help and errors come without loading transformers'
model classes, which take seconds and bring in all that transformers knows of.
"""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from popc.cli.bench import bench
from popc.cli.demo import demo
from popc.cli.evaluate import evaluate
from popc.cli.explain import analyze, explain
from popc.cli.generate import generate
from popc.cli.report import report

__all__ = ["app"]


def _print_version(asked: bool) -> None:
    if asked:
        from popc.bench.machine import versions

        typer.echo("\n".join(f"{name} {version}" for name, version in versions().items()))
        raise typer.Exit


VERSION = typer.Option("--version", callback=_print_version, is_eager=True, help="Say which.")

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def main(
    version: Annotated[bool, VERSION] = False,
) -> None:
    """Decode faster without retraining."""
    # transformers imports torchao with any model; it warns of kernels that this machine has no
    # use for.
    logging.getLogger("torchao").setLevel(logging.ERROR)


for _command in (demo, analyze, explain, report, generate):
    app.command()(_command)
app.command("eval")(evaluate)
app.command()(bench)

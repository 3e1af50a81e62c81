"""``popc bench``: decode rates, and the limit that bytes set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import popc
from popc.bench.models import SHAPES, default_dtype
from popc.bench.results import Result
from popc.bench.settings import Settings
from popc.cli import options
from popc.cli.common import console, errors, progress, say_written
from popc.models import DEFAULT


def bench(
    model: Annotated[str, typer.Argument(help=f"{', '.join(SHAPES)}, or as elsewhere.")] = DEFAULT,
    ffn: Annotated[bool, typer.Option("--ffn", help="One FFN alone, not MODEL.")] = False,
    hidden: Annotated[int, typer.Option(min=1, help="D of that FFN.")] = 2048,
    channels: Annotated[int, typer.Option(min=1, help="F of that FFN.")] = 5632,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="Of shapes bfloat16, else float32.")] = None,
    batch: Annotated[str | None, typer.Option(help="Sequences: 1,4,8; of an FFN 1.")] = None,
    context: Annotated[str, typer.Option(help="Tokens in the cache.")] = "128,1024,4096",
    prefill: Annotated[int, typer.Option(min=0, help="Of those prefilled, at most; 0: all.")] = 512,
    sparsity: Annotated[str, typer.Option(help="r: one or more.")] = "0,0.2,0.4,0.5",
    candidate: options.Candidate = 0.1,
    policies: Annotated[str, typer.Option(help="One or more.")] = "threshold,pop",
    targets: options.Targets = None,
    weights: options.Weights = None,
    bits: Annotated[
        str, typer.Option(help="Of weights that are quantised, to read of each: 8.5,6,4.5.")
    ] = "",
    tokens: Annotated[int, typer.Option(min=1, help="Steps in a round of each.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, in which all take turns.")] = 5,
    layers: Annotated[int | None, typer.Option(min=1, help="Fewer layers.")] = None,
    guards: Annotated[str, typer.Option(help="Of popc: token or prompt.")] = "token",
    extras: Annotated[bool, typer.Option(help="Compilation, memory, prefill, host time.")] = True,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot, as .png or .svg.")] = None,
) -> None:
    """Time MODEL dense and pruned, in turn, and show the limit that the bytes read set."""
    from popc.bench import show

    with errors():
        settings = Settings(
            model=model,
            device=device,
            dtype=dtype or ("bfloat16" if ffn else default_dtype(model)),
            batch=options.numbers("batch", batch or ("1" if ffn else "1,4,8"), int),
            context=options.numbers("context", context, int),
            prefill=prefill,
            sparsity=options.numbers("sparsity", sparsity, float),
            candidate=candidate,
            policies=options.words(policies),
            targets=options.words(targets) if targets else None,
            weights=weights,
            bits=options.numbers("bits", bits, float),
            tokens=tokens,
            rounds=rounds,
            layers=layers,
            guards=guards,
        )
        result = _measured(settings, (hidden, channels) if ffn else None, extras)
        console.print(show.show(result))
        if out is not None:
            result.write(out)
        if plot is not None:
            show.plot(result, plot)
        for path in filter(None, (out, plot)):
            say_written(path)


def _measured(settings: Settings, ffn: tuple[int, int] | None, extras: bool) -> Result:
    """Of the model, or of one FFN alone with D and F.

    Raises:
        ConfigError: an FFN alone is not quantised.
    """
    from popc.bench import command
    from popc.bench.ffn import Shape, ffn_steps

    if ffn is None:
        with progress("building", command.total_steps(settings, extras)) as step:
            return command.bench_model(settings, extras, step)
    if settings.weights is not None:
        raise popc.ConfigError("weights", settings.weights, "None with --ffn")
    with progress("building", ffn_steps(settings)) as step:
        return command.bench_ffn(Shape(*ffn), settings, step)

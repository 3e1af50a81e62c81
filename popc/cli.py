"""The command ``popc``: demo, analyze, explain, report, generate, eval, bench."""

from __future__ import annotations

import contextlib
import copy
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import popc
from popc import policies as known
from popc.bench import Settings, decode_rates
from popc.bench.machine import versions
from popc.bench.models import SHAPES, default_dtype
from popc.bench.settings import DTYPES
from popc.bench.show import decoded_table
from popc.errors import PopcError
from popc.files import write_whole
from popc.models import DEFAULT, load_model
from popc.planning.budget_solver import resolve
from popc.report.explain import Explanation
from popc.report.pareto import Figures
from popc.report.pareto import report as frontier_report
from popc.report.stability import measure
from popc.tools.evaluate import evaluate
from popc.tools.tasks import TASKS, perform, tasks_of

app = typer.Typer(no_args_is_help=True, add_completion=False)
console = Console()

Model = Annotated[str, typer.Argument(help=f"'{DEFAULT}', a model folder, or a hub id.")]
Sparsity = Annotated[float, typer.Option(help="r: share of channels inactive at decode.")]
Candidate = Annotated[float, typer.Option(help="γ: share of channels each token re-scores.")]
Policy = Annotated[str, typer.Option(help=f"{', '.join(known.names())}.")]
Targets = Annotated[
    str | None, typer.Option(help="mlp,attention,experts,other,head; the policy's usual ones.")
]
Bytes = Annotated[
    float | None, typer.Option(help="Share of the weight bytes to read; replaces the sparsity.")
]
Mass = Annotated[
    float | None, typer.Option(help="Share of its scores that each prompt keeps: elastic budget.")
]
Calibration = Annotated[
    int, typer.Option(min=1, help="Windows of other text, for policies that need one beforehand.")
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]

Number = TypeVar("Number", int, float)

DEMO_PROMPT = (
    "Explain in simple words why the sky is blue, why sunsets are red, "
    "and what colour the sky has on Mars."
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo("\n".join(f"{name} {version}" for name, version in versions().items()))
        raise typer.Exit


VERSION = typer.Option("--version", callback=_print_version, is_eager=True, help="Say which.")


@app.callback()
def main(
    version: Annotated[bool, VERSION] = False,
) -> None:
    """Decode faster without retraining."""


@app.command()
def demo(
    tokens: Annotated[int, typer.Option(min=3, help="Tokens to decode.")] = 48,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of each model.")] = 3,
) -> None:
    """Compile a real model, generate text with it, and time it against the dense one."""
    with _errors():
        model, tokenizer = _load(DEFAULT, "float32")
        configs = {r: popc.Config(sparsity=r) for r in (0.2, 0.4)}
        pruned = {r: popc.compile(model, config) for r, config in configs.items()}
        # popc changes strides of `model`'s weights: dense has a copy, as they were.
        dense = copy.deepcopy(model)
        models: dict[str, Any] = {
            "dense, eager": dense,
            "dense, torch.compile": torch.compile(dense.forward),
            **{f"popc, r = {r}": compiled for r, compiled in pruned.items()},
        }
        ids = _prompt(tokenizer, DEMO_PROMPT)["input_ids"]
        with _progress("compiling", len(models) * (rounds + 1)) as step:
            results = decode_rates(models, model.config, ids, tokens, rounds, step)
        console.print(f"\n[bold]{DEMO_PROMPT}[/]")
        for name, result in results.items():
            text = tokenizer.decode(result.tokens[0], skip_special_tokens=True)
            console.print(f"\n[cyan]{name}[/]: {text}")
        shares = {f"popc, r = {r}": pruned[r].popc_plan.decode_share(configs[r]) for r in pruned}
        title = f"SmolLM2-135M, float32, batch 1, prompt {ids.shape[1]}, decode"
        console.print(decoded_table(title, results, shares, dense=2))
        console.print("Speed-up is over the faster of the two dense runs.")


@app.command()
def analyze(model: Model = DEFAULT, dtype: Dtype = "float32") -> None:
    """Show what popc would prune in MODEL, and why it leaves the rest."""
    with _errors():
        loaded, _ = _load(model, dtype)
        with console.status("tracing"):
            plan = popc.analyze(loaded)
        console.print(plan.table())


@app.command()
def explain(
    model: Model = DEFAULT,
    html: Annotated[Path | None, typer.Option(help="Write a page with a picture.")] = None,
    policy: Policy = "threshold",
    sparsity: Sparsity = 0.2,
    candidate: Candidate = 0.1,
    dtype: Dtype = "float32",
) -> None:
    """Show what is pruned in MODEL, what a decode step reads, and what would help the rest."""
    with _errors():
        config = _config(policy, None, sparsity=sparsity, candidate=candidate)
        loaded, _ = _load(model, dtype)
        with console.status("tracing"):
            explanation = Explanation(popc.analyze(loaded), config, model)
        console.print(explanation.table())
        if html is not None:
            write_whole(html, explanation.html())
            console.print(f"written to {html}", markup=False, highlight=False)


@app.command()
def report(
    out: Annotated[Path, typer.Argument(help="The page to write, as .html.")],
    model: Model = DEFAULT,
    figures: Annotated[
        list[Path] | None, typer.Option(help="A file of eval --out or bench --out; repeat it.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Else a Wikipedia text.")] = None,
    tokens: Annotated[int, typer.Option(min=0, help="New tokens after it; 0: no model.")] = 128,
    chunk: Annotated[int, typer.Option(min=2, help="Tokens of each later partition.")] = 32,
    sparsity: Sparsity = 0.4,
    candidate: Candidate = 0.1,
    dtype: Dtype = "float32",
) -> None:
    """Write a page: quality and speed against bytes, and what partitions of MODEL become."""
    from popc.tools import text

    with _errors():
        config = popc.Config(sparsity=sparsity, candidate=candidate)
        results = Figures.read(figures or [])
        drift = None
        if tokens:
            loaded, tokenizer = _load(model, dtype)
            with console.status("generating, and comparing partitions"):
                passage = text.wikipedia_articles()[0][:1200] if prompt is None else prompt
                ids = tokenizer(passage, return_tensors="pt").input_ids
                drift = measure(loaded, ids, config, tokens, chunk)
        page = frontier_report(results, drift, model)
        write_whole(out, page)
        console.print(f"written to {out}", markup=False, highlight=False)


@app.command()
def generate(
    model: Model = DEFAULT,
    prompt: Annotated[str, typer.Option(help="What to say to the model.")] = DEMO_PROMPT,
    policy: Policy = "threshold",
    sparsity: Sparsity = 0.2,
    candidate: Candidate = 0.1,
    targets: Targets = None,
    calibration: Calibration = 16,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens, at most.")] = 64,
    dtype: Dtype = "float32",
) -> None:
    """Answer PROMPT with MODEL, pruned."""
    with _errors():
        config = _config(policy, targets, sparsity=sparsity, candidate=candidate)
        loaded, tokenizer = _load(model, dtype)
        compiled = _compile(loaded, config, tokenizer, calibration)
        with console.status("compiling and generating"):
            text = _generate(compiled, tokenizer, _prompt(tokenizer, prompt), tokens)
        console.print(text, markup=False, highlight=False)


@app.command(name="eval")
def evaluate_command(
    model: Model = DEFAULT,
    policy: Policy = "threshold",
    sparsity: Sparsity = 0.2,
    candidate: Candidate = 0.1,
    bytes: Bytes = None,
    mass: Mass = None,
    targets: Targets = None,
    calibration: Calibration = 16,
    windows: Annotated[int, typer.Option(min=1, help="Windows of Wikipedia text.")] = 8,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens prefilled in each.")] = 256,
    continuation: Annotated[int, typer.Option(min=2, help="Tokens decoded in each.")] = 256,
    tasks: Annotated[str, typer.Option(help=f"And these: {','.join(TASKS)}.")] = "",
    examples: Annotated[int, typer.Option(min=1, help="Examples of each task.")] = 8,
    dtype: Dtype = "float32",
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Perplexity and agreement with dense, in real compiled decode over Wikipedia text."""
    from popc.tools import text

    with _errors():
        options = {"sparsity": sparsity, "candidate": candidate, "bytes": bytes, "mass": mass}
        config = _config(policy, targets, **options, count=True)
        asked = tasks_of(_words(tasks))
        loaded, tokenizer = _load(model, dtype)
        with console.status("reading text"):
            plan = popc.analyze(loaded)
            config = resolve(config, loaded.num_parameters(), plan)
            rows = text.windows(tokenizer, windows, prompt + continuation)
        compiled = _compile(loaded, config, tokenizer, calibration, windows)
        with _progress("window", windows) as step:
            quality = evaluate(loaded, compiled, rows, prompt, lambda: step("window"), plan)
        figures = {
            "model": model,
            "policy": config.policy_name,
            "targets": config.targets,
            "sparsity": config.sparsity,
            "candidate": candidate,
            "mass": mass,
            "calibration": calibration if config.calibrated else 0,
            "pruned_bytes": compiled.popc_plan.decode_share(config),
            **asdict(quality),
        }
        articles = text.wikipedia_articles() if asked else []
        outcomes = []
        with _progress("example", len(asked) * examples) as step:
            for task in asked:
                done = perform(
                    task, loaded, compiled, tokenizer, articles, examples, partial(step, task.name)
                )
                outcomes.append(done)
        for name, value in figures.items():
            shown = f"{value:.4g}" if isinstance(value, float) else value
            console.print(f"{name:>18}  {shown}", highlight=False)
        for done in outcomes:
            scores = f"{done.score:.3f}, dense {done.dense_score:.3f}"
            console.print(f"{done.task:>18}  {scores}", highlight=False)
        if out is not None:
            figures["tasks"] = [asdict(done) for done in outcomes]
            write_whole(out, json.dumps(figures, indent=1) + "\n")


@app.command()
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
    candidate: Candidate = 0.1,
    policies: Annotated[str, typer.Option(help="One or more.")] = "threshold,pop",
    targets: Targets = None,
    tokens: Annotated[int, typer.Option(min=1, help="Steps in a round of each.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, in which all take turns.")] = 5,
    layers: Annotated[int | None, typer.Option(min=1, help="Fewer layers.")] = None,
    guards: Annotated[str, typer.Option(help="Of popc: token or prompt.")] = "token",
    extras: Annotated[bool, typer.Option(help="Compilation, memory, prefill, host time.")] = True,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot, as .png or .svg.")] = None,
) -> None:
    """Time MODEL dense and pruned, in turn, and show the limit that the bytes read set."""
    from popc.bench import command, show
    from popc.bench.ffn import Shape, ffn_steps

    with _errors():
        settings = Settings(
            model=model,
            device=device,
            dtype=dtype or ("bfloat16" if ffn else default_dtype(model)),
            batch=_numbers("batch", batch or ("1" if ffn else "1,4,8"), int),
            context=_numbers("context", context, int),
            prefill=prefill,
            sparsity=_numbers("sparsity", sparsity, float),
            candidate=candidate,
            policies=_words(policies),
            targets=_words(targets) if targets else None,
            tokens=tokens,
            rounds=rounds,
            layers=layers,
            guards=guards,
        )
        if ffn:
            with _progress("building", ffn_steps(settings)) as step:
                result = command.bench_ffn(Shape(hidden, channels), settings, step)
        else:
            with _progress("building", command.total_steps(settings, extras)) as step:
                result = command.bench_model(settings, extras, step)
        console.print(show.show(result))
        if out is not None:
            result.write(out)
        if plot is not None:
            show.plot(result, plot)
        for path in filter(None, (out, plot)):
            console.print(f"written to {path}", markup=False, highlight=False)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(name: str, text: str, kind: type[Number]) -> tuple[Number, ...]:
    try:
        return tuple(kind(word) for word in _words(text))
    except ValueError:
        raise popc.ConfigError(name, text, "numbers with commas between them") from None


def _config(policy: str, targets: str | None, **options: Any) -> popc.Config:
    """Options of a command as a Config; ``policy`` is a name, or ``mlp=pop,attention=...``."""
    policies: Any = policy
    if options.get("mass") is not None:
        options["budget"] = "elastic"
    else:
        options.pop("mass", None)
    if "=" in policy:
        policies = dict(word.split("=", 1) for word in _words(policy))
    return popc.Config(policy=policies, targets=_words(targets) if targets else None, **options)


def _compile(loaded: Any, config: popc.Config, tokenizer: Any, count: int, skip: int = 0) -> Any:
    """Compiled; on ``count`` windows of text after ``skip`` others if the policy is calibrated."""
    from popc.tools import text

    if not config.calibrated:
        return popc.compile(loaded, config)
    with console.status("compiling, and measuring other text"):
        batches = text.windows(tokenizer, count, skip=skip).split(1)
        return popc.compile(loaded, config, calibration=batches)


def _load(name: str, dtype: str) -> tuple[Any, Any]:
    if dtype not in DTYPES:
        raise popc.ConfigError("dtype", dtype, f"one of {', '.join(DTYPES)}")
    with console.status(f"loading {name} (the first time converts it, half a minute)"):
        return load_model(name, DTYPES[dtype])


def _prompt(tokenizer: Any, text: str) -> Any:
    """``text`` as the model's own chat format has it, where there is one."""
    if not tokenizer.chat_template:
        return tokenizer(text, return_tensors="pt")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )


def _generate(model: Any, tokenizer: Any, prompt: Any, tokens: int) -> str:
    out = model.generate(**prompt, max_new_tokens=tokens, do_sample=False)
    answer = out[0, prompt["input_ids"].shape[1] :]
    return str(tokenizer.decode(answer, skip_special_tokens=True))


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar; calling what it gives names the next step and counts one."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task(what, total=total)
        yield lambda name: progress.update(task, advance=1, description=name)


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """What the user can fix is one line and exit code 2, not a traceback."""
    try:
        yield
    except (PopcError, OSError) as error:
        # soft_wrap: a path is not to be broken in two.
        Console(stderr=True).print(f"popc: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    app()

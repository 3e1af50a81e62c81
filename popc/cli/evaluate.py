"""``popc eval``: quality in real compiled decode."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table
from torch import Tensor

import popc
from popc.cli import options
from popc.cli.common import compiled_by, console, errors, load, progress
from popc.config import CallBudget
from popc.files import write_whole
from popc.models import DEFAULT
from popc.tools.tasks import TASKS, Outcome, Task, perform, tasks_of

SEVERAL = "Bits to read of each weight, scales counted; replaces the sparsity. Several: 8.5,6,4.5."


def evaluate(
    model: options.Model = DEFAULT,
    policy: options.Policy = None,
    sparsity: options.Sparsity = 0.2,
    candidate: options.Candidate = 0.1,
    bytes: options.Bytes = None,
    mass: options.Mass = None,
    weights: options.Weights = None,
    bits: Annotated[str, typer.Option(help=SEVERAL)] = "",
    targets: options.Targets = None,
    calibration: options.Calibration = 16,
    windows: Annotated[int, typer.Option(min=1, help="Windows of Wikipedia text.")] = 8,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens prefilled in each.")] = 256,
    continuation: Annotated[int, typer.Option(min=2, help="Tokens decoded in each.")] = 256,
    tasks: Annotated[str, typer.Option(help=f"And these: {','.join(TASKS)}.")] = "",
    examples: Annotated[int, typer.Option(min=1, help="Examples of each task.")] = 8,
    dtype: options.Dtype = "float32",
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Perplexity and agreement with dense, in real compiled decode over Wikipedia text."""
    from popc.tools import text

    with errors():
        asked = options.numbers("bits", bits, float)
        first = {"bytes": bytes, "mass": mass, "weights": weights, "bits": min(asked, default=None)}
        shares = {"sparsity": sparsity, "candidate": candidate}
        config = options.config_of(policy, targets, **shares, **first, count=True)
        budgets = _budgets(config, asked)
        chosen = tasks_of(options.words(tasks))
        if chosen and len(budgets) > 1:
            raise popc.ConfigError("tasks", tasks, "none where several bits are given")
        loaded, tokenizer = load(model, dtype)
        with console.status("reading text"):
            rows = text.windows(tokenizer, windows, prompt + continuation)
        compiled = compiled_by(config, loaded, tokenizer, calibration, windows)
        evaluation = _Evaluation(model, loaded, compiled, rows, prompt)
        points = evaluation.points(budgets, candidate, mass, calibration)
        outcomes = _outcomes(chosen, loaded, compiled, tokenizer, examples)
        _show(points, outcomes)
        if out is not None:
            for point in points:
                point["tasks"] = [asdict(done) for done in outcomes]
            figures = points[0] if len(points) == 1 else points
            write_whole(out, json.dumps(figures, indent=1) + "\n")


def _budgets(config: popc.Config, asked: Sequence[float]) -> list[CallBudget | None]:
    """Of calls; None where the config's own is the only one."""
    if len(asked) <= 1:
        return [None]
    config.check_elastic()
    return [CallBudget(bits=bits) for bits in asked]


@dataclass(frozen=True)
class _Evaluation:
    """What is evaluated: the model by its ``name``, dense and compiled, on windows of text.

    ``rows`` are int64 ``[W, T]``, of which ``prompt`` tokens are prefilled.
    """

    name: str
    loaded: Any
    compiled: Any
    rows: Tensor
    prompt: int

    def points(
        self,
        budgets: Sequence[CallBudget | None],
        candidate: float,
        mass: float | None,
        calibration: int,
    ) -> list[dict[str, Any]]:
        """The figures at each budget, as they are written to a file."""
        from popc.planning.budget_solver import resolve
        from popc.tools.evaluate import evaluate_budgets

        own: popc.Config = self.compiled.popc_config
        with console.status("tracing"):
            plan = self._plan()
            configs = [own if budget is None else own.at(budget) for budget in budgets]
            resolved = [resolve(c, self.loaded.num_parameters(), plan) for c in configs]
        with progress("window", len(self.rows) * len(budgets)) as step:
            qualities = evaluate_budgets(
                *(self.loaded, self.compiled, self.rows, budgets, self.prompt),
                *(lambda: step("window"), plan),
            )
        return [
            {
                "model": self.name,
                "policy": own.policy_name,
                "targets": own.targets,
                "weights": own.weights,
                "bits": asked.bits,
                "sparsity": config.sparsity,
                "candidate": candidate,
                "mass": mass,
                "calibration": calibration if own.calibrated else 0,
                "pruned_bytes": self.compiled.popc_plan.decode_share(config),
                **asdict(quality),
            }
            for asked, config, quality in zip(configs, resolved, qualities, strict=True)
        ]

    def _plan(self) -> popc.Plan:
        """Of the weights that the compiled model reads: its own once a prompt quantised them."""
        from popc.tools.evaluate import decode_logits

        if self.compiled.popc_config.weights is None:
            return popc.analyze(self.loaded)
        decode_logits(self.compiled, self.rows[0, : self.prompt + 1], self.prompt)
        return popc.analyze(self.compiled)


def _outcomes(
    tasks: Sequence[Task], loaded: Any, compiled: Any, tokenizer: Any, examples: int
) -> list[Outcome]:
    from popc.tools import text

    articles = text.wikipedia_articles() if tasks else []
    outcomes = []
    with progress("example", len(tasks) * examples) as step:
        for task in tasks:
            given = task, loaded, compiled, tokenizer, articles, examples
            outcomes.append(perform(*given, partial(step, task.name)))
    return outcomes


def _show(points: Sequence[dict[str, Any]], outcomes: Sequence[Outcome]) -> None:
    if len(points) > 1:
        console.print(_table(points))
        return
    for name, value in points[0].items():
        shown = f"{value:.4g}" if isinstance(value, float) else value
        console.print(f"{name:>18}  {shown}", highlight=False)
    for done in outcomes:
        scores = f"{done.score:.3f}, dense {done.dense_score:.3f}"
        console.print(f"{done.task:>18}  {scores}", highlight=False)


def _table(points: Sequence[dict[str, Any]]) -> Table:
    """A row for each budget."""
    first = points[0]
    kind = ", ".join(filter(None, (first["model"], first["policy"], first["weights"])))
    title = f"{kind}, {first['windows']} windows, perplexity {first['dense_perplexity']:.2f} dense"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for heading in ("bits asked", "bits read", "perplexity", "over dense", "same top-1"):
        table.add_column(heading, justify="right")
    for point in points:
        rise = point["perplexity"] / point["dense_perplexity"] - 1
        counted = f"{point['bits']:g}", f"{point['read_bits']:.2f}", f"{point['perplexity']:.2f}"
        table.add_row(*counted, f"{rise:+.1%}", f"{point['agreement']:.3f}")
    return table

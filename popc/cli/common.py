"""What commands do alike: load, compile, prompt, show progress and say what is wrong."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import popc
from popc.bench.settings import DTYPES
from popc.errors import PopcError

console = Console()

DEMO_PROMPT = (
    "Explain in simple words why the sky is blue, why sunsets are red, "
    "and what colour the sky has on Mars."
)


def load(name: str, dtype: str) -> tuple[Any, Any]:
    """A model and its tokenizer.

    Raises:
        ConfigError: there is no such ``dtype``.
        ModelError: there is no such model.
    """
    from popc.models import load_model

    if dtype not in DTYPES:
        raise popc.ConfigError("dtype", dtype, f"one of {', '.join(DTYPES)}")
    with console.status(f"loading {name} (the first time converts it, half a minute)"):
        return load_model(name, DTYPES[dtype])


def compiled_by(config: popc.Config, loaded: Any, tokenizer: Any, count: int, skip: int = 0) -> Any:
    """Compiled; on ``count`` windows of text after ``skip`` others if the policy is calibrated."""
    from popc.tools import text

    if not config.calibrated:
        return popc.compile(loaded, config)
    with console.status("compiling, and measuring other text"):
        batches = text.windows(tokenizer, count, skip=skip).split(1)
        return popc.compile(loaded, config, calibration=batches)


def prompt_of(tokenizer: Any, text: str) -> Any:
    """``text`` as the model's own chat format has it, where there is one."""
    if not tokenizer.chat_template:
        return tokenizer(text, return_tensors="pt")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )


def say_written(path: Path) -> None:
    """Tell where a file is."""
    console.print(f"written to {path}", markup=False, highlight=False)


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar; calling what it gives names the next step and counts one."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task(what, total=total)
        yield lambda name: bar.update(task, advance=1, description=name)


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """What the user can fix is one line and exit code 2, not a traceback."""
    try:
        yield
    except (PopcError, OSError) as error:
        # soft_wrap: a path is not to be broken in two.
        Console(stderr=True).print(f"popc: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(2)

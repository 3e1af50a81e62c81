"""popc beside llama.cpp, torchao and dense ``torch.compile``: speed, memory and quality.

``python -m benchmarks.peers smollm2 --popc sparsity=0.25 --windows 6`` from the project's folder;
``--help`` lists the options. It needs the extra ``peers``. Each engine is a process; all have their
turn in every round.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.engines import DENSE, LLAMA, TORCHAO, Spec, Task
from benchmarks.llama_files import FORMATS, quantize, write_f16
from benchmarks.peer_results import Peer, PeerResult, Quality, show
from benchmarks.scores import Scores
from benchmarks.workers import Worker
from popc.bench.decode import random_prompt
from popc.bench.machine import machine, read_bandwidth
from popc.bench.models import SHAPES, build, default_dtype
from popc.bench.rates import Progress, Spread, interleaved
from popc.bench.results import Model, model_of
from popc.bench.settings import DTYPES, Settings
from popc.errors import ConfigError, ModelError, PopcError
from popc.models import load_model
from popc.tools.text import windows

BANDWIDTH = "read bandwidth"
PROMPT = 256  # tokens of a window that are the prompt, of WINDOW
WINDOW = 512
# By how much logits of llama.cpp's F16 may differ from those of float32: the relative error of all
# of them together. Rounding to float16 gives a tenth of it, wrong weights a hundred times as much.
LOGITS = 0.02


@dataclass(frozen=True)
class PeerSettings:
    """What to measure.

    Args:
        model: a name of :data:`popc.bench.models.SHAPES`, or what :func:`popc.models.load_model`
            takes; a Llama.
        popc: options of :func:`popc.compile`, each as :meth:`Spec.popc` has them.
        formats: of :data:`FORMATS`; ``dense``, ``torchao``: dtypes.
        windows: of text, for the quality; 0: none. A shape has none.
        context, prompt: tokens that decode comes after, and of the prompt that is timed.
        tokens, rounds, layers: as in :class:`popc.bench.Settings`.
        threads: of each engine.

    Raises:
        ConfigError: a value can't be used.
    """

    model: str
    popc: tuple[str, ...] = ()
    formats: tuple[str, ...] = tuple(FORMATS)
    dense: tuple[str, ...] = ("float32", "bfloat16")
    torchao: tuple[str, ...] = ("bfloat16",)
    windows: int = 0
    context: int = 128
    prompt: int = 512
    tokens: int = 64
    rounds: int = 5
    layers: int | None = None
    threads: int = 2

    def __post_init__(self) -> None:
        known = {"formats": FORMATS, "dense": DTYPES, "torchao": DTYPES}
        for name, allowed in known.items():
            for value in getattr(self, name):
                if value not in allowed:
                    raise ConfigError(name, value, f"one of {', '.join(allowed)}")
        if self.windows and self.model in SHAPES:
            raise ConfigError("windows", self.windows, "0: random weights have no quality")
        if not self.specs(Path()):
            raise ConfigError("popc", self.popc, "nothing is to be measured")

    def specs(self, folder: Path) -> list[Spec]:
        """The engines; llama.cpp's files are in ``folder``."""
        llama = [Spec(LLAMA, kind, file=self.file(folder, kind)) for kind in self.formats]
        dense = [Spec(DENSE, dtype) for dtype in self.dense]
        torchao = [Spec(TORCHAO, dtype) for dtype in self.torchao]
        return [*dense, *torchao, *llama, *map(Spec.popc, self.popc)]

    def file(self, folder: Path, kind: str) -> Path:
        """llama.cpp's file of a format."""
        layers = f"-{self.layers}-layers" if self.layers else ""
        return folder / f"{Path(self.model).name}{layers}-{kind}.gguf"


@dataclass(frozen=True)
class Reference:
    """What the engines are compared with: the model in float32.

    Attributes:
        logits: ``[context - 1, V]``, after each token of the short prompt but the last.
        windows: of text, int64 ``[W, T]``, and their ``scores``; or None.
    """

    model: Model
    logits: Tensor
    windows: Tensor | None
    scores: Scores | None


@torch.no_grad()
def prepare(settings: PeerSettings, folder: Path, progress: Progress) -> tuple[Task, Reference]:
    """Write llama.cpp's files where they are missing, and run the model in float32."""
    dtype = default_dtype(settings.model)
    progress("loading the model")
    made = Settings(model=settings.model, dtype=dtype, layers=settings.layers)
    model = build(made)
    longest = max(settings.context, settings.prompt)
    text = None
    if settings.model in SHAPES:
        ids = random_prompt(model, 1, longest, "cpu")
    else:
        _, tokenizer = load_model(settings.model)
        text = windows(tokenizer, settings.windows, WINDOW) if settings.windows else None
        ids = windows(tokenizer, 1, longest)
    f16 = settings.file(folder, "F16")
    for kind in settings.formats:
        path = settings.file(folder, kind)
        progress(f"writing {path.name}")
        if not f16.exists():
            write_f16(model, f16)
        if not path.exists():
            quantize(f16, path, kind, settings.threads)
    progress("running the model in float32")
    layers = model.config.num_hidden_layers
    described = model_of(settings.model, model, layers)
    model = model.float()

    def logits(window: Tensor, prompt: int) -> Tensor:
        rows: Tensor = model(window[None], use_cache=False).logits[0, prompt - 1 : -1]
        return rows

    short, long = ids[:, : settings.context], ids[:, : settings.prompt]
    scores = Scores.of(text, PROMPT, logits) if text is not None else None
    task = Task(settings.model, settings.layers, short, long, settings.tokens, settings.threads)
    return task, Reference(described, logits(short[0], 1), text, scores)


def measure(settings: PeerSettings, folder: Path, progress: Progress) -> PeerResult:
    """All engines, in turn.

    Args:
        folder: for llama.cpp's files; those that are there are not written again.
        progress: called with what comes next.

    Raises:
        ModelError: something is missing, or llama.cpp's F16 gives other logits than the model.
    """
    where = machine()
    torch.set_num_threads(settings.threads)
    task, reference = prepare(settings, folder, progress)
    workers: dict[str, Worker] = {}
    try:
        for spec in settings.specs(folder):
            progress(f"starting {spec.name}")
            workers[spec.name] = Worker(spec, task)
            if spec.kind == LLAMA and spec.format == "F16":
                error = check_logits(workers[spec.name], task, reference)
                progress(f"logits of F16 differ from float32's by {error:.2g} of their norm")
        seconds, bandwidth = _rounds(workers, "decode", settings, progress)
        prefills, _ = _rounds(workers, "prefill", settings, progress)
        peers = []
        for name, worker in workers.items():
            quality = None
            if reference.windows is not None:
                progress(f"quality of {name}")
                quality = _quality(worker, reference)
            per_token = Spread.of(value / settings.tokens for value in seconds[name].rounds)
            peers.append(Peer.of(worker, per_token, prefills[name], bandwidth, quality))
    finally:
        for worker in workers.values():
            worker.close()
    perplexity = reference.scores.perplexity if reference.scores is not None else None
    return PeerResult.of(where, reference.model, settings, bandwidth, perplexity, peers)


def check_logits(worker: Worker, task: Task, reference: Reference) -> float:
    """See that an engine has the model's weights, each in its place.

    Returns:
        The error of its logits, as a share of their norm.

    Raises:
        ModelError: its logits after the short prompt's tokens are not those of float32.
    """
    logits = worker.call("logits", task.short[0], 1)
    error = float((logits - reference.logits).norm() / reference.logits.norm())
    if not error < LOGITS:
        raise ModelError(
            f"logits of {worker.name} differ from those of float32 by {error:.2g} of their norm; "
            "if its file is of another model, remove it"
        )
    return error


def _rounds(
    workers: dict[str, Worker], method: str, settings: PeerSettings, progress: Progress
) -> tuple[dict[str, Spread], Spread]:
    """Seconds of a method of all engines, and the bandwidth, in bytes per second, meanwhile."""
    turns = {name: lambda worker=worker: worker.call(method) for name, worker in workers.items()}
    turns[BANDWIDTH] = lambda: read_bandwidth(rounds=3).median
    rounds = interleaved(turns, settings.rounds, lambda name: progress(f"{method}, {name}"))
    spreads = {name: Spread.of(values) for name, values in rounds.items()}
    return spreads, spreads.pop(BANDWIDTH)


def _quality(worker: Worker, reference: Reference) -> Quality:
    assert reference.scores is not None
    scores, share = worker.call("scores", reference.windows, PROMPT)
    perplexity = scores.perplexity
    return Quality(
        perplexity=perplexity,
        over_dense=perplexity / reference.scores.perplexity - 1,
        agreement=scores.agreement(reference.scores),
        bits=share * worker.call("stored").bits,
    )


@contextlib.contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is None:
        with tempfile.TemporaryDirectory(prefix="popc-peers-") as folder:
            yield Path(folder)
    else:
        given.mkdir(parents=True, exist_ok=True)
        yield given


def _words(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's arguments."""
    defaults = PeerSettings("smollm2")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    add = parser.add_argument
    add("model", nargs="?", default=defaults.model, help="'smollm2', a folder, or a shape's name")
    add("--popc", action="append", default=[], help="options, as sparsity=0.25; repeat it")
    for name in ("formats", "dense", "torchao"):
        values = getattr(defaults, name)
        add(f"--{name}", type=_words, default=values, help=f"default: {','.join(values)}")
    for name in ("windows", "context", "prompt", "tokens", "rounds", "layers", "threads"):
        value = getattr(defaults, name)
        add(f"--{name}", type=int, default=value, help=f"default: {value}")
    add("--gguf", type=Path, help="a folder to keep llama.cpp's files in")
    add("--out", type=Path, help="write the figures as JSON")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, print tables, and write the figures."""
    given = vars(parsed())
    out, folder = given.pop("out"), given.pop("gguf")
    console = Console()
    try:
        settings = PeerSettings(**{**given, "popc": tuple(given["popc"])})
        with _folder(folder) as files, console.status("starting") as status:
            progress = status.update if console.is_terminal else console.log
            result = measure(settings, files, progress)
    except PopcError as error:
        raise SystemExit(f"error: {error}") from error
    console.print(show(result))
    if out is not None:
        result.write(out)


if __name__ == "__main__":
    main()

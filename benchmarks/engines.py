"""What decodes: llama.cpp, torchao and dense under ``torch.compile``, and popc, all used alike."""

from __future__ import annotations

import ast
import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import popc
from benchmarks.scores import Scores
from benchmarks.stored import Stored, stored_of
from popc.bench.models import build
from popc.bench.rates import WARMING, Context
from popc.bench.settings import DTYPES, Settings
from popc.compiled_model import dense
from popc.errors import ConfigError
from popc.tools.evaluate import Tally, count_bits, decode_logits

DENSE, TORCHAO, LLAMA, POPC = "dense", "torchao", "llama.cpp", "popc"


@dataclass(frozen=True)
class Spec:
    """An engine, as it is asked for.

    Attributes:
        kind: :data:`DENSE`, :data:`TORCHAO`, :data:`LLAMA` or :data:`POPC`.
        format: of llama.cpp's file, or the dtype of the model in torch.
        options: popc's.
        file: llama.cpp's.
    """

    kind: str
    format: str
    options: Mapping[str, Any] = field(default_factory=dict)
    file: Path | None = None

    @property
    def name(self) -> str:
        """What tables call it."""
        options = [f"{name}={value}" for name, value in self.options.items()]
        return " ".join((self.kind, self.format, *options))

    @classmethod
    def popc(cls, text: str) -> Spec:
        """Of options of :func:`popc.compile`, as ``"sparsity=0.25,dtype=float32"``.

        ``dtype`` is the model's, and bfloat16 if not given.

        Raises:
            ConfigError: it is no list of ``name=value``.
        """
        options: dict[str, Any] = {}
        for part in filter(None, text.split(",")):
            name, equals, value = part.partition("=")
            if not equals:
                raise ConfigError("popc", text, "name=value, and commas in between")
            options[name.strip()] = _value(value.strip())
        dtype = options.pop("dtype", "bfloat16")
        if dtype not in DTYPES:
            raise ConfigError("dtype", dtype, f"one of {', '.join(DTYPES)}")
        return cls(POPC, dtype, options)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


@dataclass(frozen=True)
class Task:
    """What every engine does.

    Attributes:
        model: as :class:`popc.bench.Settings` has it; ``layers`` too.
        short, long: prompts, int64 ``[1, T]``: tokens are decoded after the short one, and the
            time of the long one is taken.
        tokens: to decode in a turn.
        threads: of the engine.
    """

    model: str
    layers: int | None
    short: Tensor
    long: Tensor
    tokens: int
    threads: int


class Engine(Protocol):
    """What :mod:`benchmarks.peers` measures."""

    def decode(self) -> float:
        """Seconds to decode ``task.tokens`` tokens greedily after the short prompt."""

    def prefill(self) -> float:
        """Seconds that the long prompt takes."""

    def stored(self) -> Stored:
        """What the weights take."""

    def share_read(self) -> float:
        """The share of the layers' linears that the steps of :meth:`decode` read."""

    def cached(self) -> int:
        """Bytes of keys and values that a step of :meth:`decode` reads, at most."""

    def logits(self, window: Tensor, prompt: int) -> Tensor:
        """Logits ``[T - prompt, V]`` for all tokens of a window ``[T]`` but the prompt's."""

    def scores(self, windows: Tensor, prompt: int) -> tuple[Scores, float]:
        """Scores, and the share of the layers' linears that was read for them."""


class Torch:
    """A transformers model under ``torch.compile``, its weights as they are or quantised."""

    def __init__(self, spec: Spec, task: Task) -> None:
        self.spec, self.task = spec, task
        self.model, self.forward = self._compiled(self._built())
        config = self.model.config
        self.short = Context(config, task.short, task.tokens, self.forward)
        self.short.decode(self.forward, min(WARMING, task.tokens))
        # Later, so that the decode step is compiled for one size of cache.
        self.long = Context(config, task.long, 1, self.forward)
        self.prefill()

    def _built(self) -> Any:
        task = self.task
        return build(Settings(model=task.model, dtype=self.spec.format, layers=task.layers))

    def _compiled(self, model: Any) -> tuple[Any, Callable[..., Any]]:
        """The model to keep, and its compiled forward."""
        if self.spec.kind == TORCHAO:
            from torchao.quantization import Int8WeightOnlyConfig, quantize_

            quantize_(model, Int8WeightOnlyConfig())
        return model, torch.compile(model.forward)

    def decode(self) -> float:
        """Seconds of the steps, after the short prompt."""
        return self.short.decode(self.forward, self.task.tokens)[0]

    def prefill(self) -> float:
        """Seconds of the long prompt, in a cache that was emptied."""
        self.long.cache.reset()
        start = time.perf_counter()
        self.long.prefill(self.forward)
        return time.perf_counter() - start

    def stored(self) -> Stored:
        """What the weights take."""
        return stored_of(self.model)

    def share_read(self) -> float:
        """1: everything is read."""
        return 1.0

    def cached(self) -> int:
        """Bytes of keys and values, with room for the last step's."""
        return self.short.bytes

    def logits(self, window: Tensor, prompt: int) -> Tensor:
        """Logits ``[T - prompt, V]`` of a window, in one call."""
        logits: Tensor = self.model(window[None], use_cache=False).logits
        return logits[0, prompt - 1 : -1]

    def scores(self, windows: Tensor, prompt: int) -> tuple[Scores, float]:
        """Scores of one call a window; and 1, as everything is read."""
        return Scores.of(windows, prompt, self.logits), 1.0


class Popc(Torch):
    """A model compiled by popc; its scores are of real decode steps."""

    def _compiled(self, model: Any) -> tuple[Any, Callable[..., Any]]:
        compiled = popc.compile(model, **self.spec.options)
        return compiled, compiled.forward

    def share_read(self) -> float:
        """As counted, over the tokens that :meth:`decode` has decoded."""
        answer = self.short.decode(self.forward, self.task.tokens)[1][0]
        return count_bits(self.model, self.task.short[0], answer) / self.stored().bits

    def logits(self, window: Tensor, prompt: int) -> Tensor:
        """Logits ``[T - prompt, V]`` of a window, decoded one by one."""
        return decode_logits(self.model, window, prompt)[0]

    def scores(self, windows: Tensor, prompt: int) -> tuple[Scores, float]:
        """Scores of decode steps, and what was read, as counted."""
        # Counting takes time, so another model counts, on the same weights.
        counting = dataclasses.replace(self.model.popc_config, count=True)
        counter: Any = popc.compile(dense(self.model), counting)
        tally = Tally(None)

        def logits(window: Tensor, prompt: int) -> Tensor:
            decoded, session = decode_logits(counter, window, prompt)
            tally.add(session)
            return decoded

        scores = Scores.of(windows, prompt, logits)
        return scores, tally.shares(counter, popc.analyze(counter))[1] / self.stored().bits


def engine_of(spec: Spec, task: Task) -> Engine:
    """The engine, built, compiled and warm.

    Raises:
        ModelError: what it needs is not installed, or the model can't be loaded.
    """
    if spec.kind == LLAMA:
        from benchmarks.llama_engine import LlamaCpp

        assert spec.file is not None
        return LlamaCpp(spec.file, task)
    return Popc(spec, task) if spec.kind == POPC else Torch(spec, task)

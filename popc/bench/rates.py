"""Decode rates, side by side in one run: rounds are interleaved, medians with their spread."""

from __future__ import annotations

import functools
import inspect
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, StaticCache

from popc.compat import cache_keyword
from popc.errors import ModelError

Progress = Callable[[str], None]
WARMING = 4  # steps before any is timed: they compile, and CUDA graphs are recorded in the third


@dataclass(frozen=True)
class Spread:
    """A figure's median over the rounds, the lowest and the highest, and all in their order."""

    median: float
    low: float
    high: float
    rounds: tuple[float, ...]

    @classmethod
    def of(cls, rounds: Iterable[float]) -> Spread:
        """That of the rounds of one measurement; at least one."""
        values = tuple(rounds)
        return cls(statistics.median(values), min(values), max(values), values)

    def rate(self, count: float) -> Spread:
        """``count`` in each of these times: the lowest rate is that of the longest."""
        rounds = tuple(count / value for value in self.rounds)
        return Spread(count / self.median, count / self.high, count / self.low, rounds)


@dataclass(frozen=True)
class Decoded:
    """What :func:`decode_rates` measured of one model, and the tokens it decoded, ``[B, N]``.

    ``rate`` is in tokens per second.
    """

    rate: Spread
    tokens: Tensor


class Context:
    """A filled static cache, from whose end tokens are decoded again and again.

    Args:
        model_config: the transformers config of the model.
        prompt: int64 ``[B, T]``.
        room: tokens that can be decoded.
        length: tokens of context, ``>= T``; what the prompt does not fill holds random keys and
            values. A decode step reads as much and takes as long with them as with real ones.
        fill: the forward that prefills the prompt.
        allocate: an uncompiled forward of the same model. If present, it allocates the cache, which
            inside a compiled graph can have no fixed address, as CUDA graphs need it.

    Raises:
        ModelError: the model's cache holds other things than keys and values.
    """

    def __init__(
        self,
        model_config: PreTrainedConfig,
        prompt: Tensor,
        room: int,
        fill: Callable[..., Any],
        length: int | None = None,
        allocate: Callable[..., Any] | None = None,
    ) -> None:
        length = prompt.shape[1] if length is None else length
        self.device = prompt.device
        self.cache = StaticCache(config=model_config, max_cache_len=length + room)
        if allocate is not None:
            self._caller(allocate)(prompt[:, :1])
            self.cache.reset()
        self._layers: list[Any] = list(self.cache.layers)
        if not all(hasattr(layer, "cumulative_length") for layer in self._layers):
            raise ModelError("only models that cache keys and values alone can be timed")
        self.prompt = prompt
        self.first = self.prefill(fill)
        self._extend(length - prompt.shape[1])
        self._lengths = [self._length_of(layer) for layer in self._layers]

    def prefill(self, forward: Callable[..., Any]) -> Tensor:
        """Put the prompt into the cache; gives the token after it, int64 ``[B, 1]``."""
        last: dict[str, Any] = {}
        if "logits_to_keep" in inspect.signature(forward).parameters:
            last["logits_to_keep"] = 1
        return self._caller(forward, **last)(self.prompt)

    @property
    def bytes(self) -> int:
        """Bytes of keys and values, with room for tokens to come: a dense step reads that too."""
        tensors = (tensor for layer in self._layers for tensor in (layer.keys, layer.values))
        return sum(int(tensor.nbytes) for tensor in tensors)

    def decode(self, forward: Callable[..., Any], tokens: int) -> tuple[float, Tensor]:
        """Seconds for ``tokens`` greedy tokens after the context, and the tokens ``[B, N]``."""
        self._rewind()
        ids, out = self.first, []
        call = self._caller(forward)
        wait(self.device)
        start = time.perf_counter()
        for _ in range(tokens):
            ids = call(ids)
            out.append(ids)
        wait(self.device)
        return time.perf_counter() - start, torch.cat(out, dim=1)

    def _caller(self, forward: Callable[..., Any], **options: Any) -> Callable[[Tensor], Tensor]:
        """From tokens ``[B, T]`` to the next one ``[B, 1]``, through ``forward`` and the cache."""
        options |= {cache_keyword(forward): self.cache, "use_cache": True}
        cuda = self.device.type == "cuda"

        def call(ids: Tensor) -> Tensor:
            if cuda:
                torch.compiler.cudagraph_mark_step_begin()
            return forward(ids, **options).logits[:, -1:].argmax(-1)

        return call

    def _extend(self, count: int) -> None:
        """Let ``count`` more tokens be in the cache, with random keys and values."""
        if not count:
            return
        for layer in self._layers:
            start = int(layer.cumulative_length)
            for tensor in (layer.keys, layer.values):
                tensor[:, :, start : start + count].normal_()
            layer.cumulative_length.add_(count)
            if hasattr(layer, "cumulative_length_int"):
                layer.cumulative_length_int += count

    @staticmethod
    def _length_of(layer: Any) -> tuple[Tensor, int | None]:
        return layer.cumulative_length.clone(), getattr(layer, "cumulative_length_int", None)

    def _rewind(self) -> None:
        """Forget what was decoded: the next token comes after the context again."""
        for layer, (length, window) in zip(self._layers, self._lengths, strict=True):
            layer.cumulative_length.copy_(length)
            if window is not None:
                layer.cumulative_length_int = window


@torch.no_grad()
def decode_rates(
    models: Mapping[str, Any],
    config: PreTrainedConfig,
    prompt: Tensor,
    tokens: int = 32,
    rounds: int = 3,
    progress: Progress = lambda name: None,
) -> dict[str, Decoded]:
    """Greedy decode of ``tokens`` tokens after ``prompt``, each model once in every round.

    The cache is static. Prefill and a first round of all are not timed: they compile.

    Args:
        models: name to causal language model; each is called with a static cache. A dense one
            must not share its weights: popc changes the strides of those that it compiles.
        config: the transformers config of the models.
        prompt: int64 ``[B, T]``; rates count B tokens for each step.
        progress: called with a model's name before each of its ``rounds + 1`` turns.
    """
    forwards = {name: getattr(model, "forward", model) for name, model in models.items()}
    contexts: dict[str, Context] = {}
    decoded: dict[str, Tensor] = {}
    for name, forward in forwards.items():
        progress(name)
        contexts[name] = Context(config, prompt, tokens, forward)
        _, later = contexts[name].decode(forward, tokens)
        decoded[name] = torch.cat((contexts[name].first, later[:, :-1]), dim=1)
    turns = {
        name: lambda context=contexts[name], forward=forward: context.decode(forward, tokens)[0]
        for name, forward in forwards.items()
    }
    steps = prompt.shape[0] * tokens
    return {
        name: Decoded(Spread.of(seconds).rate(steps), decoded[name])
        for name, seconds in interleaved(turns, rounds, progress).items()
    }


def interleaved(
    turns: Mapping[str, Callable[[], float]], rounds: int, progress: Progress
) -> dict[str, list[float]]:
    """What each turn gives in every round; every second round goes the other way.

    So no turn always comes after the same other one, or early in a round.
    """
    results: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds):
        for name in list(turns)[:: -1 if number % 2 else 1]:
            progress(name)
            results[name].append(turns[name]())
    return results


class Stopwatch:
    """Seconds in ``timed`` calls, less those in ``untimed`` ones, which may be inside of them."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, call: Callable[..., Any], sign: int = 1) -> Callable[..., Any]:
        """``call`` with its seconds added, times ``sign``, also where it raises."""

        @functools.wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += sign * (time.perf_counter() - start)

        return run

    def untimed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call`` with its seconds taken off: for what is called within a timed one."""
        return self.timed(call, -1)


def wait(device: torch.device) -> None:
    """Until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""Decode rates, side by side in one run: rounds are interleaved, medians with their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rate:
    """Tokens per second: median, lowest and highest of the rounds."""

    median: float
    low: float
    high: float


@torch.no_grad()
def decode_rates(
    models: Mapping[str, Any],
    prompt: Tensor,
    tokens: int = 32,
    rounds: int = 3,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Rate]:
    """Greedy decode of ``tokens`` tokens after ``prompt``, each model once in every round.

    Prefill, compilation and a warm-up decode are not timed.

    Args:
        models: name to causal language model; each is called with ``past_key_values``.
        prompt: int64 ``[B, T]``; rates count B tokens for each step.
        progress: called ``len(models) * (rounds + 1)`` times.
    """
    rates: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            seconds = _decode(model, prompt, tokens)
            if number:  # the first round compiles
                rates[name].append(prompt.shape[0] * tokens / seconds)
            progress()
    return {name: Rate(statistics.median(r), min(r), max(r)) for name, r in rates.items()}


def _decode(model: Any, prompt: Tensor, tokens: int) -> float:
    """Seconds for ``tokens`` decode steps."""
    out = model(prompt, use_cache=True)
    for _ in range(3):
        out = _step(model, out)
    _wait(prompt.device)
    start = time.perf_counter()
    for _ in range(tokens):
        out = _step(model, out)
    _wait(prompt.device)
    return time.perf_counter() - start


def _step(model: Any, out: Any) -> Any:
    ids = out.logits[:, -1:].argmax(-1)
    return model(ids, past_key_values=out.past_key_values, use_cache=True)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

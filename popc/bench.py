"""Decode rates, side by side in one run: rounds are interleaved, medians with their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from popc.models import cache_keyword


@dataclass(frozen=True)
class Rate:
    """Tokens per second: median, lowest and highest of the rounds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Decoded:
    """What :func:`decode_rates` measured of one model, and the tokens it decoded, ``[B, N]``."""

    rate: Rate
    tokens: Tensor


@torch.no_grad()
def decode_rates(
    models: Mapping[str, Any],
    config: Any,
    prompt: Tensor,
    tokens: int = 32,
    rounds: int = 3,
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, Decoded]:
    """Greedy decode of ``tokens`` tokens after ``prompt``, each model once in every round.

    The cache is static. Prefill, the first decoded token and a first round of all are not timed:
    they compile.

    Args:
        models: name to causal language model; each is called with a static cache.
        config: the transformers config of the models.
        prompt: int64 ``[B, T]``; rates count B tokens for each step.
        progress: called with a model's name before each of its ``rounds + 1`` turns.
    """
    rates: dict[str, list[float]] = {name: [] for name in models}
    decoded: dict[str, Tensor] = {}
    for number in range(rounds + 1):
        for name, model in models.items():
            progress(name)
            seconds, decoded[name] = _decode(model, config, prompt, tokens)
            if number:
                rates[name].append(prompt.shape[0] * (tokens - 2) / seconds)
    return {
        name: Decoded(Rate(statistics.median(r), min(r), max(r)), decoded[name])
        for name, r in rates.items()
    }


def _decode(model: Any, config: Any, prompt: Tensor, tokens: int) -> tuple[float, Tensor]:
    """Seconds for all but the first two of ``tokens`` greedy tokens, and the tokens."""
    forward = getattr(model, "forward", model)
    cache = StaticCache(config=config, max_cache_len=prompt.shape[1] + tokens)
    keyword = cache_keyword(forward)
    ids, start, out = prompt, 0.0, []
    for step in range(tokens):
        if step == 2:
            _wait(prompt.device)
            start = time.perf_counter()
        logits = model(ids, **{keyword: cache}, use_cache=True).logits
        ids = logits[:, -1:].argmax(-1)
        out.append(ids)
    _wait(prompt.device)
    return time.perf_counter() - start, torch.cat(out, dim=1)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

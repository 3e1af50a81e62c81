"""Quality in real compiled decode: perplexity, and agreement with the dense model."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from popc import sessions
from popc.analysis.plan import Plan
from popc.compat import cache_keyword


@dataclass(frozen=True)
class Quality:
    """What :func:`evaluate` measured.

    Attributes:
        perplexity, dense_perplexity: over all continuation tokens; no unit.
        agreement: share of positions where both models' most likely token is the same.
        read: share of the weight bytes of all linears but the last that a decode step read, as
            counted if ``compiled`` counts, else as planned; None without a plan.
        windows, prompt, continuation: how much text, in tokens for the last two.
    """

    perplexity: float
    dense_perplexity: float
    agreement: float
    read: float | None
    windows: int
    prompt: int
    continuation: int


@torch.no_grad()
def evaluate(
    model: Any,
    compiled: Any,
    windows: Tensor,
    prompt: int = 256,
    progress: Callable[[], None] = lambda: None,
    plan: Plan | None = None,
) -> Quality:
    """Teacher-forced: ``prompt`` tokens prefilled, each later one decoded on its own.

    Args:
        model: the dense causal language model.
        compiled: the model to judge, as from :func:`popc.compile`.
        windows: int64 ``[count, length]``, ``length > prompt``.
        progress: called after each window.
        plan: of the model, as from :func:`popc.analyze`.
    """
    loss = dense_loss = 0.0
    same = 0
    reads: dict[Hashable, list[float]] = {}
    for window in windows:
        ids = window[None]
        expected = window[prompt:]
        dense = model(ids, use_cache=False).logits[0, prompt - 1 : -1].float()
        logits, session = decode_logits(compiled, window, prompt)
        loss += float(cross_entropy(logits, expected, reduction="sum"))
        dense_loss += float(cross_entropy(dense, expected, reduction="sum"))
        same += int((logits.argmax(-1) == dense.argmax(-1)).sum())
        for key, steps in session.inputs.reads.items() if session is not None else ():
            reads.setdefault(key, []).extend(steps)
        progress()
    read = None
    if plan is not None:
        read = plan.read_share(compiled.popc_config, reads, pruned=compiled.popc_plan)
    continuation = windows.shape[1] - prompt
    tokens = windows.shape[0] * continuation
    return Quality(
        math.exp(loss / tokens),
        math.exp(dense_loss / tokens),
        same / tokens,
        read,
        windows.shape[0],
        prompt,
        continuation,
    )


@torch.no_grad()
def decode_logits(
    compiled: Any, window: Tensor, prompt: int
) -> tuple[Tensor, sessions.Session | None]:
    """Logits of a window's tokens after the prompt, decoded one by one, and popc's session.

    Args:
        compiled: as from :func:`popc.compile`.
        window: int64 ``[T]``; ``prompt`` tokens of it are prefilled, ``1 <= prompt < T``.

    Returns:
        float32 ``[T - prompt, V]``: row i predicts token ``prompt + i``.
    """
    ids = window[None]
    cache = {cache_keyword(getattr(compiled, "forward", compiled)): DynamicCache()}
    out = compiled(ids[:, :prompt], **cache, use_cache=True)
    rows = [out.logits[0, -1]]
    for at in range(prompt, len(window) - 1):
        out = compiled(ids[:, at : at + 1], **cache, use_cache=True)
        rows.append(out.logits[0, -1])
    return torch.stack(rows).float(), sessions.of_cache(next(iter(cache.values())))

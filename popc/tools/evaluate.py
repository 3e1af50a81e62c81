"""Quality in real compiled decode: perplexity, and agreement with the dense model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from popc import sessions
from popc.analysis.plan import Plan
from popc.api import analyze, compile
from popc.compat import cache_keyword
from popc.compiled_model import dense as without_popc
from popc.config import CallBudget, Config
from popc.planning.budget_solver import resolve


@dataclass(frozen=True)
class Quality:
    """What :func:`evaluate` measured.

    Attributes:
        perplexity, dense_perplexity: over all continuation tokens; no unit.
        agreement: share of positions where both models' most likely token is the same.
        read: share of the weight bytes of all linears but the last that a decode step read, as
            counted if ``compiled`` counts, else as planned; None without a plan.
        windows, prompt, continuation: how much text, in tokens for the last two.
        read_bits: the same as ``read``, in bits of each weight, scales included.
    """

    perplexity: float
    dense_perplexity: float
    agreement: float
    read: float | None
    windows: int
    prompt: int
    continuation: int
    read_bits: float | None = None


@dataclass
class Tally:
    """Sums over windows at one budget, and what its steps read.

    Attributes:
        budget: of the steps; None: the compiled model's own.
    """

    budget: CallBudget | None
    loss: float = 0.0
    same: int = 0
    reads: dict[Hashable, list[float]] = field(default_factory=dict)

    def add(self, session: sessions.Session | None) -> None:
        """The reads of one window."""
        for key, steps in session.inputs.reads.items() if session is not None else ():
            self.reads.setdefault(key, []).extend(steps)

    def shares(self, compiled: Any, plan: Plan) -> tuple[float, float]:
        """Of the bytes, and in bits: see :class:`Quality`."""
        config: Config = compiled.popc_config
        config = config if self.budget is None else config.at(self.budget)
        config = resolve(config, sum(p.numel() for p in compiled.parameters()), plan)
        given = config, self.reads, compiled.popc_plan
        return plan.read_share(*given), plan.read_bits(*given)


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
        plan: of the weights that ``compiled`` reads, as from :func:`popc.analyze`: of ``model``,
            or of ``compiled``, once it was called, where its weights are quantised.
    """
    (quality,) = evaluate_budgets(model, compiled, windows, (None,), prompt, progress, plan)
    return quality


@torch.no_grad()
def evaluate_budgets(
    model: Any,
    compiled: Any,
    windows: Tensor,
    budgets: Sequence[CallBudget | None],
    prompt: int = 256,
    progress: Callable[[], None] = lambda: None,
    plan: Plan | None = None,
) -> list[Quality]:
    """:func:`evaluate` at each of ``budgets``, through one compiled model.

    Args:
        budgets: None is the compiled model's own. ``progress`` is called after each of them in
            each window.

    Raises:
        ConfigError: what is targeted is too little to meet a budget, or calls can't have budgets.
    """
    dense_loss = 0.0
    tallies = [Tally(budget) for budget in budgets]
    for window in windows:
        expected = window[prompt:]
        dense = model(window[None], use_cache=False).logits[0, prompt - 1 : -1].float()
        dense_loss += float(cross_entropy(dense, expected, reduction="sum"))
        for tally in tallies:
            with _within(compiled, tally.budget):
                logits, session = decode_logits(compiled, window, prompt)
            tally.loss += float(cross_entropy(logits, expected, reduction="sum"))
            tally.same += int((logits.argmax(-1) == dense.argmax(-1)).sum())
            tally.add(session)
            progress()
    count, continuation = windows.shape[0], windows.shape[1] - prompt
    tokens = count * continuation
    qualities = []
    for tally in tallies:
        read, bits = (None, None) if plan is None else tally.shares(compiled, plan)
        scores = math.exp(tally.loss / tokens), math.exp(dense_loss / tokens), tally.same / tokens
        qualities.append(Quality(*scores, read, count, prompt, continuation, bits))
    return qualities


def _within(compiled: Any, budget: CallBudget | None) -> AbstractContextManager[Any]:
    if budget is None:
        return nullcontext()
    given = {name: value for name, value in vars(budget).items() if value is not None}
    context: AbstractContextManager[Any] = compiled.budget(**given)
    return context


@torch.no_grad()
def count_bits(compiled: Any, prompt: Tensor, answer: Tensor, bits: float | None = None) -> float:
    """Bits of each weight, scales included, that decode steps of ``answer`` read, as counted.

    Counting takes time, so another model counts: made of the same weights, without Inductor.

    Args:
        compiled: as from :func:`popc.compile`; it has run.
        prompt, answer: int64 ``[T]``, ``[N]``, ``N >= 2``.
        bits: the steps' budget; None: the compiled model's own.
    """
    config: Config = compiled.popc_config
    counting = dataclasses.replace(config, count=True, codegen="eager")
    counter: Any = compile(without_popc(compiled), counting)
    tally = Tally(None if bits is None else CallBudget(bits=bits))
    with _within(counter, tally.budget):
        tally.add(decode_logits(counter, torch.cat((prompt, answer)), len(prompt))[1])
    return tally.shares(counter, analyze(counter))[1]


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

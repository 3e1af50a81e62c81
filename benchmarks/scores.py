"""Quality on windows of text, counted in the same way for every engine.

The first tokens of a window are the prompt. Counted is each token after it, predicted from all
tokens before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class Scores:
    """Of each counted token.

    Attributes:
        losses: float32 ``[W, N]``, in nats.
        top: int64 ``[W, N]``, the token that was most likely there.
    """

    losses: Tensor
    top: Tensor

    @classmethod
    def of(cls, windows: Tensor, prompt: int, logits_of: Callable[[Tensor, int], Tensor]) -> Scores:
        """Those of a model.

        Args:
            windows: int64 ``[W, prompt + N]``.
            logits_of: called with a window ``[prompt + N]`` and ``prompt``; gives the logits
                ``[N, V]`` of the counted tokens, those from which each is predicted.
        """
        rows = [_score(logits_of(window, prompt), window[prompt:]) for window in windows]
        losses, top = zip(*rows, strict=True)
        return cls(torch.stack(losses), torch.stack(top))

    @property
    def perplexity(self) -> float:
        """Over all counted tokens."""
        return math.exp(self.losses.double().mean())

    def agreement(self, other: Scores) -> float:
        """The share of counted tokens where both have the same most likely one."""
        return float((self.top == other.top).double().mean())


def _score(logits: Tensor, expected: Tensor) -> Sequence[Tensor]:
    return cross_entropy(logits.float(), expected, reduction="none"), logits.argmax(-1)

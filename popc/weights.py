"""Weights that change under a compiled model, as by ``load_state_dict`` or a merged LoRA.

Norms are taken once; a change is told by a few values of each weight, looked at with each prompt.
PyTorch's own version counters don't see what is written through ``.data``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_VALUES = 32  # of each weight
_changes = 0


def sample(weights: Sequence[Tensor]) -> Tensor:
    """Float64: values from all over each weight, whatever its layout."""
    parts = []
    for weight in weights:
        # Along the storage: of a dense weight in any layout that is all of it.
        stored = weight.untyped_storage().nbytes() // weight.element_size()
        length = min(weight.numel(), stored - weight.storage_offset())
        size, step = min(_VALUES, length), max(1, length // _VALUES)
        held = weight.detach().as_strided((size,), (step,), weight.storage_offset())
        parts.append(held.double())
    return torch.cat(parts)


def changes() -> int:
    """How often a change was noted so far; whoever holds norms asks if it still is the same."""
    return _changes


def note_change() -> None:
    """All norms are taken anew."""
    global _changes
    _changes += 1

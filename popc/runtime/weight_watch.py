"""Weights that change under a compiled model, as by ``load_state_dict`` or a merged LoRA.

Norms are computed once; at each prompt a sample of each weight's values shows whether it changed.
PyTorch's own version counters don't see what is written through ``.data``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_VALUES = 32  # of each weight
_changes = 0
_changed: dict[int, int] = {}  # the identity of a weight, and the number of its last change
_lock = threading.Lock()


def sample(weights: Sequence[Tensor]) -> Tensor:
    """Float64: values from all over each weight, whatever its layout."""
    parts = []
    for weight in weights:
        # Along the storage: of a dense weight in any layout that is all of it.
        stored = weight.untyped_storage().nbytes() // weight.element_size()
        length = min(weight.numel(), stored - weight.storage_offset())
        size, step = min(_VALUES, length), max(1, length // _VALUES)
        values = weight.detach().as_strided((size,), (step,), weight.storage_offset())
        parts.append(values.double())
    return torch.cat(parts)


def changes() -> int:
    """How many changes were noted so far: while it stays the same, so do all norms."""
    return _changes


def note_change(identities: Iterable[int]) -> None:
    """Norms of these weights, by :func:`popc.analysis.capture.identity`, are to be taken anew."""
    global _changes
    with _lock:
        _changed.update(dict.fromkeys(identities, _changes + 1))
        _changes += 1


def have_changed(identities: Iterable[int], since: int) -> bool:
    """Whether one of these weights changed after the change of that number."""
    return any(_changed.get(identity, 0) > since for identity in identities)

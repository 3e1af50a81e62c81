"""What weights take in memory, in every format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from torch import Tensor, nn


@dataclass(frozen=True)
class Stored:
    """What a model's linears take, scales counted.

    Attributes:
        layers, head: bytes of the layers' linears, and of the last linear.
        weights: how many values the layers' linears have.
    """

    layers: int
    head: int
    weights: int

    @property
    def bits(self) -> float:
        """Bits per weight of the layers' linears."""
        return 8 * self.layers / self.weights


def stored_of(model: Any) -> Stored:
    """That of a transformers model's linears; quantised weights count as they are stored."""
    head = model.get_output_embeddings()
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    layers = [linear.weight for linear in linears if linear is not head]
    return Stored(
        layers=sum(map(tensor_bytes, layers)),
        head=tensor_bytes(head.weight),
        weights=sum(weight.numel() for weight in layers),
    )


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor; of a wrapper, those of the tensors within."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(tensor_bytes(getattr(tensor, name)) for name in names)


def stored_in(path: Path) -> Stored:
    """That of the linears in a GGUF file."""
    matrices = {t.name: t for t in gguf.GGUFReader(path).tensors if len(t.shape) > 1}
    # Without a matrix of its own, the last linear is the embeddings.
    head = matrices.get("output.weight", matrices["token_embd.weight"])
    layers = [tensor for name, tensor in matrices.items() if name.startswith("blk.")]
    return Stored(
        layers=sum(int(tensor.n_bytes) for tensor in layers),
        head=int(head.n_bytes),
        weights=sum(int(tensor.n_elements) for tensor in layers),
    )

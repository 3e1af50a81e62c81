"""Quantised weights: as tensors that a model can hold."""

from __future__ import annotations

from popc.quant.tensor import QuantizedTensor

__all__ = ["QuantizedTensor"]

"""Quantised weights: as tensors that a model can hold."""

from __future__ import annotations

from popc.quant import torchao
from popc.quant.freed import FreedWeight
from popc.quant.tensor import QuantizedTensor, Stored, dequantized, read

__all__ = ["FreedWeight", "QuantizedTensor", "Stored", "dequantized", "read", "torchao"]

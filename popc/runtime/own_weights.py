"""Quantised weights of a compiled model, in the place of those of the model that it is made of."""

from __future__ import annotations

import torch
from torch import nn

from popc.log import logger
from popc.quant import FreedWeight, torchao
from popc.runtime.mirror import Mirror


class OwnWeights:
    """Gives the modules of ``mirror`` weights of their own.

    Args:
        inplace: the original loses what is replaced, and its memory is freed.
    """

    def __init__(self, mirror: Mirror, inplace: bool) -> None:
        self._mirror, self._inplace = mirror, inplace

    def replace(self, parameter: torch.Tensor, other: torch.Tensor) -> bool:
        """Put ``other`` in the place of a parameter; False if no module has it."""
        if not self._mirror.replace_parameter(parameter, other):
            return False
        if self._inplace:
            self._mirror.free_parameter(parameter, FreedWeight.of(parameter))
        return True

    def convert(self) -> None:
        """Store what torchao has quantised as popc reads it; what it can't is left as it is."""
        for module in list(self._mirror.root.modules()):
            row_dim = 0 if isinstance(module, nn.Embedding) else 1
            for parameter in list(module.parameters(recurse=False)):
                if not torchao.is_quantized(parameter):
                    continue
                weight = torchao.convert(parameter, row_dim)
                if isinstance(weight, str):
                    logger.info("%s left as it is: %s", type(parameter).__name__, weight)
                else:
                    self.replace(parameter, nn.Parameter(weight, requires_grad=False))

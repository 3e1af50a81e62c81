"""Quantised weights among the inputs of a graph: popc's graphs take the tensors that they hold.

Dynamo's graph has an input for each :class:`popc.quant.QuantizedTensor`. The graph that popc makes
of it has in its place an input for the packed planes, and after all others, where a weight has
them, inputs for its scales and zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from popc.quant import QuantizedTensor, read


@dataclass(frozen=True)
class Unwrapping:
    """Which inputs of a Dynamo graph are quantised weights.

    Attributes:
        weights: their positions.
        apart: positions of those with scales, or zeros, of their own; with the attribute's name.
    """

    weights: tuple[int, ...] = ()
    apart: tuple[tuple[int, str], ...] = ()

    @classmethod
    def of(cls, args: Sequence[Any]) -> Unwrapping:
        """For calls like one with ``args``."""
        weights = [i for i, value in enumerate(args) if isinstance(value, QuantizedTensor)]
        names = ((i, name) for i in weights for name in ("scale", "zero"))
        return cls(tuple(weights), tuple(p for p in names if getattr(args[p[0]], p[1]) is not None))

    def __bool__(self) -> bool:
        return bool(self.weights)

    def with_weights(self, positions: Iterable[int]) -> Unwrapping:
        """With more weights, whose rows hold their scales."""
        return Unwrapping(tuple(sorted({*self.weights, *positions})), self.apart)

    def __call__(self, args: Sequence[Any]) -> Sequence[Any]:
        """``args`` as popc's graph takes them."""
        if not self.weights:
            return args
        plain = list(args)
        for i in self.weights:
            plain[i] = args[i].packed
        plain += [getattr(args[i], name) for i, name in self.apart]
        return plain

    def dequantized(self, args: Sequence[Any]) -> list[Any]:
        """``args`` with plain weights."""
        weights = set(self.weights)
        return [arg.dequantize() if i in weights else arg for i, arg in enumerate(args)]

    def within_trace(self, like: Sequence[Any], plain: Sequence[Any]) -> Iterator[Any]:
        """What a program that Dynamo gave takes, made of what popc's graph takes.

        Args:
            like: what calls bring.
        """
        others = iter(plain[len(like) :])
        apart = {place: next(others) for place in self.apart}
        for i, (value, arg) in enumerate(zip(plain, like, strict=False)):
            if isinstance(arg, QuantizedTensor):
                scale, zero = (apart.get((i, name)) for name in ("scale", "zero"))
                yield read(arg.stored, value, scale, zero)
            else:
                yield value

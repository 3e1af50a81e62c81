"""What code depends on of a value: dtype, device, shape and strides, not what it holds.

Layers that each have a cache of their own, of one length, have sizes of their own names for that:
those of one value are told apart here by their order alone. Whether they correspond from value to
value is :class:`Correspondence`'s to tell.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch

from popc.compat import pytree

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def value_kind(value: Any) -> Hashable:
    """The same for values that one code may serve, whatever their symbols are called."""
    if isinstance(value, tuple | list):
        return tuple(map(value_kind, value))
    sizes = list(_sizes(value))
    numbers: dict[sympy.Symbol, sympy.Symbol] = {}
    for size in sizes:
        for symbol in sorted(size.free_symbols, key=str):
            numbers.setdefault(symbol, sympy.Symbol(f"size{len(numbers)}"))
    layout = tuple(str(size.xreplace(numbers)) for size in sizes)
    if isinstance(value, torch.Tensor):
        return value.dtype, str(value.device), value.dim(), layout, value.requires_grad
    return type(value), layout or str(value)


def symbols_of(value: Any) -> set[sympy.Symbol]:
    """All symbols in a value's sizes."""
    return {s for leaf in pytree.tree_leaves(value) for e in _sizes(leaf) for s in e.free_symbols}


def told_by(value: Any) -> set[sympy.Symbol]:
    """The symbols that code finds in an input of this value: its sizes, or what it is.

    A number that is known to equal another has two symbols: code binds the first, and uses the
    second. So it tells neither.
    """
    if isinstance(value, torch.Tensor):
        return {size for size in map(_expr, value.shape) if isinstance(size, sympy.Symbol)}
    expr = _expr(value) if isinstance(value, SYMBOLIC) else None
    if not isinstance(expr, sympy.Symbol):
        return set()
    equal = value.node.shape_env.replacements.values()
    return set() if any(expr in other.free_symbols for other in equal) else {expr}


class Correspondence:
    """Which symbols of one layer stand for which of another."""

    def __init__(self) -> None:
        self.symbols: dict[sympy.Symbol, sympy.Symbol] = {}

    def extend(self, one: Any, other: Any) -> bool:
        """Whether ``other`` is what ``one`` is, in its own symbols; new ones are noted."""
        leaves = zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)
        pairs = [pair for a, b in leaves for pair in zip(_sizes(a), _sizes(b), strict=True)]
        for mine, its in pairs:
            if isinstance(mine, sympy.Symbol) and isinstance(its, sympy.Symbol):
                self.symbols.setdefault(mine, its)
        return all(self.of(mine) == its for mine, its in pairs)

    def of(self, expr: sympy.Expr) -> sympy.Expr:
        """``expr`` in the other layer's symbols."""
        return expr.xreplace(self.symbols)


def _sizes(value: Any) -> Iterator[sympy.Expr]:
    if isinstance(value, torch.Tensor):
        yield from map(_expr, (*value.shape, *value.stride(), value.storage_offset()))
    elif isinstance(value, SYMBOLIC):
        yield _expr(value)


def _expr(size: Any) -> sympy.Expr:
    return size.node.expr if isinstance(size, SYMBOLIC) else sympy.sympify(size)

"""What a source file names of torch that torch marks as private, by a leading underscore."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

_PRIVATE = re.compile(r"_[a-zA-Z]\w*")


def of_torch(path: Path) -> set[str]:
    """Dotted names that are imported, or written out from ``torch`` on.

    Not ops: ``torch.ops.aten._softmax`` is what a graph holds.
    """
    names = {name for name in _imported(path) if name.split(".")[0] == "torch"}
    names |= {name for name in _chains(path) if name.split(".")[0] == "torch"}
    return {name for name in names if _is_private(name) and not name.startswith("torch.ops.")}


def of_objects(path: Path) -> set[str]:
    """Attributes that are read or set on anything but ``self``, ``cls`` and modules of torch, and
    strings that may name one: the last part alone."""
    tree = _parsed(path)
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    of_self = {node.attr for node in nodes if _root(node) in ("self", "cls")}
    attributes = {node.attr for node in nodes if _root(node) != "torch"}
    strings = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    return {name for name in (attributes | strings) - of_self if _PRIVATE.fullmatch(name)}


def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _is_private(name: str) -> bool:
    return any(map(_PRIVATE.fullmatch, name.split(".")))


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(_parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _chains(path: Path) -> Iterator[str]:
    """``a.b.c`` as a whole, not its beginnings."""
    tree = _parsed(path)
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            parts: list[str] = []
            value: ast.expr = node
            while isinstance(value, ast.Attribute):
                parts.append(value.attr)
                value = value.value
            if isinstance(value, ast.Name):
                yield ".".join([value.id, *reversed(parts)])


def _root(node: ast.expr) -> str | None:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None

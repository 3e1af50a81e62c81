"""The version, in a file that packaging can read without importing torch, and what tells builds
of one version apart."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

__version__ = "0.2.0"

_SOURCES = (".py", ".h", ".cpp")


@functools.cache
def sources_digest() -> str:
    """A hash of popc's own sources: what code that popc had generated is still right for.

    A version alone does not tell: sources change many times before the next one.
    """
    return _digest(Path(__file__).parent)


def _digest(folder: Path) -> str:
    """A hash of the names and the contents of all sources in ``folder`` and below."""
    total = hashlib.sha256(__version__.encode())
    for path in sorted(p for p in folder.rglob("*") if p.suffix in _SOURCES):
        content = path.read_bytes()
        name = path.relative_to(folder).as_posix()
        # With the lengths, so that no name can run over into another file's content.
        total.update(f"{len(name)} {name} {len(content)} ".encode() + content)
    return total.hexdigest()[:32]

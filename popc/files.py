"""Files that are whole or not there."""

from __future__ import annotations

from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write UTF-8, or leave what was there.

    Raises:
        OSError: it can't be written.
    """
    staging = path.with_suffix(path.suffix + ".part")
    staging.write_text(text, encoding="utf-8")
    staging.replace(path)

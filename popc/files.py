"""Files that are whole or not there, and names for what was made of a file."""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write UTF-8, or leave what was there.

    Several processes may write the same file at once: one of them is the last, and its text is
    there from beginning to end.

    Raises:
        OSError: it can't be written.
    """
    # In the same folder, as a file system can only replace a file by one of its own; and opened
    # here, not by tempfile, which would make it unreadable for others than its owner.
    staging = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with staging.open("x", encoding="utf-8") as file:
            file.write(text)
        os.replace(staging, path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


def key_of(path: Path) -> str:
    """What files made of ``path`` are kept under: its name, and a hash of which file it is now.

    Two files of the same name in different folders have different keys, and so have a file and
    another that took its place: the hash is of the path, the size and the time of the last change.

    Raises:
        OSError: there is no such file.
    """
    real = path.resolve(strict=True)
    stat = real.stat()
    which = f"{real}\0{stat.st_size}\0{stat.st_mtime_ns}"
    return f"{path.stem}-{hashlib.sha256(which.encode()).hexdigest()[:16]}"

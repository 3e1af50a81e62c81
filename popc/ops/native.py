"""Builds and loads the CPU kernels, C++ in ``popc/ops/cpu``, when they are first needed.

The build is Inductor's: its compiler, its flags for this machine's vector instructions, its cache
folder and lock. It takes about a minute, once; later processes load it from the cache. Where
it fails, the ATen reference runs instead, after a warning.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from popc import compat
from popc.files import write_whole
from popc.log import logger
from popc.ops import measure, planes

FOLDER = Path(__file__).parent / "cpu"
_INCLUDE = re.compile(r'#include "(\w+\.h)"\n')
# Shared with C++, in the namespace popc::constants.
_CONSTANTS = {
    "steady": measure.STEADY,
    "doubt": measure.DOUBT,
    "shift": measure.SHIFT,
    "bins": measure.BINS,
    "sample": measure.SAMPLE,
    "spread": measure.SPREAD,
    "block": planes.BLOCK,
    "midpoint": planes.MIDPOINT,
    "zero": planes.ZERO[2],
    "plane_zero": planes.ZERO[1],
    "plane_group_zero": planes.GROUP_ZERO[1],
    "clips": planes.CLIPS,
}


def constants() -> str:
    """The text of ``constants.h``, which is generated."""
    types = {int: "int64_t {}", float: "double {}", tuple: "double {}[]"}
    lines = []
    for name, value in _CONSTANTS.items():
        text = repr(value)
        if isinstance(value, tuple):
            text = "{" + text.strip("(,)") + "}"
        lines.append(f"constexpr {types[type(value)].format(name)} = {text};")
    body = "\n".join(lines)
    return f"#pragma once\n#include <cstdint>\nnamespace popc::constants {{\n{body}\n}}\n"


def units() -> list[str]:
    """The names of the translation units, each of which compiles alone."""
    return sorted(path.name for path in FOLDER.glob("*.cpp"))


def source(names: Sequence[str] | None = None) -> str:
    """The text of ``units()`` as one unit, with each of popc's headers once, before its first use.

    One, as PyTorch's headers take seconds to compile in each unit. Every unit has a namespace of
    its own, so they may come in any order.
    """
    seen: set[str] = set()

    def with_headers(text: str) -> str:
        return _INCLUDE.sub(lambda match: header(match[1]), text)

    def header(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = constants() if name == "constants.h" else _read(name)
        return with_headers(text.replace("#pragma once\n", ""))

    return "\n".join(with_headers(_read(name)) for name in names or units())


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


@functools.cache
def load() -> bool:
    """Build the kernels, or load them from the cache, and register them; False if that fails.

    Runs once in a process: later calls return the same answer.
    """
    text = source()
    try:
        record = Path(compat.inductor_cache()) / f"popc-{_digest(text.encode())}.json"
        _discard_if_damaged(record)
        built = compat.load_cpp(text)
    except Exception as error:
        reason = str(error).strip().splitlines()
        warnings.warn(
            "popc's CPU kernels could not be built, so its ops run as plain ATen: correct, but "
            f"slower. {reason[0] if reason else type(error).__name__}",
            stacklevel=2,
        )
        logger.debug("kernel build failed: %s", error)
        return False
    with contextlib.suppress(OSError):  # without it, damage is not noticed
        write_whole(record, json.dumps([built, _digest(Path(built).read_bytes())]))
    return True


def _discard_if_damaged(record: Path) -> None:
    """Remove a library whose digest is not the recorded one: loading it could crash the process.

    Anything may have written the record, so only a library in the record's own folder, Inductor's
    cache, is ever removed; any other record is ignored.
    """
    try:
        path, digest = json.loads(record.read_text(encoding="utf-8"))
        library = Path(path).resolve(strict=True)
        ours = library.is_relative_to(record.parent.resolve(strict=True))
        if not ours or not library.is_file() or _digest(library.read_bytes()) == digest:
            return
    except (OSError, ValueError, TypeError, RuntimeError):  # RuntimeError: a symlink loop
        return
    logger.warning("%s is damaged: it is built anew", path)
    library.unlink(missing_ok=True)  # another process may have removed it


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]

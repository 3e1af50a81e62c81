"""The CPU kernels: C++ in ``popc/ops/cpu``, built when they are first needed.

The build is Inductor's own: its compiler, its flags for this machine's vector instructions, its
cache folder and lock. It takes about half a minute once, and is found in the cache from then on.
Where it fails, the plain ATen reference serves, after a warning.
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
from popc.ops import measure

FOLDER = Path(__file__).parent / "cpu"
_OWN = re.compile(r'#include "(\w+\.h)"\n')
# What C++ must know as Python has it, in the namespace popc::constants.
_CONSTANTS = {
    "steady": measure.STEADY,
    "doubt": measure.DOUBT,
    "shift": measure.SHIFT,
    "bins": measure.BINS,
    "sample": measure.SAMPLE,
    "spread": measure.SPREAD,
}


def constants() -> str:
    """The text of ``constants.h``, which is in no file."""
    types = {int: "int64_t", float: "double"}
    lines = [f"constexpr {types[type(v)]} {name} = {v!r};" for name, v in _CONSTANTS.items()]
    body = "\n".join(lines)
    return f"#pragma once\n#include <cstdint>\nnamespace popc::constants {{\n{body}\n}}\n"


def units() -> list[str]:
    """The files that are translation units of their own, in any order."""
    return sorted(path.name for path in FOLDER.glob("*.cpp"))


def source(names: Sequence[str] | None = None) -> str:
    """The text of ``units()`` as one unit, with each header of popc's once, before its first use.

    One, as every unit takes Inductor's compiler seconds to read PyTorch's headers. Each file has a
    namespace of its own, so they may come in any order.
    """
    seen: set[str] = set()

    def with_headers(text: str) -> str:
        return _OWN.sub(lambda found: header(found[1]), text)

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
    """Build the kernels, or find them built, and register them; False if that fails.

    Once in a process: a second call answers as the first did.
    """
    text = source()
    try:
        record = Path(compat.inductor_cache()) / f"popc-{_digest(text.encode())}.json"
        _discard_if_damaged(record)
        built = compat.load_cpp(text)
    except Exception as error:
        reason = str(error).strip().splitlines()
        warnings.warn(
            "popc's CPU kernels could not be built, so gathers run as plain ATen: right, but "
            f"slower. {reason[0] if reason else type(error).__name__}",
            stacklevel=2,
        )
        logger.debug("kernel build failed: %s", error)
        return False
    with contextlib.suppress(OSError):  # then a damaged library is not noticed
        write_whole(record, json.dumps([built, _digest(Path(built).read_bytes())]))
    return True


def _discard_if_damaged(record: Path) -> None:
    """Remove a library that is not as it was built: loading half of one ends the process.

    A record is a file that anything may have written, so of what it names only a library inside
    the folder of the record, Inductor's cache, is ever removed; any other record is ignored.
    """
    try:
        path, digest = json.loads(record.read_text(encoding="utf-8"))
        library = Path(path).resolve(strict=True)
        ours = library.is_relative_to(record.parent.resolve(strict=True))
        if not ours or not library.is_file() or _digest(library.read_bytes()) == digest:
            return
    except (OSError, ValueError, TypeError, RuntimeError):  # RuntimeError: a loop of symlinks
        return
    logger.warning("%s is damaged: it is built anew", path)
    library.unlink(missing_ok=True)  # another process may have seen it too


def _digest(held: bytes) -> str:
    return hashlib.sha256(held).hexdigest()[:32]

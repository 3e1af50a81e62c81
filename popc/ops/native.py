"""The CPU kernels: C++ in ``popc/ops/cpu``, built when they are first needed.

The build is Inductor's own: its compiler, its flags for this machine's vector instructions, its
cache folder and lock. It takes about half a minute once, and is found in the cache from then on.
Where it fails, the plain ATen reference serves, after a warning.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

from popc import compat
from popc.log import logger

FOLDER = Path(__file__).parent / "cpu"
_INCLUDE = '#include "kernels.h"\n'


def source() -> str:
    """All of it as one translation unit."""
    names = ("kernels.h", "gather.cpp", "threshold.cpp", "select.cpp", "measure.cpp")
    parts = [(FOLDER / name).read_text(encoding="utf-8") for name in names]
    return "\n".join(parts).replace(_INCLUDE, "")


@functools.cache
def load() -> bool:
    """Build the kernels, or find them built, and register them; False if that fails.

    Once in a process: a second call answers as the first did.
    """
    try:
        compat.load_cpp(source())
    except Exception as error:
        reason = str(error).strip().splitlines()
        warnings.warn(
            "popc's CPU kernels could not be built, so gathers run as plain ATen: right, but "
            f"slower. {reason[0] if reason else type(error).__name__}",
            stacklevel=2,
        )
        logger.debug("kernel build failed: %s", error)
        return False
    return True

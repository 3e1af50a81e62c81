"""Stages of a compilation: run by name, timed, and a failure says where and costs only speed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

from popc import compat
from popc.errors import PassError, PopcError
from popc.log import logger

T = TypeVar("T")


def run_stage(name: str, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """``function(*args, **kwargs)``, the analysis or the pass of that name.

    Raises:
        PassError: it failed in a way that nobody foresaw. The caller leaves the graph dense: passes
            work on a trace of their own, and the graph that Dynamo gave is as it was. Where the
            environment variable ``POPC_RAISE`` is set, as in popc's tests, the error itself.
        PopcError: what the function raises on purpose, as it is.
    """
    begin = time.perf_counter()
    try:
        result = function(*args, **kwargs)
    except Exception as error:
        meant = isinstance(error, PopcError) or compat.is_for_dynamo(error)
        if meant or os.environ.get("POPC_RAISE", "0") != "0":
            raise
        raise PassError(name, error) from error
    logger.debug("%s: %.0f ms", name, 1e3 * (time.perf_counter() - begin))
    return result

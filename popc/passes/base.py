"""What runs a pass: by its name, so that a failure says where, and costs no more than speed."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from popc import compat
from popc.errors import PassError, PopcError

T = TypeVar("T")


def run_pass(name: str, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """``function(*args, **kwargs)``, the analysis or the pass of that name.

    Raises:
        PassError: it failed in a way that nobody foresaw. The caller leaves the graph dense: passes
            work on a trace of their own, and the graph that Dynamo gave is as it was. Where the
            environment variable ``POPC_RAISE`` is set, as in popc's tests, the error itself.
        PopcError: what the function raises on purpose, as it is.
    """
    try:
        return function(*args, **kwargs)
    except Exception as error:
        meant = isinstance(error, PopcError) or compat.is_for_dynamo(error)
        if meant or os.environ.get("POPC_RAISE", "0") != "0":
            raise
        raise PassError(name, error) from error

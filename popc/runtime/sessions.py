"""What :mod:`popc.sessions` was called in popc 0.1: caches that it pickled name this module."""

from __future__ import annotations

import warnings

from popc.sessions import *  # noqa: F403

warnings.warn("popc.runtime.sessions is popc.sessions now", DeprecationWarning, stacklevel=2)

"""popc's own errors. Every message says what was wrong, with which value, and what to do."""

from __future__ import annotations


class PopcError(Exception):
    """Base class of every error that popc raises on purpose."""


class ConfigError(PopcError, ValueError):
    """A field of :class:`popc.Config` has a value that is not allowed."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field, self.value, self.allowed = field, value, allowed
        super().__init__(f"{field}={value!r} is not allowed: {allowed}")


class ModelError(PopcError):
    """A model or its data could not be loaded or is not something popc can compile."""


class GraphError(PopcError):
    """A graph could not be brought to popc's IR, or breaks a pass's contract."""


class PassError(PopcError):
    """A pass failed, by a fault of popc's: the backend leaves the graph dense, with a warning.

    Raised by :func:`popc.stages.run_stage`, and never to the user. With the environment
    variable ``POPC_RAISE=1`` the fault itself is raised to the user in its place.
    """

    def __init__(self, name: str, error: Exception) -> None:
        self.name = name
        lines = str(error).strip().splitlines()
        what = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        super().__init__(f"the pass {name!r} failed: {what}")


class PopcWarning(UserWarning):
    """popc could not do what it was asked to, and does less: the results are right."""

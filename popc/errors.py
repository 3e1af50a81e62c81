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


class PopcWarning(UserWarning):
    """popc runs something dense that it was asked to prune, or does less than it was asked to."""

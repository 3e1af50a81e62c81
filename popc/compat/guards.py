"""What Dynamo guards on and what a frame writes to: where such an object is found.

Seen working on torch 2.11 - 2.13; where a version tells less, more guards are kept.
"""

from __future__ import annotations

import contextlib
import functools
import re
from typing import Any, Literal, NamedTuple

from torch._guards import ChainedSource, Source

_NUMBER = re.compile(r"___\d+\b")  # of names that Dynamo makes up, for each graph anew


class Place(NamedTuple):
    """Where Dynamo finds an object: ``path`` names all that it is reached through, from what
    ``root`` tells on: the function given to :func:`compile_alone`, a global, or what a call brings.
    """

    root: Literal["model", "global", "call"]
    path: tuple[str, ...]

    def within(self, other: Place) -> bool:
        """Whether this is, or is reached through, what is at ``other``."""
        return self.path[: len(other.path)] == other.path


def _place(source: Source) -> Place:
    """Private because a guard and a write tell of a place by ``Source`` alone."""
    from torch._dynamo.source import GlobalSource, LocalSource

    sources = [source]
    while isinstance(source, ChainedSource):
        sources.append(source := source.base)
    path = tuple(_NUMBER.sub("", _name(each)) for each in reversed(sources))
    if isinstance(source, GlobalSource):
        return Place("global", path)
    # The one variable of the frame that is no argument of it.
    is_model = isinstance(source, LocalSource) and source.local_name == "popc_forward"
    return Place("model" if is_model else "call", path)


def _name(source: Source) -> str:
    name: Any = source.name  # a method in earlier versions
    return name() if callable(name) else name


def written_places() -> list[Place] | None:
    """What the frame that Dynamo compiles now writes to, attributes and globals; None if this torch
    does not tell. For a backend; private because nothing public tells."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    places = []
    try:
        for variable in InstructionTranslator.current_tx().output.side_effects._get_modified_vars():
            with contextlib.suppress(NotImplementedError):  # of the frame alone, so without a name
                if variable.source is not None:
                    places.append(_place(variable.source))
    except AttributeError:
        return None
    return places


def guard_place(entry: Any) -> Place:
    """Where the object of a guard is; ``entry`` is what a ``guard_filter_fn`` takes.

    An entry's own name does not tell a local variable from a key of the same name. Where this
    torch does not tell, it counts as the call's: such a guard is kept.
    """
    try:
        return _place(entry.orig_guard.originating_source)
    except (AttributeError, NotImplementedError):
        return Place("call", ())


def guard_condition(entry: Any) -> str | None:
    """What a guard checks of its object: an attribute, a key, another object.

    Private because nothing public tells, only the function that creates the guard. None if that
    can't be read: two guards may then differ in it.
    """
    from torch._dynamo.guards import GuardBuilder

    create = getattr(getattr(entry, "orig_guard", None), "create_fn", None)
    if entry.guard_type == "TENSOR_MATCH":
        return ""  # of a tensor, what it is made of is the tensor
    if create is not None and create is getattr(GuardBuilder, entry.guard_type, None):
        return ""  # the method itself, which takes the guard alone
    if not isinstance(create, functools.partial):
        return None
    arguments: dict[Any, Any] = {**dict(enumerate(create.args)), **create.keywords}
    readable = all(isinstance(v, Source | str | int | type(None)) for v in arguments.values())
    return _NUMBER.sub("", repr(arguments)) if readable else None

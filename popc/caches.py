"""KV cache objects, as the wrapper of ``popc.compile`` sees them: whose session a call is in."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from popc import compat, state
from popc.log import logger

_DEPTH = 3  # a cache's layers, one of them, and its keys


def in_session(
    call: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    base: state.Session | None,
    by_sequence: bool,
) -> Any:
    """Run ``call`` under the session of the KV cache among its arguments, or in a new one.

    Args:
        base: what was measured on a text given beforehand.
        by_sequence: whether each sequence has a partition of its own, so that their order counts.
    """
    caches = list(_caches((*args, *kwargs.values())))
    session = next((s for s in map(state.of_cache, caches) if s is not None), None)
    lengths = [_length(cache) for cache in caches]
    empty = all(_is_zero(length, session) for length in lengths)
    if session is None or empty:
        session = state.Session(empty, base)
    elif by_sequence and not _is_as_left(caches, session) and session.rows_differ():
        logger.warning(
            "a cache was reordered or cropped since its last call: its sequences can't be told "
            "apart any more, and decode dense until their next prompt"
        )
        session = state.Session(False, base)
    if not empty and not session.told:
        session.told = True
        _tell_what_grows(caches, [*args, *kwargs.values()])
    held = [length for length in lengths if isinstance(length, Tensor)]
    writes = [compat.writes_to(tensor) for tensor in held]
    with state.use(session):
        out = call(*args, **kwargs)
    returned = out.values() if isinstance(out, Mapping) else out
    for cache in _caches(returned if isinstance(returned, Iterable) else ()):
        if not any(cache is known for known in caches):
            caches.append(cache)
    for cache in caches:
        if state.of_cache(cache) is not session:
            state.bind(cache, session)
    session.lengths = [
        state.Left(weakref.ref(tensor), now)
        for tensor, before in zip(held, writes, strict=True)
        if (now := compat.writes_to(tensor)) != before
    ]
    if by_sequence:
        left = _tensor_of(caches)
        session.left = None if left is None else weakref.ref(left)
    return out


def _caches(values: Iterable[Any]) -> Iterator[Any]:
    """KV cache objects: what can say how many tokens it holds."""
    for value in values:
        if not isinstance(value, Tensor) and hasattr(value, "get_seq_length"):
            yield value


def _length(cache: Any) -> int | Tensor | None:
    """How many tokens it holds; None for one of states alone.

    A static cache has it in a tensor: to read that, Python waits for the device.
    """
    try:
        length = cache.get_seq_length()
    except ValueError:
        return None
    return length if isinstance(length, Tensor) else int(length)


def _is_zero(length: int | Tensor | None, session: state.Session | None) -> bool:
    """Whether a cache is empty. A tensor is not read that the last call wrote to and nobody since:
    it holds what that put in."""
    if isinstance(length, Tensor) and session is not None:
        if any(left.is_still(length) for left in session.lengths):
            return False
    return length is not None and int(length) == 0


def _tell_what_grows(caches: Sequence[Any], given: Sequence[Any]) -> None:
    """Say that lengths will change, which Dynamo else learns by compiling the next token again.

    What a prompt leaves may lie by tokens, where the concatenation of the next step is contiguous:
    a graph is compiled for one of them, so it is made contiguous at once.
    """
    for cache in caches:
        length = _length(cache)
        if length is not None:
            length = int(length)
            for tensor in _tensors_of(cache):
                if compat.mark_dynamic(tensor, (length,)) and not tensor.is_contiguous():
                    tensor.data = tensor.detach().contiguous()
            for value in given:  # masks reach over the new token too
                if isinstance(value, Tensor):
                    compat.mark_dynamic(value, (length, length + 1))


def _is_as_left(caches: Sequence[Any], session: state.Session) -> bool:
    """Whether the first tensor held is the one that the last call left there."""
    held = _tensor_of(caches)
    return held is None or (session.left is not None and session.left() is held)


def _tensor_of(held: Any) -> Tensor | None:
    """The first tensor of keys or values in it; None if there is none near its surface."""
    return next(_tensors_of(held), None)


def _tensors_of(held: Any, depth: int = _DEPTH + 1) -> Iterator[Tensor]:
    """The tensors of keys and values near its surface."""
    if isinstance(held, Tensor):
        if held.dim() > 2:
            yield held
        return
    if isinstance(held, Mapping):
        inner: Iterable[Any] = held.values()
    elif isinstance(held, list | tuple):
        inner = held
    else:
        inner = vars(held).values() if hasattr(held, "__dict__") else ()
    if depth:
        for value in inner:
            yield from _tensors_of(value, depth - 1)

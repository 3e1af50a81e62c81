"""KV cache objects, as the wrapper of ``popc.compile`` sees them: whose session a call is in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.weak import TensorWeakRef

from popc import compat, sessions
from popc.log import logger

_DEPTH = 3  # a cache's layers, one of them, and its keys


def in_session(
    call: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    base: sessions.Session | None,
    by_sequence: bool,
    begin: Callable[[], None],
) -> Any:
    """Run ``call`` under the session of the KV cache among its arguments, or in a new one.

    What is no such object, as tensors in tuples or in the model's buffers, is told by its tensors,
    graph by graph, as under ``torch.compile(backend="popc")``.

    Args:
        base: what was measured on a text given beforehand.
        by_sequence: whether each sequence has a partition of its own, so that their order counts.
        begin: called first, unless the call goes on with a generation.
    """
    caches = list(_caches((*args, *kwargs.values())))
    if not caches:
        if not _is_one_token((*args, *kwargs.values())):
            begin()
        session = sessions.Session(True, base)
        with sessions.offer(session):
            out = call(*args, **kwargs)
        # One that has a session got it of a call within this one.
        made = [cache for cache in _caches(_values(out)) if sessions.of_cache(cache) is None]
        _leave(session, made, by_sequence)
        return out
    known = next((s for s in map(sessions.of_cache, caches) if s is not None), None)
    lengths = [_length(cache) for cache in caches]
    empty = all(_is_zero(length, known) for length in lengths)
    if known is None or empty or not _is_one_token((*args, *kwargs.values())):
        begin()
    session = _continued(known, empty, caches, base, by_sequence)
    if not empty and not session.growth_is_marked:
        session.growth_is_marked = True
        _mark_growth(caches, [*args, *kwargs.values()])
    held = [length for length in lengths if isinstance(length, Tensor)]
    writes = [compat.writes_to(tensor) for tensor in held]
    with sessions.use(session):
        out = call(*args, **kwargs)
    made = [cache for cache in _caches(_values(out)) if not any(cache is c for c in caches)]
    _leave(session, [*caches, *made], by_sequence)
    session.lengths = [
        sessions.TensorSnapshot(TensorWeakRef(tensor), now)
        for tensor, before in zip(held, writes, strict=True)
        if (now := compat.writes_to(tensor)) != before
    ]
    return out


def _continued(
    known: sessions.Session | None,
    empty: bool,
    caches: Sequence[Any],
    base: sessions.Session | None,
    by_sequence: bool,
) -> sessions.Session:
    """The session that a call on ``caches`` goes on with, or begins."""
    if known is None or empty:
        return sessions.Session(empty, base)
    if by_sequence and not _is_as_left(caches, known) and known.rows_differ():
        logger.warning(
            "a cache was reordered or cropped since its last call: its sequences can't be told "
            "apart any more, and decode dense until their next prompt"
        )
        return sessions.Session(False, base)
    return known


def _leave(session: sessions.Session, caches: Sequence[Any], by_sequence: bool) -> None:
    """Note that ``caches`` are the session's, and how it leaves them."""
    for cache in caches:
        if sessions.of_cache(cache) is not session:
            sessions.bind(cache, session)
    if by_sequence:
        left = _tensor_of(caches)
        session.first_tensor = None if left is None else TensorWeakRef(left)


def _values(out: Any) -> Iterable[Any]:
    """What a model returned, one by one."""
    returned = out.values() if isinstance(out, Mapping) else out
    return returned if isinstance(returned, Iterable) and not isinstance(out, Tensor) else ()


def _caches(values: Iterable[Any]) -> Iterator[Any]:
    """KV cache objects: what can say how many tokens it holds."""
    for value in values:
        if not isinstance(value, Tensor) and hasattr(value, "get_seq_length"):
            yield value


def _is_one_token(values: Iterable[Any]) -> bool:
    """Whether a call brings one token for each sequence, as ids, positions or embeddings."""
    shapes = (value.shape for value in values if isinstance(value, Tensor))
    return any(len(shape) in (2, 3) and shape[1] == 1 for shape in shapes)


def _length(cache: Any) -> int | Tensor | None:
    """How many tokens it holds; None for one of states alone.

    A static cache has it in a tensor: to read that, Python waits for the device.
    """
    try:
        length = cache.get_seq_length()
    except ValueError:
        return None
    return length if isinstance(length, Tensor) else int(length)


def _is_zero(length: int | Tensor | None, session: sessions.Session | None) -> bool:
    """Whether a cache is empty. A tensor is not read that the last call wrote to and nobody since:
    it holds what that put in."""
    if isinstance(length, Tensor) and session is not None:
        if any(left.is_still(length) for left in session.lengths):
            return False
    return length is not None and int(length) == 0


def _mark_growth(caches: Sequence[Any], given: Sequence[Any]) -> None:
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


def _is_as_left(caches: Sequence[Any], session: sessions.Session) -> bool:
    """Whether the first tensor held is the one that the last call left there."""
    held = _tensor_of(caches)
    return held is None or (session.first_tensor is not None and session.first_tensor() is held)


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

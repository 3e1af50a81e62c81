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

    Caches without such an object, as tensors in tuples or in the model's buffers, are recognised by
    their tensors, graph by graph, as under ``torch.compile(backend="popc")``.

    Args:
        base: what was measured on the calibration text; None without one.
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
        new_caches = [cache for cache in _caches(_outputs(out)) if sessions.of_cache(cache) is None]
        _assign(session, new_caches, by_sequence)
        return out
    known = next((s for s in map(sessions.of_cache, caches) if s is not None), None)
    lengths = [_length(cache) for cache in caches]
    empty = all(_is_empty(length, known) for length in lengths)
    if known is None or empty or not _is_one_token((*args, *kwargs.values())):
        begin()
    session = _session_for(known, empty, caches, base, by_sequence)
    if not empty and not session.growth_is_marked:
        session.growth_is_marked = True
        _mark_growth(caches, [*args, *kwargs.values()])
    length_tensors = [length for length in lengths if isinstance(length, Tensor)]
    write_counts = [compat.writes_to(tensor) for tensor in length_tensors]
    with sessions.use(session):
        out = call(*args, **kwargs)
    new_caches = [cache for cache in _caches(_outputs(out)) if not any(cache is c for c in caches)]
    _assign(session, [*caches, *new_caches], by_sequence)
    session.lengths = [
        sessions.TensorSnapshot(TensorWeakRef(tensor), now)
        for tensor, before in zip(length_tensors, write_counts, strict=True)
        if (now := compat.writes_to(tensor)) != before
    ]
    return out


def _session_for(
    known: sessions.Session | None,
    empty: bool,
    caches: Sequence[Any],
    base: sessions.Session | None,
    by_sequence: bool,
) -> sessions.Session:
    """The session that a call on ``caches`` goes on with, or begins."""
    if known is None or empty:
        return sessions.Session(empty, base)
    if by_sequence and not _is_unchanged(caches, known) and known.rows_differ():
        logger.warning(
            "a cache was reordered or cropped since its last call: its sequences can't be told "
            "apart any more, and decode dense until their next prompt"
        )
        return sessions.Session(False, base)
    return known


def _assign(session: sessions.Session, caches: Sequence[Any], by_sequence: bool) -> None:
    """Assign ``caches`` to the session, and note their first tensor."""
    for cache in caches:
        if sessions.of_cache(cache) is not session:
            sessions.bind(cache, session)
    if by_sequence:
        first = _first_tensor(caches)
        session.first_tensor = None if first is None else TensorWeakRef(first)


def _outputs(out: Any) -> Iterable[Any]:
    """What a model returned, one by one."""
    returned = out.values() if isinstance(out, Mapping) else out
    return returned if isinstance(returned, Iterable) and not isinstance(out, Tensor) else ()


def _caches(values: Iterable[Any]) -> Iterator[Any]:
    """KV cache objects: those with a ``get_seq_length``."""
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


def _is_empty(length: int | Tensor | None, session: sessions.Session | None) -> bool:
    """Whether a cache is empty. A tensor is not read that the last call wrote to and nobody since:
    it holds what that put in."""
    if isinstance(length, Tensor) and session is not None:
        if any(snapshot.is_still(length) for snapshot in session.lengths):
            return False
    return length is not None and int(length) == 0


def _mark_growth(caches: Sequence[Any], arguments: Sequence[Any]) -> None:
    """Say that lengths will change, which Dynamo else learns by compiling the next token again.

    A prompt may leave keys stored token-major, where the concatenation of the next step is
    contiguous: a graph is compiled for one layout, so they are made contiguous at once.
    """
    for cache in caches:
        length = _length(cache)
        if length is not None:
            length = int(length)
            for tensor in _tensors_of(cache):
                if compat.mark_dynamic(tensor, (length,)) and not tensor.is_contiguous():
                    tensor.data = tensor.detach().contiguous()
            for value in arguments:  # masks reach over the new token too
                if isinstance(value, Tensor):
                    compat.mark_dynamic(value, (length, length + 1))


def _is_unchanged(caches: Sequence[Any], session: sessions.Session) -> bool:
    """Whether the first tensor is the one that was there after the last call."""
    first = _first_tensor(caches)
    return first is None or (session.first_tensor is not None and session.first_tensor() is first)


def _first_tensor(container: Any) -> Tensor | None:
    """The first tensor of keys or values in it; None if there is none near its surface."""
    return next(_tensors_of(container), None)


def _tensors_of(container: Any, depth: int = _DEPTH + 1) -> Iterator[Tensor]:
    """The tensors of keys and values near its surface."""
    if isinstance(container, Tensor):
        if container.dim() > 2:
            yield container
        return
    if isinstance(container, Mapping):
        inner: Iterable[Any] = container.values()
    elif isinstance(container, list | tuple):
        inner = container
    else:
        inner = vars(container).values() if hasattr(container, "__dict__") else ()
    if depth:
        for value in inner:
            yield from _tensors_of(value, depth - 1)

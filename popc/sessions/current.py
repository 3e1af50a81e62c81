"""Which session a call is in.

``popc.compile``'s wrapper sees the cache object, which holds its session, and names that around the
call (:func:`use`). Under ``torch.compile(backend="popc")`` tensors alone are seen: a static cache's
tensors stay the same objects, and a dynamic cache's tensors of one call are the inputs of the next,
so sessions are found by the tensors they touched, held weakly. Either way, a dropped cache frees
its session.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Generic, TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from popc.config import CallBudget
from popc.sessions.session import Session

T = TypeVar("T")

_named: ContextVar[Session | None] = ContextVar("popc_session", default=None)
_offered: ContextVar[Session | None] = ContextVar("popc_offered", default=None)
_prefilling: ContextVar[bool] = ContextVar("popc_prefilling", default=False)
_budget: ContextVar[CallBudget | None] = ContextVar("popc_budget", default=None)
_by_tensor = WeakTensorKeyDictionary()
_ATTRIBUTE = "_popc_session"
_lock = threading.Lock()


class _SetVariable(Generic[T]):
    """A context in which a variable has a value.

    A class, as at each token a generator is slow.
    """

    __slots__ = ("_token", "_value", "_variable")

    def __init__(self, variable: ContextVar[T], value: T) -> None:
        self._variable, self._value = variable, value

    def __enter__(self) -> None:
        self._token = self._variable.set(self._value)

    def __exit__(self, *_: object) -> None:
        self._variable.reset(self._token)


def use(session: Session) -> _SetVariable[Session | None]:
    """Run compiled graphs under ``session``."""
    return _SetVariable(_named, session)


def offer(session: Session) -> _SetVariable[Session | None]:
    """Have graphs begin ``session``, where their tensors belong to none yet."""
    return _SetVariable(_offered, session)


def offered() -> Session:
    """The session to begin; a new one where none was offered."""
    return _offered.get() or Session()


def prefill() -> _SetVariable[bool]:
    """A context whose calls are parts of a prompt, also those of a single token.

    Anywhere else a call with one token is a decode step. transformers' ``generate`` of a compiled
    model needs no such mark; a loop of one's own does, where the last chunk of a prompt may be of
    one token::

        with popc.prefill():
            for chunk in prompt.split(512, dim=1):
                out = compiled(chunk, past_key_values=cache)
    """
    return _SetVariable(_prefilling, True)


def is_prefill() -> bool:
    """Whether the call under way was said to be a part of a prompt."""
    return _prefilling.get()


def budget(
    *,
    bits: float | None = None,
    sparsity: float | None = None,
    bytes: float | None = None,
    mass: float | None = None,
) -> _SetVariable[CallBudget | None]:
    """A context whose decode steps may read what is said here, not what their Config says.

    It is of thresholds alone: nothing is compiled or measured anew. It holds for this thread, and
    for calls in it of any compiled model whose policies prune inputs. Contexts may be nested: the
    inner one counts.

    Args:
        bits, sparsity, bytes, mass: one of these, as in :class:`popc.Config`. ``sparsity=0`` reads
            everything.

    Raises:
        ConfigError: not one of them is given, or a value is not allowed.
    """
    return _SetVariable(_budget, CallBudget(bits, sparsity, bytes, mass))


def budget_of_call() -> CallBudget | None:
    """What the call under way may read; None: what its Config says."""
    return _budget.get()


def named() -> Session | None:
    """The session that a wrapper named around this call."""
    return _named.get()


def of_cache(cache: object) -> Session | None:
    """The session of a cache object, if it has one."""
    session = getattr(cache, _ATTRIBUTE, None)
    return session if isinstance(session, Session) else None


def bind(cache: object, session: Session) -> None:
    """Give ``cache`` its session, for as long as the cache lives; a deep copy gets a copy of it."""
    with contextlib.suppress(AttributeError):  # a class with slots: it decodes dense
        object.__setattr__(cache, _ATTRIBUTE, session)


def of_tensors(tensors: Iterable[Tensor]) -> Session | None:
    """The session that last touched one of ``tensors``; None if two sessions did."""
    with _lock:
        sessions = {id(s): s for s in (_by_tensor.get(t) for t in tensors) if s is not None}
    return next(iter(sessions.values())) if len(sessions) == 1 else None


def touch(tensors: Iterable[Tensor], session: Session) -> None:
    """Note that ``tensors`` belong to ``session``, for as long as each lives."""
    with _lock:
        for tensor in tensors:
            _by_tensor[tensor] = session

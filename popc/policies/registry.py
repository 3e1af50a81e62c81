"""Policies by their names: the one list of them."""

from __future__ import annotations

import warnings

from popc.errors import ConfigError
from popc.policies.base import Dense, InputPolicy, Policy, UnitPolicy
from popc.policies.graded import Graded
from popc.policies.griffin import Griffin
from popc.policies.pop import Pop
from popc.policies.staged import Staged
from popc.policies.static import Flap, Wanda
from popc.policies.threshold import Threshold

_known: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        Threshold(),
        Graded(),
        Pop(),
        Griffin(),
        Staged("staged", 0.0),
        Staged("staged_pruned", 0.1),
        Wanda(),
        Flap(),
        Dense(),
    )
}
# Names of earlier versions, still accepted.
_RENAMED = {"contraction": "threshold"}


def register(policy: Policy) -> None:
    """Make a policy of one's own known by its name; registered again, it takes its own place.

    Raises:
        ConfigError: it is no policy of units or of inputs, or the name is taken.
    """
    if not isinstance(policy, UnitPolicy | InputPolicy):
        raise ConfigError("policy", policy, "an instance of a popc.UnitPolicy or popc.InputPolicy")
    registered = _known.get(policy.name)
    # By its name: a cell of a notebook that is run again defines another class of the same name.
    if registered is not None and type(registered).__qualname__ != type(policy).__qualname__:
        raise ConfigError("policy", policy.name, f"a name other than {', '.join(_known)}")
    _known[policy.name] = policy


def names() -> tuple[str, ...]:
    """All that are known."""
    return tuple(_known)


def get(name: str) -> Policy:
    """The policy of that name, as registered."""
    return _known[name]


def current_name(name: object) -> object:
    """``name``, or what a policy of that name is called now, with a warning."""
    if isinstance(name, str) and name in _RENAMED:
        now = _RENAMED[name]
        warnings.warn(f"policy={name!r} is called {now!r} now", DeprecationWarning, stacklevel=5)
        return now
    return name

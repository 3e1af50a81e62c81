"""What to prune, by how much, and how to compile the result: plain, validated data."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from popc.errors import ConfigError

POLICIES = ("pop",)
TARGETS = ("mlp", "attention", "experts")
SCOPES = ("batch", "sequence")
CODEGENS = ("inductor", "eager")


@dataclass(frozen=True)
class Counts:
    """Static unit counts of one region (arXiv 2602.06822, section 3: partition).

    ``retained + candidate`` units are computed at decode, of which ``active`` are kept. A unit is
    a channel of an MLP, or a KV group of attention heads.
    """

    retained: int
    candidate: int
    active: int

    @property
    def live(self) -> int:
        """|R| + |C|: the units that a decode step computes."""
        return self.retained + self.candidate


@dataclass(frozen=True)
class Config:
    """Options of :func:`popc.compile` and of ``torch.compile(backend="popc", options=...)``.

    Args:
        sparsity: r, the share of units inactive in a decode step, ``0 <= r < 1``.
        candidate: γ, the share of units that each token re-scores, ``0 <= γ <= 1``.
        model_sparsity: share of the whole model's parameters that a decode step leaves unread.
            Given, it replaces ``sparsity``: r of the targeted regions is raised until it holds,
            in each graph on the parameters which that graph uses.
        policy: how channels are chosen; ``"pop"`` is the paper's.
        targets: the kinds of region to prune; a subset of ``("mlp", "attention", "experts")``.
        scope: ``"batch"`` has one partition for the batch (statistics are added over it),
            ``"sequence"`` one for each sequence.
        codegen: ``"inductor"`` generates code; ``"eager"`` interprets the rewritten graph node by
            node, for debugging.
        inductor: options handed to Inductor, as in ``torch._inductor.list_options()``.

    Raises:
        ConfigError: a value is outside what is stated here.
    """

    sparsity: float = 0.2
    candidate: float = 0.1
    policy: str = "pop"
    targets: tuple[str, ...] = ("mlp", "experts")
    model_sparsity: float | None = None
    scope: str = "batch"
    codegen: str = "inductor"
    inductor: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_share("sparsity", self.sparsity, below_one=True)
        _check_share("candidate", self.candidate, below_one=False)
        if self.model_sparsity is not None:
            _check_share("model_sparsity", self.model_sparsity, below_one=True)
        _check_choice("policy", self.policy, POLICIES)
        _check_choice("scope", self.scope, SCOPES)
        _check_choice("codegen", self.codegen, CODEGENS)
        if isinstance(self.targets, str):
            object.__setattr__(self, "targets", (self.targets,))
        try:
            object.__setattr__(self, "targets", tuple(self.targets))
        except TypeError:
            raise ConfigError("targets", self.targets, f"a subset of {TARGETS}") from None
        for target in self.targets:
            if target not in TARGETS:
                raise ConfigError("targets", self.targets, f"a subset of {TARGETS}")
        if not isinstance(self.inductor, Mapping):
            raise ConfigError("inductor", self.inductor, "a mapping of Inductor option to value")
        # A copy: a caller's later change of the dict must not change a compiled model's options.
        object.__setattr__(self, "inductor", dict(self.inductor))

    @classmethod
    def of(cls, config: Config | None = None, options: Mapping[str, Any] | None = None) -> Config:
        """``config`` (or the default one) with ``options`` laid over it.

        Raises:
            ConfigError: ``config`` is no Config, or an option is unknown or has a bad value.
        """
        if config is not None and not isinstance(config, cls):
            raise ConfigError("config", config, "a popc.Config, or options by keyword")
        names = [f.name for f in fields(cls)]
        for name, value in (options or {}).items():
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ConfigError(name, value, f"the fields are {', '.join(names)}{hint}")
        values = {name: getattr(config, name) for name in names} if config else {}
        return cls(**{**values, **(options or {})})

    def counts(self, units: int) -> Counts:
        """How many of ``units`` are retained, candidates and active.

        ``active = round((1 - r)·U)``; R is the top ``(1 - r - γ/2)·U`` and C the next ``γ·U``,
        both cut so that ``retained <= active <= retained + candidate <= units``.
        """
        active = max(1, round((1 - self.sparsity) * units))
        retained = min(max(0, round((1 - self.sparsity - self.candidate / 2) * units)), active)
        live = min(units, max(active, retained + round(self.candidate * units)))
        return Counts(retained, live - retained, active)

    def resolved(self, parameters: int, prunable: int) -> Config:
        """With ``model_sparsity`` turned into ``sparsity``, as the paper does.

        Args:
            parameters: how many the graph uses; ``prunable`` of them are in targeted regions.

        Raises:
            ConfigError: the regions hold too few parameters to meet the target.
        """
        if self.model_sparsity is None or not prunable:
            return self
        sparsity = self.model_sparsity * parameters / prunable
        if sparsity >= 1:
            most = prunable / parameters
            raise ConfigError(
                "model_sparsity",
                self.model_sparsity,
                f"the targeted regions {self.targets} hold {most:.1%} of the parameters, so it must"
                f" be less than {most:.3f}; add targets or ask for less",
            )
        return replace(self, sparsity=sparsity, model_sparsity=None)


def _check_share(name: str, value: object, *, below_one: bool) -> None:
    allowed = f"a number with 0 <= {name} {'<' if below_one else '<='} 1"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(name, value, allowed)
    if not (0 <= value < 1 or (value == 1 and not below_one)):
        raise ConfigError(name, value, allowed)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(name, value, f"one of {', '.join(map(repr, choices))}")

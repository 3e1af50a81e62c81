"""What to prune, by how much, and how to compile the result: plain, validated data."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from popc import policies
from popc.errors import ConfigError
from popc.policies import Counts, Dense, InputPolicy, Policy, UnitPolicy
from popc.policies.allocation import MIN_SHARE, Budget

if TYPE_CHECKING:
    from popc.analysis.findings import Region
    from popc.analysis.plan import RegionRecord

TARGETS = ("mlp", "attention", "experts", "other", "head")
GUARDS = ("token", "prompt")
SCOPES = ("batch", "sequence")
BUDGETS = ("fixed", "elastic")
CODEGENS = ("inductor", "eager")
WEIGHTS = ("int8", "int4")
MOST_BITS = 64  # of a weight, as float64 has


@dataclass(frozen=True)
class CallBudget:
    """What decode steps of some calls may read, in place of what their Config says: one of these.

    Attributes:
        bits, sparsity, bytes: as in :class:`Config`.
        mass: as in :class:`Config`, under ``budget="elastic"``.

    Raises:
        ConfigError: none of them is given, or more than one, or a value is not allowed.
    """

    bits: float | None = None
    sparsity: float | None = None
    bytes: float | None = None
    mass: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ConfigError("budget", given, f"one of {', '.join(vars(self))}")
        _check_budget(**given)


@dataclass(frozen=True)
class Config:
    """Options of :func:`popc.compile` and of ``torch.compile(backend="popc", options=...)``.

    Args:
        sparsity: r, the share of units inactive in a decode step, ``0 <= r < 1``.
        candidate: γ, the share of units that each token re-scores, ``0 <= γ <= 1``.
        model_sparsity: share of the whole model's parameters that a decode step leaves unread.
            Given, it replaces ``sparsity``: r of the targeted regions is raised until it holds,
            in each graph on the parameters which that graph uses.
        policy: how channels are chosen: a name, or one for each kind of target; by default
            ``"graded"`` where ``weights`` are quantised, else ``"threshold"``.
            ``"threshold"``: every linear reads the input channels that matter to the token;
            ``"graded"``: likewise, and of quantised weights as many bits of each channel;
            ``"pop"``: the paper's; ``"griffin"``: fixed by the prompt; ``"staged"``: channels by
            their gate, ``"staged_pruned"`` without the tenth that matters least to the prompt;
            ``"wanda_sp"``, ``"flap"``: fixed by a calibration text; ``"dense"``: nothing is
            pruned. Under the first two, experts and encoders are pruned by ``"pop"``, but experts
            with quantised weights by the policy itself.
        targets: what to prune: ``"mlp"``, ``"attention"``, ``"experts"``; by policies of
            inputs alone also ``"other"`` linears, and ``"head"``, the last ones. None: the policy's
            usual ones, or the kinds that ``policy`` names.
        bytes: share of the weight bytes of all linears but the last that a decode step reads.
            Given, it replaces ``sparsity``: r of what is targeted is raised until it holds, in each
            graph on the linears of that graph.
        budget: ``"fixed"``, or ``"elastic"``: each prompt reads what it needs to keep ``mass``, but
            no less than half of what ``sparsity`` leaves; policies of inputs only.
        mass: share of the squared scores of a typical token that ``"elastic"`` keeps.
        count: decode graphs also count what is read: see :meth:`popc.Plan.read_share`.
        scope: ``"batch"`` has one partition for the batch (statistics are added over it),
            ``"sequence"`` one for each sequence.
        weights: ``"int8"`` or ``"int4"``: the compiled model's linears, and embeddings, have
            weights of their own, quantised to that; None: the model's.
        bits: how many bits of each weight a decode step reads on average, scales included, over all
            linears but the last, ``0 < bits <= 64``. Given, it replaces ``sparsity``, as ``bytes``
            does: of ``"int8"``, 8.5 are all there is; of bfloat16, 12 are what ``sparsity=0.25``
            leaves.
        guards: when Dynamo checks that the model is as it was compiled, its modules' attributes
            and globals too: at each ``"token"``, as ``torch.compile`` does, or at each ``"prompt"``
            alone, where nothing changes it between a prompt and its last token. A prompt is a call
            with more than one token.
        codegen: ``"inductor"`` generates code; ``"eager"`` interprets the rewritten graph node by
            node, for debugging.
        inductor: options handed to Inductor, as in ``torch._inductor.list_options()``.

    Raises:
        ConfigError: a value is outside what is stated here.
    """

    sparsity: float = 0.2
    candidate: float = 0.1
    policy: str | Mapping[str, str] = None  # type: ignore[assignment] # a Config always has one
    targets: tuple[str, ...] | None = None
    model_sparsity: float | None = None
    bytes: float | None = None
    budget: str = "fixed"
    mass: float = 0.98
    count: bool = False
    scope: str = "batch"
    weights: str | None = None
    bits: float | None = None
    guards: str = "token"
    codegen: str = "inductor"
    inductor: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_budget(self.sparsity, self.bytes, self.bits, self.mass)
        _check_share("candidate", self.candidate, below_one=False)
        if self.model_sparsity is not None:
            _check_share("model_sparsity", self.model_sparsity, below_one=True)
        given = [n for n in ("model_sparsity", "bytes", "bits") if getattr(self, n) is not None]
        if len(given) > 1:
            name = given[-1]
            raise ConfigError(name, getattr(self, name), f"None where {given[0]} is given")
        if self.weights is not None:
            _check_choice("weights", self.weights, WEIGHTS)
        _check_choice("budget", self.budget, BUDGETS)
        _check_choice("scope", self.scope, SCOPES)
        _check_choice("guards", self.guards, GUARDS)
        _check_choice("codegen", self.codegen, CODEGENS)
        self._check_policy()
        self._check_targets()
        if not isinstance(self.inductor, Mapping):
            raise ConfigError("inductor", self.inductor, "a mapping of Inductor option to value")
        # A copy: a caller's later change of the dict must not change a compiled model's options.
        object.__setattr__(self, "inductor", dict(self.inductor))

    def _check_policy(self) -> None:
        if self.policy is None:
            object.__setattr__(self, "policy", self._default_policy)
        if isinstance(self.policy, Mapping):
            # A copy, as of all that a caller could change later.
            current = {kind: policies.current_name(name) for kind, name in self.policy.items()}
            object.__setattr__(self, "policy", current)
            for kind, name in current.items():
                _check_choice("policy", kind, TARGETS)
                _check_choice("policy", name, policies.names())
        else:
            object.__setattr__(self, "policy", policies.current_name(self.policy))
            _check_choice("policy", self.policy, policies.names())
        units = any(isinstance(policies.get(name), UnitPolicy) for name in self._policies())
        if self.budget == "elastic" and units:
            raise ConfigError("budget", self.budget, "'fixed' with a policy that prunes units")

    def _check_targets(self) -> None:
        targets = self.targets
        if targets is None:
            if isinstance(self.policy, Mapping):
                targets = tuple(
                    kind
                    for kind, name in self.policy.items()
                    if not isinstance(policies.get(name), Dense)
                )
            else:
                targets = policies.get(self.policy).targets
        targets = (targets,) if isinstance(targets, str) else targets
        try:
            object.__setattr__(self, "targets", tuple(targets))
        except TypeError:
            raise ConfigError("targets", targets, f"a subset of {TARGETS}") from None
        for target in self.target_kinds:
            if target not in TARGETS:
                raise ConfigError("targets", self.targets, f"a subset of {TARGETS}")

    @property
    def _default_policy(self) -> str:
        return "threshold" if self.weights is None else "graded"

    @property
    def target_kinds(self) -> tuple[str, ...]:
        """``targets``, which a Config always has."""
        assert self.targets is not None
        return self.targets

    def _policies(self) -> list[str]:
        return list(self.policy.values()) if isinstance(self.policy, Mapping) else [self.policy]

    @property
    def policy_name(self) -> str:
        """The policy in a few words, for people and as a key."""
        if isinstance(self.policy, Mapping):
            return ", ".join(f"{kind}: {name}" for kind, name in self.policy.items())
        return self.policy

    @property
    def calibrated(self) -> str | None:
        """The first policy that needs a calibration text; None if none does."""
        return next((name for name in self._policies() if policies.get(name).calibrated), None)

    def policy_of(self, kind: str) -> str:
        """The policy for a kind of target; ``"dense"`` for those that are none."""
        if kind not in self.target_kinds:
            return "dense"
        return self.policy.get(kind, "dense") if isinstance(self.policy, Mapping) else self.policy

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
        options = dict(options or {})
        if config and "weights" in options and config.policy == config._default_policy:
            values.pop("policy")  # the usual one of other weights
        if "policy" in options and "targets" not in options:
            values.pop("targets", None)  # the usual ones of the other policy
        return cls(**{**values, **options})

    def counts(self, units: int, kind: str = "mlp") -> Counts:
        """How many of ``units`` are retained, candidates and active: see :class:`Policy`."""
        return self.unit_policy(kind).counts(units, self.sparsity, self.candidate)

    @property
    def input_budget(self) -> Budget:
        """What the linears whose inputs are pruned may read."""
        share = 1 - self.sparsity
        if self.budget == "elastic":
            return Budget(share, 1 - self.mass, max(MIN_SHARE, share / 2))
        return Budget(share)

    def at(self, budget: CallBudget) -> Config:
        """With what ``budget`` says in the place of this one's own.

        Raises:
            ConfigError: see :meth:`check_elastic`.
        """
        self.check_elastic()
        if budget.mass is not None:
            return replace(self, budget="elastic", mass=budget.mass)
        given = {name: value for name, value in vars(budget).items() if value is not None}
        others = {"budget": "fixed", "model_sparsity": None, "bytes": None, "bits": None}
        return replace(self, **{**others, **given})

    def check_elastic(self) -> None:
        """Check that calls can have budgets of their own.

        Raises:
            ConfigError: a policy prunes units, whose numbers are compiled into graphs, or nothing
                is pruned at all.
        """
        for name in self._policies():
            if not isinstance(policies.get(name), InputPolicy | Dense):
                raise ConfigError("policy", name, f"one of inputs: {_ELASTIC}")
        if not any(map(self.prunes_inputs, self.target_kinds)):
            raise ConfigError("policy", self.policy, f"one of inputs: {_ELASTIC}")
        if self.weights is None and self._reads_all:
            raise ConfigError("sparsity", self.sparsity, _NOT_DENSE)

    @property
    def _reads_all(self) -> bool:
        if self.model_sparsity is not None:
            return self.model_sparsity == 0
        if self.bytes is not None:
            return self.bytes == 1
        return self.bits is None and self.sparsity == 0

    def prunes(self, kind: str) -> bool:
        """Whether what is of ``kind`` is pruned at all."""
        return not isinstance(self.policy_for(kind), Dense)

    def prunes_inputs(self, kind: str) -> bool:
        """Whether input channels of linears of ``kind`` are pruned."""
        return self.policy_for(kind).prunes_inputs

    def prunes_units(self, region: Region | RegionRecord) -> bool:
        """Whether units of ``region`` are pruned, not inputs of its linears.

        Inputs can be left out where all tokens meet one weight, and in a decode phase.
        """
        return self.policy_for(region.kind).prunes_units(region)

    def scores_gates(self, region: Region | RegionRecord) -> bool:
        """Whether a decode step chooses channels of ``region`` by its gate, where it has one."""
        return not region.one_pass and self.unit_policy(region.kind).staged

    def policy_for(self, kind: str) -> Policy:
        """The policy for a kind of target."""
        return policies.get(self.policy_of(kind))

    def unit_policy(self, kind: str) -> UnitPolicy:
        """What prunes the units of a region of ``kind``, where its own policy has none, too."""
        policy = self.policy_for(kind)
        if not isinstance(policy, UnitPolicy):
            policy = policies.get(policy.units)
        assert isinstance(policy, UnitPolicy)
        return policy

    def input_policy(self, kind: str) -> InputPolicy:
        """What prunes the inputs of linears of ``kind``, of which :meth:`prunes_inputs` holds."""
        policy = self.policy_for(kind)
        assert isinstance(policy, InputPolicy)
        return policy

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


_ELASTIC = "budgets of single calls change thresholds, not how many units are computed"
_NOT_DENSE = (
    "more than 0 for weights as the model has them, where calls are to have budgets of their own: "
    "a model that leaves nothing out is compiled as it is"
)


def _check_budget(
    sparsity: object = None, bytes: object = None, bits: object = None, mass: object = None
) -> None:
    """Check those that are given."""
    if sparsity is not None:
        _check_share("sparsity", sparsity, below_one=True)
    if bytes is not None:
        _check_share("bytes", bytes, below_one=False)
    if mass is not None:
        _check_share("mass", mass, below_one=True)
    if bits is not None:
        is_number = isinstance(bits, int | float) and not isinstance(bits, bool)
        if not is_number or not 0 < bits <= MOST_BITS:  # type: ignore[operator]
            raise ConfigError("bits", bits, f"a number with 0 < bits <= {MOST_BITS}")


def _check_share(name: str, value: object, *, below_one: bool) -> None:
    allowed = f"a number with 0 <= {name} {'<' if below_one else '<='} 1"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(name, value, allowed)
    if not (0 <= value < 1 or (value == 1 and not below_one)):
        raise ConfigError(name, value, allowed)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(name, value, f"one of {', '.join(map(repr, choices))}")

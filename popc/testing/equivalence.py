"""Whether a compiled model is the masked dense one, and where it first is not."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

import popc
from popc import sessions
from popc.analysis.plan import InputRecord, Plan, RegionRecord
from popc.compat import is_traceable_wrapper_subclass, pytree
from popc.config import Config
from popc.errors import ConfigError, ModelError, PopcError
from popc.ops import FLAT_LINEARS, dequantize, graded_linears
from popc.planning.budget_solver import resolve
from popc.runtime import interpreter
from popc.testing.dequantized import Dequantized
from popc.testing.feed import Feed, result
from popc.testing.masked_inputs import MaskedInputs
from popc.testing.oracle import MaskedAnywhere, covers
from popc.testing.products import Observer, Uses

# Choices nearer than this are decided by the rounding of float32, in which scores are compared.
ROUNDING = 1e-5
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
COARSE = 0.05  # for 16-bit floats
# Where weights are quantised, kernels take float32 values for integers of 15 bits.
QUANTIZED_ROUNDING, QUANTIZED_TOLERANCE = 2e-4, 1e-3


class EquivalenceError(PopcError, AssertionError):
    """The compiled model differs from the oracle."""


@dataclass(frozen=True)
class Equivalence:
    """What :func:`assert_equivalent` measured.

    Attributes:
        error: the largest difference of any output, relative to its largest value.
        margin: the least relative distance of two scores between which a choice fell.
        masked: how many values the oracle left out.
        decided: False if the outputs differ, but the margin is within rounding: float32's, in which
            scores are compared, or that of 16-bit values.
        plan: what the compiled model prunes.
    """

    error: float
    margin: float
    masked: int
    decided: bool
    plan: Plan


def assert_equivalent(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Any],
    config: Config | None = None,
    *,
    steps: int = 3,
    dtype: torch.dtype | None = torch.float64,
    tolerance: float | None = None,
    **options: Any,
) -> Equivalence:
    """Compile a copy of ``model`` and compare it with the masked dense model, call by call.

    The first call takes ``inputs``; where the model takes a KV cache, ``steps`` calls with one
    token each follow, the dense model's most likely ones. (Where it takes values, not ids, a
    token is its last output, if that is as wide.) The oracle runs eagerly and makes POP's choices
    by itself, those of other policies of units by their methods; for policies of inputs it takes
    popc's thresholds. Quantised weights are to it what they are read as, each channel at its grade.

    Args:
        model: yours; it is not changed.
        inputs: what ``forward`` takes first, as token ids ``[B, T]``, T > 1; or its keywords, in
            which tensors may be nested. Floating values are brought to ``dtype`` too.
        config, options: as :func:`popc.compile` takes them; any policy but those of
            units that are calibrated, staged, or measure more than one value.
        dtype: what the copy's floating-point weights are brought to; None leaves them. Wide ones
            leave fewer near-ties.
        tolerance: relative to an output's largest value; by default as ``dtype`` allows.

    Raises:
        EquivalenceError: they differ: by how much, and the first region that does.
        ConfigError: an option is not allowed, or the oracle does not cover its policy.
        ModelError: the model fails on the inputs.
    """
    config = Config.of(config, options)
    for policy in map(config.policy_for, config.target_kinds):
        if not covers(policy):
            covered = "one that measures a single value of the prompt itself, or one of inputs"
            raise ConfigError("policy", policy.name, f"{covered}: the oracle covers these")
    copied = copy.deepcopy(model).eval()
    copied = copied if dtype is None else copied.to(dtype)
    allowed = tolerance or tolerance_of(_dtype(copied), is_quantized(copied, config))
    check = _Check(copied, Feed(copied, inputs, dtype), config, steps)
    result, faults = check.run(allowed)
    if not faults:
        return result
    if not result.decided:
        warnings.warn(
            f"outputs differ by {result.error:.1e}, but two scores are equal within "
            f"{result.margin:.0e}: choose other inputs",
            stacklevel=2,
        )
        return result
    raise EquivalenceError(
        f"{faults[0]}\n{check.first_difference(allowed)}{_script(model, inputs, config)}"
    )


class _Check:
    """One model and its inputs, run by popc and by the oracle."""

    def __init__(self, model: nn.Module, feed: Feed, config: Config, steps: int) -> None:
        self.model, self.feed, self.config = model, feed, config
        self.parameters = sum(p.numel() for p in model.parameters())
        self.tokens: list[Tensor] = []
        self._draw_tokens(steps)
        self.traced = self.analyzed(model)

    def analyzed(self, model: nn.Module) -> Plan:
        """What :func:`popc.analyze` finds in it."""
        torch.compiler.reset()
        return popc.analyze(model, *self.feed.first(self.feed.new_cache()))

    @torch.no_grad()
    def calls(self, call: Callable[..., Any], begin: Callable[[int], None]) -> list[Tensor]:
        """The outputs of the first call and of each step; ``begin(number)`` goes before each."""
        begin(0)
        self.cache = self.feed.new_cache()
        args, kwargs = self.feed.first(self.cache)
        outputs = [result(call(*args, **kwargs))]
        for number, token in enumerate(self.tokens, start=1):
            begin(number)
            args, kwargs = self.feed.step(number, token, self.cache)
            outputs.append(result(call(*args, **kwargs)))
        return outputs

    @torch.no_grad()
    def _draw_tokens(self, steps: int) -> None:
        """The dense model's greedy tokens; none where it fills no cache."""
        cache = self.feed.new_cache()
        try:
            args, kwargs = self.feed.first(cache)
            out = self.model(*args, **kwargs)
            if self.feed.cache is None or not cache.get_seq_length():
                self.feed.cache = None
                return
            for number in range(1, steps + 1):
                self.tokens.append(self.feed.next_token(out))
                if number < steps:
                    args, kwargs = self.feed.step(number, self.tokens[-1], cache)
                    out = self.model(*args, **kwargs)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            raise ModelError(f"the model fails on the inputs: {reason}") from error

    def pruned(self) -> tuple[Any, list[Tensor], sessions.Session | None]:
        """The compiled model, its outputs, and its session."""
        torch.compiler.reset()
        compiled: Any = popc.compile(self.model, self.config)
        outputs = self.calls(compiled, lambda number: None)
        session = sessions.of_cache(self.cache) if self.feed.cache else None
        return compiled, outputs, session

    def dequantized(self, compiled: nn.Module) -> tuple[Dequantized, Plan]:
        """The oracle's model, and what :func:`popc.analyze` finds in it."""
        own = Dequantized(self.model, compiled)
        if own.model is self.model:
            return own, self.traced
        plan: Any = compiled.popc_plan
        return own, own.traced(self.analyzed(own.model), plan)

    @contextlib.contextmanager
    def oracle(
        self,
        own: Dequantized,
        traced: Plan,
        whole: Plan,
        session: sessions.Session | None,
        observer: Observer | None = None,
    ) -> Iterator[tuple[MaskedAnywhere, MaskedInputs, Callable[[int], None]]]:
        """Both oracles, active, and a function that begins a call of theirs.

        Args:
            own, traced: of :meth:`dequantized`.
            whole: the plan of the compiled model.
        """
        config = resolve(self.config, self.parameters, whole)
        measured = session.units.regions if session is not None else {}
        regions = [r for r in whole.regions if r.key in measured or _is_pruned_at_once(r, config)]
        kept = own.plan(Plan(regions=regions), traced)
        units = MaskedAnywhere(own.model, kept, config, observer, traced)
        state = (sessions.Session() if session is None else session).inputs
        plan = own.plan(Plan(inputs=whole.inputs), traced)
        by_grade = {group.key: own.read_by_grade(group) for group in plan.inputs}
        inputs = MaskedInputs(
            own.model,
            plan,
            own.by_key(state.thresholds),
            own.by_key(state.centers),
            config,
            observer,
            traced,
            {key: readings for key, readings in by_grade.items() if readings},
        )

        def begin(number: int) -> None:
            units.begin(not number, None if number else self.feed.valid, self.feed.batch)
            inputs.begin()
            inputs.decoding = number > 0

        with units, inputs:
            yield units, inputs, begin

    def run(self, allowed: float) -> tuple[Equivalence, list[str]]:
        compiled, outputs, session = self.pruned()
        own, traced = self.dequantized(compiled)
        with self.oracle(own, traced, compiled.popc_plan, session) as (units, inputs, begin):
            expected = self.calls(own.model, begin)
        errors = [relative(a, b) for a, b in zip(outputs, expected, strict=True)]
        margin, masked = min(units.margin, inputs.margin), units.masked + inputs.masked
        faults = [
            f"call {number} ({'decode' if number else 'first'}): the output differs by {error:.1e} "
            f"of its largest value, {allowed:.0e} is allowed"
            for number, error in enumerate(errors)
            if not error <= allowed
        ]
        own_rounding = rounding(_dtype(self.model), is_quantized(self.model, self.config))
        decided = not faults or margin > own_rounding
        return Equivalence(max(errors), margin, masked, decided, compiled.popc_plan), faults

    def first_difference(self, allowed: float) -> str:
        """The first region, or input, after which the interpreted graph differs."""
        seen: list[dict[Hashable, Tensor]] = []
        expected: list[dict[Hashable, Tensor]] = []
        torch.compiler.reset()
        compiled: Any = popc.compile(self.model, self.config, codegen="eager")
        if self.config.weights is not None:
            self.calls(compiled, lambda number: None)  # it quantises them
        own, traced = self.dequantized(compiled)
        owners: list[RegionRecord | InputRecord] = [*traced.regions, *traced.inputs]
        watcher = _Products(Uses(own.model, owners, traced), own.plain, seen)
        with interpreter.watching(watcher.see):
            self.calls(compiled, watcher.begin)
        session = sessions.of_cache(self.cache) if self.feed.cache else None

        def observe(key: Hashable, out: Tensor) -> None:
            expected[-1].setdefault(key, out.detach().clone())

        with self.oracle(own, traced, compiled.popc_plan, session, observe) as (_, _, begin):

            def started(number: int) -> None:
                expected.append({})
                begin(number)

            self.calls(own.model, started)
        by_key: dict[Hashable, RegionRecord | InputRecord] = {owner.key: owner for owner in owners}
        for number, (ours, theirs) in enumerate(zip(seen, expected, strict=True)):
            for key, out in theirs.items():
                if key in ours and ours[key].numel() == out.numel():
                    error = relative(ours[key].view(out.shape), out)
                    if not error <= allowed:
                        owner = by_key[key[0]]  # type: ignore[index]
                        return (
                            f"the first that differs, in call {number}: {owner.name} "
                            f"({owner.kind}, {owner.source or 'source unknown'}), by {error:.1e}"
                        )
        return "interpreted (codegen='eager') no region differs: look at the generated code"


class _Products:
    """Outputs of an interpreted graph's ops on the weights of regions and inputs.

    ``plain``: those that ``uses`` knows for quantised ones, by the address of their planes.
    """

    def __init__(
        self, uses: Uses, plain: Mapping[int, Tensor], seen: list[dict[Hashable, Tensor]]
    ) -> None:
        self.uses, self.plain, self.seen = uses, plain, seen

    def begin(self, number: int) -> None:
        self.seen.append({})
        self.uses.begin()

    def see(self, node: fx.Node, args: Sequence[Any], value: Any) -> None:
        if node.target is dequantize:
            return
        if node.target in FLAT_LINEARS:
            pairs = list(zip(args[1], _each_output(node, args, value), strict=True))
        else:
            pairs = [(arg, value) for arg in args]
        for weight, out in pairs:
            if not isinstance(weight, Tensor) or not isinstance(out, Tensor):
                continue
            is_view = weight.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()
            if out.is_floating_point() and not is_view:
                for owner, number in self.uses.of(self.plain.get(weight.data_ptr(), weight)):
                    self.seen[-1].setdefault((owner.key, number), out.detach().clone())


def _each_output(node: fx.Node, args: Sequence[Any], value: Tensor) -> Sequence[Tensor]:
    """What each linear of an op on several gives, flat."""
    if node.target is graded_linears:
        sizes = list(args[4])
    else:
        sizes = [weight.shape[dim] for weight, dim in zip(args[1], args[5], strict=True)]
    tokens = value.numel() // sum(sizes)
    return value.split([tokens * size for size in sizes])


def _is_pruned_at_once(region: RegionRecord, config: Config) -> bool:
    """Whether an encoder's pass leaves units of the region out, by its own scores."""
    if not region.one_pass or region.experts or not config.prunes_units(region):
        return False
    if config.scope == "sequence" and region.rank != 3:
        return False  # sequences' rows are one after another
    return config.counts(region.units, region.kind).active < region.units


def is_quantized(model: nn.Module, config: Config) -> bool:
    """Whether products are with quantised weights: popc's own, or those that the model has."""
    return config.weights is not None or any(map(is_traceable_wrapper_subclass, model.parameters()))


def tolerance_of(dtype: torch.dtype, quantized: bool) -> float:
    """What outputs may differ by, relative to the largest, in a model of that dtype."""
    if quantized and dtype == torch.float32:
        return QUANTIZED_TOLERANCE
    return TOLERANCE.get(dtype, COARSE)


def rounding(dtype: torch.dtype, quantized: bool) -> float:
    """Choices nearer than this are decided by rounding in a model of that dtype."""
    if quantized and dtype == torch.float32:
        return QUANTIZED_ROUNDING
    return ROUNDING if dtype in TOLERANCE else max(ROUNDING, 2 * torch.finfo(dtype).eps)


def relative(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value of ``b``; NaN where only one has it."""
    a, b = a.detach().double(), b.detach().double()
    largest = b[b.isfinite()].abs().max() if bool(b.isfinite().any()) else torch.ones(())
    gap = (a - b).abs().where(a != b, 0.0)  # equal infinities differ by nothing
    gap = gap.where(~(a.isnan() & b.isnan()), 0.0)
    return float(gap.max() / largest.clamp(min=1e-30))


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _script(model: nn.Module, inputs: Tensor | Mapping[str, Any], config: Config) -> str:
    """What reproduces the failure, if the model was made by :mod:`popc.testing`."""
    spec = getattr(model, "popc_spec", None)
    if spec is None:
        return ""
    plain = inputs if isinstance(inputs, Tensor) else dict(inputs)
    # A tensor's own repr leaves out what is between its first and last values.
    arguments = pytree.tree_map_only(Tensor, _Written, plain)
    return (
        "\nTo reproduce it:\n\n"
        "import torch\nfrom torch import inf, nan\nfrom popc import Config\n"
        "from popc.testing import *\n"
        f"model = {spec!r}.make()\n"
        f"assert_equivalent(model, {arguments!r}, {config!r})\n"
    )


class _Written:
    """A tensor whose ``repr`` is the code that makes it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __repr__(self) -> str:
        return f"torch.tensor({self.tensor.tolist()}, dtype={self.tensor.dtype})"

"""Whether a compiled model is the masked dense one, and where it first is not."""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import DynamicCache

import popc
from popc import state, watch
from popc.analysis.inputs import Inputs
from popc.analysis.plan import Plan, Region
from popc.backend import prunable
from popc.config import Config
from popc.errors import ConfigError, PopcError
from popc.models import cache_keyword
from popc.resolve import resolve
from popc.testing.oracle import MaskedAnywhere, MaskedInputs, Observer, by_weight

# Choices nearer than this are decided by the rounding of float32, in which scores are compared.
ROUNDING = 1e-5
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
COARSE = 0.05  # for 16-bit floats
POLICIES = ("pop", "contraction", "dense")


class EquivalenceError(PopcError, AssertionError):
    """The compiled model differs from the oracle."""


@dataclass(frozen=True)
class Equivalence:
    """What :func:`assert_equivalent` saw.

    Attributes:
        error: the largest difference of any output, relative to its largest value.
        margin: the least relative distance of two scores between which a choice fell.
        masked: how many values the oracle left out.
        decided: False if the outputs differ, but the margin is within float32's rounding.
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

    The first call is given ``inputs``; where the model takes a KV cache, ``steps`` calls with one
    token each follow, the dense model's most likely ones. The oracle runs eagerly and makes POP's
    choices by itself; of contraction it is given the thresholds.

    Args:
        model: yours; it is not changed.
        inputs: token ids ``[B, T]``, T > 1, or keywords of ``forward``.
        config, options: as :func:`popc.compile` takes them; policies ``"pop"``, ``"contraction"``
            and ``"dense"``.
        dtype: what the copy's floating-point weights are brought to; None leaves them. Wide ones
            leave fewer near-ties.
        tolerance: relative to an output's largest value; by default as ``dtype`` allows.

    Raises:
        EquivalenceError: they differ: by how much, and the first region that does.
        ConfigError: an option is not allowed, or the oracle does not cover its policy.
        ModelError: the model fails on the inputs.
    """
    config = Config.of(config, options)
    names = config.policy.values() if isinstance(config.policy, Mapping) else [config.policy]
    if set(names) - set(POLICIES):
        raise ConfigError("policy", config.policy, f"one of {POLICIES}, which the oracle covers")
    given = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    copied = copy.deepcopy(model).eval()
    copied = copied if dtype is None else copied.to(dtype)
    allowed = tolerance or TOLERANCE.get(_dtype(copied), COARSE)
    check = _Check(copied, given, config, steps)
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
    raise EquivalenceError(f"{faults[0]}\n{check.place(allowed)}{_script(model, inputs, config)}")


class _Check:
    """One model and its inputs, run by popc and by the oracle."""

    def __init__(
        self, model: nn.Module, inputs: dict[str, Any], config: Config, steps: int
    ) -> None:
        self.model, self.inputs, self.config = model, inputs, config
        names = inspect.signature(model.forward).parameters
        self.keyword = cache_keyword(model.forward) if "use_cache" in names else None
        self.steps = steps if self.keyword else 0
        self.parameters = sum(p.numel() for p in model.parameters())
        self.tokens = self._tokens() if self.steps else []

    @torch.no_grad()
    def calls(self, call: Callable[..., Any], begin: Callable[[int], None]) -> list[Tensor]:
        """The outputs of the first call and of each step; ``begin(number)`` goes before each."""
        begin(0)
        if self.keyword is None:
            return [_result(call(**self.inputs))]
        self.cache = DynamicCache()
        more = {self.keyword: self.cache, "use_cache": True}
        outputs = [_result(call(**self.inputs, **more))]
        mask = self.inputs.get("attention_mask")
        for number, token in enumerate(self.tokens, start=1):
            begin(number)
            if mask is not None:
                mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
                more["attention_mask"] = mask
            outputs.append(_result(call(input_ids=token, **more)))
        return outputs

    def _tokens(self) -> list[Tensor]:
        """What the dense model says, step by step."""
        self.tokens, said = [], []
        for _ in range(self.steps):
            *_, last = self.calls(self.model, lambda number: None)
            said.append(last[:, -1:].argmax(-1))
            self.tokens = said
        return said

    def pruned(self) -> tuple[Any, list[Tensor], state.Session | None]:
        """The twin, its outputs, and its session."""
        torch.compiler.reset()
        twin: Any = popc.compile(self.model, self.config)
        outputs = self.calls(twin, lambda number: None)
        session = state.of_cache(self.cache) if self.keyword else None
        return twin, outputs, session

    @contextlib.contextmanager
    def oracle(
        self, plan: Plan, session: state.Session | None, observer: Observer | None = None
    ) -> Iterator[tuple[MaskedAnywhere, MaskedInputs, Callable[[int], None]]]:
        """Both oracles, one around the other, and what begins a call of theirs."""
        config = resolve(self.config, self.parameters, plan)
        measured = session.regions if session is not None else {}
        regions = [
            r for r in plan.regions if r.key in measured or (r.one_pass and prunable(r, config))
        ]
        units = MaskedAnywhere(self.model, Plan(regions=regions), config, observer)
        held = state.Session() if session is None else session
        inputs = MaskedInputs(self.model, plan, held.thresholds, held.centers, observer)
        ids = next(v for v in self.inputs.values() if isinstance(v, Tensor) and v.dim() > 1)
        mask = self.inputs.get("attention_mask")

        def begin(number: int) -> None:
            valid = mask.bool() if mask is not None and not number else None
            units.begin(not number, valid, len(ids))
            inputs.begin()
            inputs.decoding = number > 0

        with units, inputs:
            yield units, inputs, begin

    def run(self, allowed: float) -> tuple[Equivalence, list[str]]:
        twin, outputs, session = self.pruned()
        with self.oracle(twin.popc_plan, session) as (units, inputs, begin):
            expected = self.calls(self.model, begin)
        errors = [relative(a, b) for a, b in zip(outputs, expected, strict=True)]
        margin, masked = min(units.margin, inputs.margin), units.masked + inputs.masked
        faults = [
            f"call {number} ({'decode' if number else 'first'}): the output differs by {error:.1e} "
            f"of its largest value, {allowed:.0e} is allowed"
            for number, error in enumerate(errors)
            if not error <= allowed
        ]
        decided = not faults or margin > ROUNDING
        return Equivalence(max(errors), margin, masked, decided, twin.popc_plan), faults

    def place(self, allowed: float) -> str:
        """The first region, or input, after which the interpreted graph differs."""
        seen: list[dict[Hashable, Tensor]] = []
        expected: list[dict[Hashable, Tensor]] = []
        torch.compiler.reset()
        twin: Any = popc.compile(self.model, self.config, codegen="eager")
        plan = popc.analyze(self.model, (), self.inputs)
        owners: list[Region | Inputs] = [*plan.regions, *plan.inputs]
        watcher = _Products(self.model, owners, seen)
        with watch.watching(watcher.see):
            self.calls(twin, watcher.begin)
        session = state.of_cache(self.cache) if self.keyword else None

        def observe(key: Hashable, out: Tensor) -> None:
            expected[-1].setdefault(key, out.detach().clone())

        with self.oracle(twin.popc_plan, session, observe) as (_, _, begin):

            def started(number: int) -> None:
                expected.append({})
                begin(number)

            self.calls(self.model, started)
        by_key: dict[Hashable, Region | Inputs] = {owner.key: owner for owner in owners}
        for number, (ours, theirs) in enumerate(zip(seen, expected, strict=True)):
            for place, out in theirs.items():
                if place in ours and ours[place].numel() == out.numel():
                    error = relative(ours[place].view(out.shape), out)
                    if not error <= allowed:
                        owner = by_key[place[0]]  # type: ignore[index]
                        return (
                            f"the first that differs, in call {number}: {owner.name} "
                            f"({owner.kind}, {owner.source or 'source unknown'}), by {error:.1e}"
                        )
        return "interpreted (codegen='eager') no region differs: look at the generated code"


class _Products:
    """Outputs of an interpreted graph's ops on the weights that contract ``owners``."""

    def __init__(
        self,
        model: nn.Module,
        owners: Sequence[Region | Inputs],
        seen: list[dict[Hashable, Tensor]],
    ) -> None:
        self.weights, self.seen = by_weight(model, owners), seen
        self.calls: dict[int, int] = {}

    def begin(self, number: int) -> None:
        self.seen.append({})
        self.calls = {}

    def see(self, node: fx.Node, args: Sequence[Any], value: Any) -> None:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return
        for arg in args:
            at = arg.untyped_storage().data_ptr() if isinstance(arg, Tensor) else None
            # Views of the weight come before the product.
            if at not in self.weights or value.untyped_storage().data_ptr() == at:
                continue
            use = self.calls[at] = self.calls.get(at, -1) + 1
            for owner, number in self.weights[at]:
                if owner.key[1] == use:
                    self.seen[-1].setdefault((owner.key, number), value.detach().clone())


def relative(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value of ``b``; NaN where only one has it."""
    a, b = a.detach().double(), b.detach().double()
    largest = b[b.isfinite()].abs().max() if bool(b.isfinite().any()) else torch.ones(())
    gap = (a - b).abs().where(a != b, 0.0)  # equal infinities differ by nothing
    gap = gap.where(~(a.isnan() & b.isnan()), 0.0)
    return float(gap.max() / largest.clamp(min=1e-30))


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _result(out: Any) -> Tensor:
    """Logits, or the first tensor that a model gives."""
    if isinstance(out, Tensor):
        return out
    logits = getattr(out, "logits", None)
    if logits is not None:
        return logits
    values = out.values() if isinstance(out, Mapping) else out
    return next(v for v in values if isinstance(v, Tensor) and v.dim())


def _script(model: nn.Module, inputs: Tensor | Mapping[str, Any], config: Config) -> str:
    """What reproduces the failure, if the model was made by :mod:`popc.testing`."""
    spec = getattr(model, "popc_spec", None)
    if spec is None:
        return ""
    held = {"input_ids": inputs} if isinstance(inputs, Tensor) else inputs
    given = ", ".join(f"{name!r}: torch.tensor({v.tolist()})" for name, v in held.items())
    return (
        "\nTo reproduce it:\n\n"
        "import torch\nfrom popc import Config\nfrom popc.testing import *\n"
        f"model = {spec!r}.make()\n"
        f"assert_equivalent(model, {{{given}}}, {config!r})\n"
    )

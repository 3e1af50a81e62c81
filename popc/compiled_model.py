"""The compiled model: a mirror of the model whose ``forward`` runs through popc's graphs.

So do those parts of it that ``generate`` by themselves, as a language model within a wrapper does.
"""

from __future__ import annotations

import copy
import functools
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import fx, nn

from popc import compat, sessions
from popc.analysis.plan import Plan
from popc.backend import popc_backend
from popc.config import CallBudget, Config
from popc.errors import ConfigError, ModelError, PopcWarning
from popc.runtime.caches import in_session
from popc.runtime.compiled_graph import CompiledGraph
from popc.runtime.guards import KeptGuards, PromptGuards
from popc.runtime.mirror import Mirror, modules_of, replace
from popc.runtime.own_weights import OwnWeights

Model = TypeVar("Model", bound=nn.Module)
_BUDGET = frozenset(field.name for field in fields(CallBudget))
_NOTHING_PRUNED = (
    "popc found nothing to prune in this model; it runs dense. popc.analyze(model) says why."
)
_NOT_REACHED = (
    "popc: generate() of this model called neither its own forward nor that of a part with a "
    "generate() of its own, so it ran dense. Compile the part that it calls: "
    "compiled.part = popc.compile(compiled.part)"
)


class Compiled:
    """What the compiled forwards of one model share.

    Attributes:
        plan: of all graphs compiled so far.
        base: what was measured on the calibration text; None without one.
        calls: how many calls there were.
        weights: which the compiled model has, and the model has not.
    """

    def __init__(self, model: nn.Module, config: Config, inplace: bool = False) -> None:
        self.config, self.plan = config, Plan()
        self.base: sessions.Session | None = None
        self.calls = 0
        self.is_own_trace = compat.traces_for(self)
        self._warned = False
        self._mirror = Mirror(model)
        self._hooks = self._mirror.hooks()
        self.model = self._mirror.root
        if self.model is model:
            kind = type(model).__name__
            raise ModelError(f"popc.compile can't compile a {kind}: it is no plain Python module")
        self.weights = OwnWeights(self._mirror, inplace)
        self.weights.convert()
        self.forwards = [_Forward(self, part) for part in _parts(self.model)]
        for forward in self.forwards:
            replace(forward.module, self._attributes(forward))
            generate: Any = getattr(forward.module, "generate", None)
            if callable(generate):
                generate = self._budgeted(generate)
                if forward.module is self.model:
                    generate = self._warning_generate(generate)
                replace(forward.module, {"generate": generate})

    def begin(self) -> None:
        """Before a call that is no decode step: take over what was set on the original."""
        self._mirror.follow()
        hooks = self._mirror.hooks()
        if hooks != self._hooks:
            self._hooks = hooks
            for forward in self.forwards:
                forward.renew()

    def note(self, breaks_before: Mapping[str, int]) -> None:
        """After a call: record its graph breaks, and warn if nothing is pruned."""
        breaks = compat.breaks_since(breaks_before)
        if breaks:
            self.plan.extend(Plan(breaks=breaks))
        plan = self.plan
        if not self._warned and not plan.regions and not plan.inputs and plan.skipped:
            self._warned = True
            warnings.warn(_NOTHING_PRUNED, PopcWarning, stacklevel=6)  # whoever called the model

    def measure(self, calibration: Iterable[Any]) -> None:
        """Run the batches of the calibration text through the model, dense."""
        session = sessions.Session()
        compiled = self.forwards[0].frame

        def run(batch: Any) -> None:
            compiled(**batch) if isinstance(batch, Mapping) else compiled(batch)

        with torch.no_grad(), sessions.use(session), compat.running(self):
            for batch in calibration:
                compat.call_compiled(run, batch)
        self.base = session

    def budget(self, **budget: float) -> AbstractContextManager[Any]:
        """A context whose decode steps may read what is said here, not what the Config says.

        From everything down to a few bits, over the same weights: it is of thresholds alone, so
        nothing is compiled or measured anew. See :func:`popc.sessions.budget`.

        Args:
            budget: one of ``bits``, ``sparsity``, ``bytes`` and ``mass``, as in
                :class:`popc.Config`.

        Raises:
            ConfigError: it is not one of these, a value is not allowed, or nothing in the compiled
                graphs goes by thresholds.
        """
        self.config.check_elastic()
        if self.calls and not self.plan.inputs:
            raise ConfigError(
                "budget", budget, "for what leaves inputs of linears out; nothing does"
            )
        return sessions.budget(**budget)

    def _attributes(self, forward: _Forward) -> dict[str, Any]:
        """Attributes to set on the instance: its class stays as it is."""
        module = forward.module
        attributes: dict[str, Any] = {
            "forward": forward.function(),
            "popc_plan": self.plan,
            "popc_config": self.config,
            "budget": self.budget,
            "__deepcopy__": functools.partial(_deep_copy, self, module),
            "__reduce_ex__": _refuse_to_pickle,
        }
        if hasattr(module, "get_compiled_call"):
            # transformers' generate would compile the call once more.
            attributes["get_compiled_call"] = lambda *_: module.__call__
        return attributes | compat.marked_prefill(module, sessions.prefill)

    def _budgeted(self, dense: Callable[..., Any]) -> Callable[..., Any]:
        """A ``generate`` that also takes what :meth:`budget` does."""

        @functools.wraps(dense, updated=())
        def generate(*args: Any, **kwargs: Any) -> Any:
            budget = {name: kwargs.pop(name) for name in _BUDGET & kwargs.keys()}
            with self.budget(**budget) if budget else nullcontext():
                return dense(*args, **kwargs)

        return generate

    def _warning_generate(self, dense: Callable[..., Any]) -> Callable[..., Any]:
        """The model's ``generate``, which warns once if it ran dense."""
        warned = False

        @functools.wraps(dense, updated=())
        def generate(*args: Any, **kwargs: Any) -> Any:
            nonlocal warned
            before = self.calls
            out = dense(*args, **kwargs)
            if self.calls == before and not warned:
                warned = True
                warnings.warn(_NOT_REACHED, PopcWarning, stacklevel=2)
            return out

        return generate


class _Forward:
    """The forward of one module, as popc compiles it."""

    def __init__(self, shared: Compiled, module: nn.Module) -> None:
        self.shared, self.module = shared, module
        self.dense = module.forward
        self.guards = PromptGuards() if shared.config.guards == "prompt" else None
        self._lock = threading.Lock()
        self._by_sequence = shared.config.scope == "sequence"
        self._backend = _backend_for(shared, self.guards)
        self.frame = compat.compile_alone(self.dense, self._backend, KeptGuards(self.guards))

    def function(self) -> Callable[..., Any]:
        """The module's new ``forward``.

        Where Dynamo traces it for another part of this model, it is the dense forward, so that one
        graph holds all; where Dynamo traces it for any other function, it breaks that graph.
        """
        shared, dense, run = self.shared, self.dense, self.run
        reason = "a model that popc compiled has its own graphs"
        alone = torch.compiler.disable(run, reason=reason)

        @functools.wraps(dense, updated=())
        def forward(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_dynamo_compiling():
                return dense(*args, **kwargs) if shared.is_own_trace() else alone(*args, **kwargs)
            return run(*args, **kwargs)

        return forward

    def run(self, *args: Any, **kwargs: Any) -> Any:
        shared = self.shared
        shared.calls += 1
        before = compat.graph_breaks()
        no_grad = torch.is_grad_enabled() and not _wants_grad(self.module, args, kwargs)
        with torch.no_grad() if no_grad else nullcontext(), compat.running(shared):
            out = compat.call_compiled(
                in_session, self._call, args, kwargs, shared.base, self._by_sequence, shared.begin
            )
        shared.note(before)
        return out

    def renew(self) -> None:
        """Forget what was compiled: the model has changed in a way that no guard sees."""
        self.frame = compat.compile_alone(self.dense, self._backend, KeptGuards(self.guards))

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        """The compiled frame; a new one where decode steps rely on a model that has changed."""
        guards = self.guards
        if guards is not None:
            with self._lock:
                if guards.take_change():
                    self.renew()
                guards.begin_call()
        return self.frame(*args, **kwargs)


def _parts(root: nn.Module) -> Iterator[nn.Module]:
    """The model, and all modules in it that ``generate``."""
    yield root
    for part in modules_of(root):
        # Of the class: some modules hand every attribute that they lack on to another.
        if part is not root and callable(getattr(type(part), "generate", None)):
            yield part


def _backend_for(shared: Compiled, guards: PromptGuards | None) -> Callable[..., Any]:
    """popc's backend with its options; it adds to the plan and tells ``guards`` of each graph."""

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled = popc_backend(
            gm,
            example_inputs,
            config=shared.config,
            on_plan=shared.plan.extend,
            has_calibration=True,
            replace_parameter=shared.weights.replace,
        )
        if guards is not None:
            decodes = isinstance(compiled, CompiledGraph) and compiled.decodes
            guards.expect(decodes, compat.written_places())
        return compiled

    return backend


def _wants_grad(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    values = (*args, *kwargs.values())
    any_requires = any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)
    return model.training or any_requires


def dense(model: Model) -> Model:
    """A model as it is without popc: a mirror of a compiled one, with what was set on that."""
    return Mirror(model).root if "popc_plan" in model.__dict__ else model  # type: ignore[return-value]


def _deep_copy(shared: Compiled, module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy of a compiled model: a copy of the model, compiled, with weights of its own."""
    if shared.base is not None:
        raise ModelError(
            f"a compiled model with policy {shared.config.policy_name!r} can't be copied, as its "
            "text is not kept: copy the model, and compile the copy with its calibration"
        )
    copied = copy.deepcopy(dense(module), memo)
    memo[id(module)] = compiled = Compiled(copied, shared.config).model
    return compiled


def _refuse_to_pickle(_: Any) -> Any:
    raise ModelError(
        "a compiled model can't be pickled: save its state_dict(), or pickle the model that it was "
        "made of, whose weights it shares, and compile that where it is loaded"
    )

"""What runs around a compiled graph: the session is found, its partition fed, statistics taken."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import fx
from torch.utils.weak import WeakIdRef

from popc.analysis.capture import Captured, identity
from popc.analysis.findings import Region
from popc.analysis.input_groups import InputGroup
from popc.analysis.labels import same_size
from popc.analysis.mutation import is_written
from popc.analysis.plan import Plan
from popc.analysis.propagation import shape
from popc.analysis.tokens import rows_of
from popc.config import Config
from popc.errors import PopcWarning
from popc.log import log_graph, logger
from popc.ops import select_kernel, threshold_linear
from popc.passes.base import run_pass
from popc.passes.dense.pipeline import run_dense_passes
from popc.passes.pack import Packer, has_kernel, pack_weights
from popc.passes.packing import Slot
from popc.passes.prune_units import prune_units
from popc.passes.statistics import measure_units
from popc.passes.threshold_inputs import measure_input_groups, segment_offsets, threshold_inputs
from popc.policies import Counts
from popc.runtime import sessions, weight_watch
from popc.runtime.binding import InputGroupBinding, RegionBinding, held
from popc.runtime.partition import InputGroupState, RegionState, ThresholdInputs
from popc.runtime.sessions import Session

Compiled = Callable[..., Sequence[Any]]

# The keys of the regions that a variant prunes.
_only: ContextVar[frozenset[Hashable] | None] = ContextVar("popc_only", default=None)
_SPLIT = (
    "its prompt was measured at another batch size, or in a graph that splits the model otherwise"
)
_UNSEEN = (
    "nothing is known of its prompt. Its KV cache was filled by another model or read from a file, "
    "or it is one that popc can't follow from call to call"
)


@dataclass(frozen=True)
class RewritePlan:
    """What is to be done in one graph: regions to measure and to prune, inputs likewise."""

    measured: Sequence[Region] = ()
    pruned: Sequence[Slot] = ()
    measured_inputs: Sequence[InputGroup] = ()
    contracted: Sequence[InputGroup] = ()

    @property
    def prunes(self) -> bool:
        return bool(self.pruned or self.contracted)

    @property
    def device(self) -> torch.device | None:
        """Where it is done; None if there is nothing to do."""
        hidden = [region.hidden for region in self.measured]
        hidden += [slot.region.hidden for slot in self.pruned]
        hidden += [group.x for group in (*self.measured_inputs, *self.contracted)]
        return hidden[0].meta["val"].device if hidden else None


@dataclass(frozen=True, eq=False)
class _Instance:
    """The states of a graph's regions for the parameters of one layer, or of one model.

    ``scale`` and ``measured_scale`` are norms, as :mod:`popc.passes.threshold_inputs` takes them;
    ``sample`` and ``changes`` tell whether they are still right, by
    :mod:`popc.runtime.weight_watch`.
    """

    owner: object
    changes: int
    slots: list[RegionState]
    prefill: list[RegionState]
    contracted: list[InputGroupState]
    measured_inputs: list[InputGroupState]
    scale: torch.Tensor | None
    measured_scale: torch.Tensor | None
    sample: torch.Tensor | None

    @property
    def pruned(self) -> list[RegionState | InputGroupState]:
        return [*self.slots, *self.contracted]

    @property
    def measured(self) -> list[RegionState | InputGroupState]:
        return [*self.prefill, *self.measured_inputs]


class _Last:
    """The instance of the last call, by the ids of its weights.

    An id is its weight's for as long as that lives: with the first that does not, ``instance`` is
    None. Threads share no more than a reference to this, which is replaced as a whole.
    """

    __slots__ = ("_alive", "ids", "instance")

    def __init__(self, parameters: Sequence[torch.Tensor], instance: _Instance) -> None:
        self.ids = tuple(map(id, parameters))
        self.instance: _Instance | None = instance
        self._alive = [WeakIdRef(parameter, self._forget) for parameter in parameters]

    def _forget(self, _: object) -> None:
        self.instance = None


class CompiledGraph:
    """One compiled graph: finds the session, feeds the partition, takes the statistics.

    A graph that prunes has variants, compiled when a call first needs them: a dense one, for tokens
    that come without a partition, and such that prune those regions alone that prompts measured.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        captured: Captured,
        work: RewritePlan,
        example_inputs: Sequence[Any],
        config: Config,
        generate: Callable[[fx.GraphModule, Sequence[Any]], Compiled],
        again: Callable[..., Compiled] | None,
        on_plan: Callable[[Plan], None] | None,
    ) -> None:
        """``again``: the backend, for variants of a graph that prunes; a dense one has none."""
        self.gm = gm if work.prunes else None  # for variants
        self.again = again
        self.on_plan = on_plan
        self.scope, self.counting = config.scope, config.count
        self.budget = config.input_budget
        placeholders = [n for n in captured.gm.graph.nodes if n.op == "placeholder"]
        self.slots = [(RegionBinding.of(s.region, captured), s.counts, config) for s in work.pruned]
        self.prefill = [
            (RegionBinding.of(region, captured), config.counts(region.units, region.kind), config)
            for region in work.measured
        ]
        self.contracted = [
            InputGroupBinding.of(group, captured, config) for group in work.contracted
        ]
        self.measured_inputs = [
            InputGroupBinding.of(g, captured, config) for g in work.measured_inputs
        ]
        bindings: list[RegionBinding | InputGroupBinding] = [
            t for t, _, _ in (*self.slots, *self.prefill)
        ]
        bindings += [*self.contracted, *self.measured_inputs]
        # Whether it can run on a prompt; what only decodes goes by what a prompt's graph saw.
        self.begins = bool(work.measured or work.measured_inputs) or any(
            slot.region.one_pass for slot in work.pruned
        )
        self.decodes = work.prunes and not self.begins
        self.weights = sorted({i for binding in bindings for i in binding.weights})
        # One more, as of a single place this would give no tuple; and at each token a loop is slow.
        self._weights_of = itemgetter(*self.weights, self.weights[0])
        self._instances: dict[tuple[int, ...], _Instance] = {}
        self._last: _Last | None = None
        self._changes = weight_watch.changes()
        self._lock = threading.Lock()
        self.batch = _batch_of(work, placeholders, config.scope)
        self.activations = [
            i
            for i, node in enumerate(placeholders)
            if node not in captured.parameters and _is_cache_like(node.meta.get("val"))
        ]
        self.written = [i for i in self.activations if is_written(placeholders[i])]
        self.cached = any(region.cached for region in work.measured)
        self._variants: dict[tuple[bool, ...], Compiled] = {}
        self._told = False
        self.packer: Packer | None = None
        self._rewrite(captured, work, config)
        placeholders = [n for n in captured.gm.graph.nodes if n.op == "placeholder"]
        added = [n.meta["val"] for n in placeholders[len(example_inputs) :]]
        inputs = [*example_inputs, *added]
        self.run = run_pass("generate code", generate, captured.gm, inputs)

    def _rewrite(self, captured: Captured, work: RewritePlan, config: Config) -> None:
        """Run the passes, in the order in which :meth:`_run` has their inputs and outputs."""
        scope = config.scope
        if work.contracted:
            given: tuple[Any, ...] = (work.contracted, scope, config.count)
            run_pass("contract inputs", threshold_inputs, captured, *given)
        if work.measured_inputs:
            run_pass("measure inputs", measure_input_groups, captured, work.measured_inputs, scope)
        if work.measured:
            policies = [config.unit_policy(region.kind) for region in work.measured]
            given = (work.measured, policies, scope)
            run_pass("measure regions", measure_units, captured, *given)
        if work.pruned:
            self.packing = run_pass("prune regions", prune_units, captured, work.pruned, scope)
        assert work.device is not None
        if not has_kernel(work.device):
            self.packer = run_pass("pack weights", pack_weights, captured)
        run_dense_passes(captured, decodes=self.decodes)
        log_graph("rewritten", captured.gm)

    def __call__(self, *args: Any) -> Sequence[Any]:
        session = sessions.named()
        by_tensors = session is None
        if session is None:
            session = self._session_of(args)
        # Entering no_grad once more takes longer than looking.
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
            outputs = self._run(args, session)
        if by_tensors:
            self._touch(session, args, outputs)
        return outputs

    def _run(self, args: Sequence[Any], session: Session) -> Sequence[Any]:
        """Inputs and outputs in the order in which ``__init__`` has the passes add them."""
        instance = self._instance(args)
        measures = self.again is not None or self._is_prompt(instance, session)
        if measures and self._has_changed(instance, args):
            logger.info("weights have changed: their norms are taken anew")
            weight_watch.note_change(identity(args[i]) for i in self.weights)
            instance = self._instance(args)
        batch = self.batch(args)
        inputs = list(args)
        if self.decodes and sessions.is_prefill():
            return self._run_dense(args, session, instance)
        if self.contracted:
            limits = self._limits(instance, session, batch)
            if limits is None:
                return self._run_dense(args, session, instance)
            if limits.missing:
                self._tell(f"{limits.missing} of {len(limits.groups)} inputs of linears", _SPLIT)
            if limits.base is None:
                limits.base = self._base(args, instance, limits.center)
            inputs += [instance.scale, limits.thresholds, limits.center, limits.base]
        if self.measured_inputs:
            scale, groups = instance.measured_scale, instance.measured_inputs
            assert scale is not None
            inputs += [scale, session.moments(groups, self.scope, batch or 1, scale)]
        if self.cached:
            cached = [region for region in instance.prefill if region.cached]
            inputs.append(session.keep(cached, self.scope, batch or 1))
        if self.slots:
            partition = session.partition(
                instance.owner, instance.slots, self.packing, self.scope, batch
            )
            if partition is None:
                return self._run_partly(args, session, instance, batch)
            inputs += [partition.index, partition.norm]
            if self.packing.compensating:
                if partition.compensation is None:
                    partition.compensation = self._compensation(args, partition.lost)
                inputs.append(partition.compensation)
            if self.packer is not None:
                if partition.weights is None:
                    partition.weights = self.packer(inputs)
                inputs += partition.weights
        outputs = self.run(*inputs)
        if self.prefill:
            *outputs, sums = outputs
            if measures:
                session.add(instance.prefill, self.scope, sums)
        if self.measured_inputs:
            count = 2 * len(self.measured_inputs)
            outputs, measured = outputs[:-count], outputs[-count:]
            if measures:
                session.measure_input_groups(instance.measured_inputs, self.scope, measured)
        if self.contracted and self.counting:
            *outputs, read = outputs
            session.count(instance.contracted, read)
        return outputs

    def _is_prompt(self, instance: _Instance, session: Session) -> bool:
        """Whether one token that runs dense is of a prompt: else it measures nothing.

        It is, if it is said to be, and if it is the first there is.
        """
        return sessions.is_prefill() or (session.whole and not session.has_seen(instance.measured))

    def _compensation(self, args: Sequence[Any], lost: Sequence[torch.Tensor]) -> torch.Tensor:
        """``W`` times the means of pruned units, consumer after consumer, float32."""
        slots = zip(self.slots, self.packing.slots, strict=True)
        templates = [template for (template, _, _), slot in slots if slot.compensates]
        parts = []
        for template, mean in zip(templates, lost, strict=True):
            for linear, real in held(template.region.consumers, template.weights, args):
                weight = real.float()
                parts.append(mean @ (weight.mT if linear.weight.out_dim == 0 else weight))
        total = torch.cat(parts, dim=-1)
        return total if self.scope == "sequence" else total[0]

    def _run_dense(
        self, args: Sequence[Any], session: Session, instance: _Instance
    ) -> Sequence[Any]:
        if not self._is_prompt(instance, session):
            self._tell("whole", _SPLIT if session.has_seen(instance.pruned) else _UNSEEN)
        with sessions.use(session):
            return self._variant()(*args)

    def _run_partly(
        self, args: Sequence[Any], session: Session, instance: _Instance, batch: int | None
    ) -> Sequence[Any]:
        """Prune the regions that prompts have measured, where those are not all.

        So it does not matter to a token in which graphs Dynamo has split its prompt, and it.
        """
        known = tuple(session.knows(one, self.scope, batch or 1) for one in instance.slots)
        if not 0 < sum(known) < len(known):
            return self._run_dense(args, session, instance)
        self._tell(f"{len(known) - sum(known)} of {len(known)} regions", _SPLIT)
        keys = frozenset(
            one.key for one, is_known in zip(instance.slots, known, strict=True) if is_known
        )
        token = _only.set(keys)
        try:
            with sessions.use(session):
                return self._variant(known)(*args)
        finally:
            _only.reset(token)

    def _variant(self, known: tuple[bool, ...] = ()) -> Compiled:
        """The graph as Dynamo gave it, compiled on its own (with guards of its own).

        It prunes those of its regions that are ``known``. Without any it is dense, and measures as
        a prefill does: the first token of an empty cache is all the prompt there is.
        """
        if known not in self._variants:
            again = self.again
            assert self.gm is not None and again is not None  # what only measures has none

            def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
                # Of the call that has it compiled: it may be for another layer's parameters.
                only = _only.get() if known else None
                return again(gm, inputs, only=only, measure_only=not known)

            self._variants[known] = torch.compile(self.gm, backend=backend)
        return self._variants[known]

    def _tell(self, what: str, reason: str) -> None:
        """Warn once that a decode step leaves nothing out of ``what``."""
        if not self._told:
            self._told = True
            message = f"popc: a decode step runs dense ({what}): {reason}"
            warnings.warn(message, PopcWarning, stacklevel=2)

    def _limits(
        self, instance: _Instance, session: Session, batch: int | None
    ) -> ThresholdInputs | None:
        """Thresholds and centers, or None if they are not known."""
        assert instance.scale is not None
        groups = instance.contracted
        return session.limits(
            instance.owner, groups, self.scope, self.budget, instance.scale, batch
        )

    def _base(self, args: Sequence[Any], instance: _Instance, center: torch.Tensor) -> torch.Tensor:
        """What the linears make of the centers, float32 ``[S, ΣN]``: most are 0, and not read."""
        assert instance.scale is not None
        parts = []
        places = segment_offsets([template.group for template in self.contracted])
        for template, (start, stop) in zip(self.contracted, places, strict=True):
            norm = instance.scale[start:stop]
            for linear, real in held(template.group.linears, template.weights, args):
                x = center[:, start:stop].to(real.dtype)
                op = select_kernel(threshold_linear, x, real)
                y = op(x, real, None, norm, norm.new_zeros(1), linear.weight.out_dim)
                parts.append(y.float())
        return torch.cat(parts, 1)

    def _instance(self, args: Sequence[Any]) -> _Instance:
        """The states for the parameters among ``args``."""
        if self._changes != weight_watch.changes():
            self._drop_changed()
        parameters = self._weights_of(args)
        last = self._last
        if last is not None and last.ids == tuple(map(id, parameters)):
            instance = last.instance
            if instance is not None:
                return instance
        key = tuple(identity(args[i]) for i in self.weights)
        with self._lock:
            if key not in self._instances:
                self._instances[key] = self._new_instance(args)
            instance = self._instances[key]
        self._last = _Last(parameters, instance)
        return instance

    def _drop_changed(self) -> None:
        """Forget the states of weights that have changed since they were made."""
        with self._lock:
            self._changes, self._last = weight_watch.changes(), None
            for key, instance in list(self._instances.items()):
                if weight_watch.have_changed(key, instance.changes):
                    del self._instances[key]

    def _new_instance(self, args: Sequence[Any]) -> _Instance:
        changes = weight_watch.changes()  # before norms are taken: a change meanwhile counts

        def states(held: Sequence[tuple[RegionBinding, Counts, Config]]) -> list[RegionState]:
            return [t.state(args, n, config.unit_policy(t.region.kind)) for t, n, config in held]

        def scale(held: Sequence[InputGroupBinding]) -> torch.Tensor | None:
            return torch.cat([template.scale(args) for template in held]) if held else None

        if self.on_plan is not None:
            regions = [t.named(args) for t, _, _ in (*self.slots, *self.prefill)]
            groups = [t.named(args) for t in (*self.contracted, *self.measured_inputs)]
            self.on_plan(Plan(regions=regions, inputs=groups))
        return _Instance(
            owner=object(),
            changes=changes,
            slots=states(self.slots),
            prefill=states(self.prefill),
            contracted=[template.state(args) for template in self.contracted],
            measured_inputs=[template.state(args) for template in self.measured_inputs],
            scale=scale(self.contracted),
            measured_scale=scale(self.measured_inputs),
            sample=self._sample(args) if self.begins else None,
        )

    def _has_changed(self, instance: _Instance, args: Sequence[Any]) -> bool:
        """Whether weights are others than those whose norms the instance holds."""
        return instance.sample is not None and not torch.equal(instance.sample, self._sample(args))

    def _sample(self, args: Sequence[Any]) -> torch.Tensor:
        return weight_watch.sample([args[i] for i in self.weights])

    def _session_of(self, args: Sequence[Any]) -> Session:
        """The session of the cache tensors among ``args``; a new one where there is none."""
        session = sessions.of_tensors(args[i] for i in self.activations)
        if session is None:
            if self.activations and self.decodes:
                return Session(whole=False, base=sessions.offered().base)
            return sessions.offered()
        if (
            (self.prefill or self.measured_inputs)
            and self.written
            and not any(bool(args[i].any()) for i in self.written[:1])
        ):
            # A static cache that was reset holds zeros: a new generation begins in it.
            return sessions.offered()
        return session

    def _touch(self, session: Session, args: Sequence[Any], outputs: Sequence[Any]) -> None:
        written = [args[i] for i in self.written]
        sessions.touch([*written, *(t for t in outputs if _is_cache_like(t))], session)


def _is_cache_like(value: Any) -> bool:
    """A floating tensor with batch, token and feature axes, as caches and hidden states are."""
    return isinstance(value, torch.Tensor) and value.dim() >= 3 and value.is_floating_point()


def _batch_of(
    work: RewritePlan, placeholders: Sequence[fx.Node], scope: str
) -> Callable[[Sequence[Any]], int | None]:
    """How to tell the batch size of the regions from a call's inputs; None: it is not needed."""
    values = [slot.region.hidden for slot in work.pruned]
    values += [region.hidden for region in work.measured]
    values += [group.x for group in (*work.contracted, *work.measured_inputs)]
    if scope == "batch" or not values:
        return lambda args: None
    rows = rows_of(values[0])
    batch = shape(rows.grid if rows is not None else values[0])[0]
    if isinstance(batch, int):
        return lambda args: batch
    for i, node in enumerate(placeholders):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dim() and same_size(value.shape[0], batch):
            return lambda args: int(args[i].shape[0])
    return lambda args: None

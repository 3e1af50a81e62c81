"""What runs around a compiled graph: the session is found, its partition fed, statistics taken."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from popc import state
from popc.analysis.capture import Captured, identity
from popc.analysis.labels import same_size
from popc.analysis.plan import Plan, Region
from popc.analysis.tokens import rows_of
from popc.analysis.walk import shape
from popc.config import Config, Counts
from popc.log import log_graph
from popc.passes.decode import prune_regions
from popc.passes.layout import read_as_stored
from popc.passes.pack import has_kernel, pack_weights
from popc.passes.packing import Slot
from popc.passes.prefill import add_statistics
from popc.state import RegionState, Session

Compiled = Callable[..., Sequence[Any]]


@dataclass(frozen=True, eq=False)
class Template:
    """A region of a compiled graph, and at which inputs the weights are that contract it.

    Dynamo runs one graph for several layers where they differ in their parameters alone, so what
    belongs to a parameter is looked up by each call's own inputs.
    """

    region: Region
    weights: tuple[int, ...]

    @classmethod
    def of(cls, region: Region, captured: Captured) -> Template:
        placeholders = [n for n in captured.gm.graph.nodes if n.op == "placeholder"]
        place = {node: i for i, node in enumerate(placeholders)}
        return cls(region, tuple(place[c.weight.parameter] for c in region.consumers))

    def named(self, args: Sequence[Any]) -> Region:
        """The region as it is for the parameters among ``args``."""
        consumers = zip(self.region.consumers, self.weights, strict=True)
        identities = tuple((identity(args[at]), *c.weight.identity[1:]) for c, at in consumers)
        return replace(self.region, key=(identities, *self.region.key[1:]))

    def state(self, args: Sequence[Any], counts: Counts) -> RegionState:
        region = self.region
        columns = torch.from_numpy(region.columns)
        squares = []
        for linear, at in zip(region.consumers, self.weights, strict=True):
            real = linear.weight.replayed(args[at].detach())
            wide = torch.promote_types(real.dtype, torch.float32)
            dim = linear.weight.out_dim
            norm = torch.linalg.vector_norm(real, dim=dim, dtype=wide)
            squares.append(norm.square()[..., columns.to(real.device)].sum(-1))
        return RegionState(
            key=self.named(args).key,
            columns=columns,
            width=region.width,
            experts=region.experts,
            counts=counts,
            norm=torch.stack(squares).sum(0).sqrt().float(),
            cached=region.cached,
            one_pass=region.one_pass,
        )


@dataclass(frozen=True, eq=False)
class _Instance:
    """The states of a graph's regions for the parameters of one layer, or of one model."""

    owner: object
    slots: list[RegionState]
    prefill: list[RegionState]


class CompiledGraph:
    """One compiled graph: finds the session, feeds the partition, takes the statistics.

    A graph that prunes has a dense twin, compiled when a call first needs it, for tokens that come
    without a partition.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        captured: Captured,
        slots: list[Slot],
        prefill: list[Region],
        example_inputs: Sequence[Any],
        config: Config,
        generate: Callable[[fx.GraphModule, Sequence[Any]], Compiled],
        measuring: Callable[..., Compiled] | None,
        on_plan: Callable[[Plan], None] | None,
    ) -> None:
        self.gm, self.measuring = gm, measuring
        self.on_plan = on_plan
        self.scope = config.scope
        placeholders = [n for n in captured.gm.graph.nodes if n.op == "placeholder"]
        self.slots = [(Template.of(slot.region, captured), slot.counts) for slot in slots]
        self.prefill = [
            (Template.of(region, captured), config.counts(region.units)) for region in prefill
        ]
        templates = [template for template, _ in (*self.slots, *self.prefill)]
        self.weights = sorted({i for template in templates for i in template.weights})
        self._instances: dict[tuple[int, ...], _Instance] = {}
        self._last: tuple[list[weakref.ref[Any]], _Instance] | None = None
        self.batch = _batch_of(slots, prefill, placeholders, config.scope)
        self.activations = [
            i
            for i, node in enumerate(placeholders)
            if node not in captured.parameters and _is_cache_like(node.meta.get("val"))
        ]
        self.written = [i for i in self.activations if _is_written(placeholders[i])]
        self.cached = any(region.cached for region in prefill)
        self._dense: Compiled | None = None
        count = len(placeholders)
        if prefill:
            add_statistics(captured, prefill, config.scope)
        if slots:
            self.packing = prune_regions(captured, slots, config.scope)
        device = (slots[0].region if slots else prefill[0]).hidden.meta["val"].device
        self.packer = None if has_kernel(device) else pack_weights(captured)
        read_as_stored(captured)
        added = [n for n in captured.gm.graph.nodes if n.op == "placeholder"][count:]
        log_graph("rewritten", captured.gm)
        self.run = generate(captured.gm, [*example_inputs, *(n.meta["val"] for n in added)])

    def __call__(self, *args: Any) -> Sequence[Any]:
        session = state.named()
        by_tensors = session is None
        if session is None:
            session = self._session_of(args)
        with torch.no_grad():
            outputs = self._run(args, session)
        if by_tensors:
            self._touch(session, args, outputs)
        return outputs

    def _run(self, args: Sequence[Any], session: Session) -> Sequence[Any]:
        instance = self._instance(args)
        batch = self.batch(args)
        inputs = list(args)
        if self.cached:
            cached = [region for region in instance.prefill if region.cached]
            inputs.append(session.keep(cached, self.scope, batch or 1))
        if self.slots:
            partition = session.partition(
                instance.owner, instance.slots, self.packing, self.scope, batch
            )
            if partition is None:
                with state.use(session):
                    return self.dense(*args)
            inputs += [partition.index, partition.norm]
            if self.packer is not None:
                if partition.weights is None:
                    partition.weights = self.packer(inputs)
                inputs += partition.weights
        outputs = self.run(*inputs)
        if self.prefill:
            *outputs, sums = outputs
            # One token measures nothing if tokens before it were never seen: it stays dense.
            if self.measuring is not None or session.whole:
                session.add(instance.prefill, self.scope, sums)
        return outputs

    def _instance(self, args: Sequence[Any]) -> _Instance:
        """The states for the parameters among ``args``."""
        if self._last is not None:
            refs, instance = self._last
            if all(ref() is args[i] for ref, i in zip(refs, self.weights, strict=True)):
                return instance
        key = tuple(identity(args[i]) for i in self.weights)
        if key not in self._instances:
            self._instances[key] = _Instance(
                owner=object(),
                slots=[template.state(args, counts) for template, counts in self.slots],
                prefill=[template.state(args, counts) for template, counts in self.prefill],
            )
            if self.on_plan is not None:
                every = (*self.slots, *self.prefill)
                self.on_plan(Plan(regions=[template.named(args) for template, _ in every]))
        self._last = [weakref.ref(args[i]) for i in self.weights], self._instances[key]
        return self._instances[key]

    @property
    def dense(self) -> Compiled:
        """The graph as Dynamo gave it, compiled on its own (with guards of its own).

        It measures as a prefill does: the first token of an empty cache is all the prompt there is.
        """
        if self._dense is None:
            assert self.measuring is not None  # a graph that measures prunes nothing
            self._dense = torch.compile(self.gm, backend=self.measuring)
        return self._dense

    def _session_of(self, args: Sequence[Any]) -> Session:
        """The session of the cache tensors among ``args``; a new one where there is none."""
        session = state.of_tensors(args[i] for i in self.activations)
        if session is None:
            return Session(whole=not self.slots or not self.activations)
        if self.prefill and self.written and not any(bool(args[i].any()) for i in self.written[:1]):
            # A static cache that was reset holds zeros: a new generation begins in it.
            return Session()
        return session

    def _touch(self, session: Session, args: Sequence[Any], outputs: Sequence[Any]) -> None:
        written = [args[i] for i in self.written]
        state.touch([*written, *(t for t in outputs if _is_cache_like(t))], session)


def _is_cache_like(value: Any) -> bool:
    """A floating tensor with batch, token and feature axes, as caches and hidden states are."""
    return isinstance(value, torch.Tensor) and value.dim() >= 3 and value.is_floating_point()


def _is_written(node: fx.Node) -> bool:
    """Whether the graph writes to this input in place, as it does to a static cache."""
    for user in node.users:
        schema = getattr(user.target, "_schema", None)
        if schema is None:
            continue
        first = schema.arguments[0].alias_info if schema.arguments else None
        if first is None or user.args[:1] != (node,):
            continue
        if first.is_write or _is_written(user):
            return True
    return False


def _batch_of(
    slots: Sequence[Slot], prefill: Sequence[Region], placeholders: Sequence[fx.Node], scope: str
) -> Callable[[Sequence[Any]], int | None]:
    """How to tell the batch size of the regions from a call's inputs; None: it is not needed."""
    hidden = [*(slot.region.hidden for slot in slots), *(region.hidden for region in prefill)]
    if scope == "batch" or not hidden:
        return lambda args: None
    rows = rows_of(hidden[0])
    batch = shape(rows.grid if rows is not None else hidden[0])[0]
    if isinstance(batch, int):
        return lambda args: batch
    for i, node in enumerate(placeholders):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dim() and same_size(value.shape[0], batch):
            return lambda args: int(args[i].shape[0])
    return lambda args: None

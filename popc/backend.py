"""The Dynamo backend: capture, analysis, passes, Inductor, and what runs around the compiled graph.

``torch.compile(model, backend="popc", options={"sparsity": 0.4})``
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.utils.weak import WeakTensorKeyDictionary

from popc import compat, state
from popc.analysis.capture import Captured, capture_dynamo, identity
from popc.analysis.cost import saves
from popc.analysis.labels import same_size
from popc.analysis.plan import Plan, Region, Skipped
from popc.analysis.regions import find_regions
from popc.analysis.tokens import is_one_token, rows_of
from popc.analysis.walk import shape
from popc.config import Config, Counts
from popc.errors import GraphError
from popc.log import log_graph, logger
from popc.passes.decode import prune_regions
from popc.passes.experts import can_flatten
from popc.passes.layout import lay_out, read_as_stored
from popc.passes.pack import has_kernel, pack_weights
from popc.passes.packing import Slot, slot_of
from popc.passes.prefill import add_statistics
from popc.state import RegionState, Session

Compiled = Callable[..., Sequence[Any]]


def popc_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    config: Config | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    measure_only: bool = False,
) -> Compiled:
    """Compile one Dynamo graph; registered with ``torch.compile`` as ``"popc"``.

    Args:
        options: fields of :class:`popc.Config` by name.
        mode: a mode of ``torch.compile``, turned into Inductor's options.
        on_plan: called with the plan of each graph; ``popc.compile`` collects them.
        measure_only: treat a decode graph as a prefill: dense, with statistics.

    Raises:
        ConfigError: an option is unknown or has a value that is not allowed.
    """
    config = given = Config.of(config, options)
    inductor = {**(torch._inductor.list_mode_options(mode) if mode else {}), **config.inductor}

    def generate(graph: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        if given.codegen == "eager":
            return graph
        return compat.inductor(graph, inputs, inductor)

    if _needs_grad(example_inputs):
        warnings.warn(
            "popc prunes inference only: this call needs gradients and runs dense. "
            "Call the model under torch.no_grad() to have it pruned.",
            stacklevel=2,
        )
        return generate(gm, example_inputs)
    try:
        captured = capture_dynamo(gm, example_inputs)
    except GraphError as error:
        logger.warning("left dense: %s", error)
        return generate(gm, example_inputs)
    log_graph("captured", captured.gm)
    plan = find_regions(captured)
    plan.regions = [_as_known(region, captured) for region in plan.regions]
    config = _resolved(config, captured, plan)
    _leave_what_costs_more(plan, config)
    if not captured.runnable:
        _leave_all(plan, "the graph holds a vmap that can't be traced again", "vmap")
    regions = _laid_out(captured, plan, config)
    if on_plan is not None:
        on_plan(plan)
    prefill, slots = _phases(regions, config, measure_only)
    logger.info(
        "%d regions: %d pruned here, %d measured; %d refusals",
        len(plan.regions),
        len(slots),
        len(prefill),
        len(plan.skipped),
    )
    if not regions:
        if read_as_stored(captured):
            return generate(captured.gm, example_inputs)
        return generate(gm, example_inputs)
    measuring = functools.partial(popc_backend, config=config, mode=mode, measure_only=True)
    try:
        return _CompiledGraph(
            gm,
            captured,
            slots,
            prefill,
            example_inputs,
            config,
            generate,
            None if measure_only else measuring,
            on_plan,
        )
    except GraphError as error:
        # The passes work on a re-trace: the graph that Dynamo gave is as it was.
        logger.warning("left dense: %s", error)
        return generate(gm, example_inputs)


_units = WeakTensorKeyDictionary()


def _as_known(region: Region, captured: Captured) -> Region:
    """The region with the coarsest units that any graph has shown.

    Where keys and values of another sequence come from a cache, the graph shows query heads alone:
    that some share a KV head stands in the graph that filled the cache.
    """
    held = _units.setdefault(captured.parameters[region.consumers[0].weight.parameter], {})
    known = held.get(region.key)
    if known is None or len(known) > region.units:
        held[region.key] = region.columns
    elif len(known) < region.units:
        return region.coarsened(known)
    return region


def _resolved(config: Config, captured: Captured, plan: Plan) -> Config:
    """``config`` with a sparsity for this graph's regions, where the model's is given."""
    if config.model_sparsity is None:
        return config
    sizes = {id(tensor): tensor.numel() for tensor in captured.parameters.values()}
    prunable = sum(r.parameters for r in plan.regions if r.kind in config.targets)
    return config.resolved(sum(sizes.values()), prunable)


def _leave_all(plan: Plan, reason: str, kind: str) -> None:
    plan.skipped += [Skipped(r.name, reason, "", r.source, kind) for r in plan.regions]
    plan.regions.clear()


def _leave_what_costs_more(plan: Plan, config: Config) -> None:
    """Refuse targeted regions whose lists are larger than what pruning leaves unread."""
    for region in list(plan.regions):
        reason = saves(region, config) if region.kind in config.targets else None
        if reason is not None and config.counts(region.units).active < region.units:
            plan.regions.remove(region)
            skip = Skipped(region.name, reason, "", region.source, "costs more")
            plan.skipped.append(skip)


def _laid_out(captured: Captured, plan: Plan, config: Config) -> list[Region]:
    """The regions to rewrite, their weights laid out by channel; Dynamo traces again if need be."""
    regions = [r for r in plan.regions if _prunable(r, config)]
    if not regions or not has_kernel(regions[0].hidden.meta["val"].device):
        return regions
    changed, refused = lay_out(captured, regions)
    if changed:
        compat.restart_tracing()
    for region, reason in refused.items():
        plan.regions.remove(region)
        plan.skipped.append(Skipped(region.name, reason, "", region.source, "layout"))
    return [region for region in regions if region not in refused]


def _needs_grad(inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in inputs
    )


def _prunable(region: Region, config: Config) -> bool:
    """Whether ``config`` wants the region rewritten; with every unit active it stays dense."""
    if region.kind not in config.targets:
        return False
    linears = [*(p.linear for p in region.producers), *region.consumers]
    if region.experts and (
        region.one_pass or config.scope == "sequence" or not all(map(can_flatten, linears))
    ):
        return False
    if config.scope == "sequence" and len(shape(region.hidden)) != 3:
        rows = rows_of(region.hidden)
        if region.one_pass or rows is None or not rows.is_plain:
            return False
    return config.counts(region.units).active < region.units


def _phases(
    regions: Sequence[Region], config: Config, measure_only: bool
) -> tuple[list[Region], list[Slot]]:
    """The regions to measure, and those to prune."""
    single = {region.key: is_one_token(region.hidden) for region in regions}
    # Where a region's rows can't be told apart, it runs on the tokens that the others run on.
    default = any(single.values())
    prefill, slots = [], []
    for region in regions:
        one = single[region.key]
        if region.one_pass or ((default if one is None else one) and not measure_only):
            slots.append(slot_of(region, config.counts(region.units)))
        else:
            prefill.append(region)
    return prefill, slots


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


class _CompiledGraph:
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

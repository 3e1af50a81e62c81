"""The Dynamo backend: capture, analysis, passes, Inductor.

``torch.compile(model, backend="popc", options={"sparsity": 0.4})``
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.weak import WeakTensorKeyDictionary

from popc import compat
from popc.analysis.capture import Captured, capture_dynamo
from popc.analysis.cost import saves
from popc.analysis.plan import Plan, Region, Skipped
from popc.analysis.regions import find_regions
from popc.analysis.tokens import is_one_token, rows_of
from popc.analysis.walk import shape
from popc.config import Config
from popc.errors import GraphError
from popc.log import log_graph, logger
from popc.passes.experts import can_flatten
from popc.passes.layout import lay_out, read_as_stored
from popc.passes.pack import has_kernel
from popc.passes.packing import Slot, slot_of
from popc.runtime import Compiled, CompiledGraph


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
        if captured.runnable and read_as_stored(captured):
            return generate(captured.gm, example_inputs)
        return generate(gm, example_inputs)
    measuring = functools.partial(popc_backend, config=config, mode=mode, measure_only=True)
    try:
        return CompiledGraph(
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

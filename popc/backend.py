"""The Dynamo backend: capture, analysis, passes, Inductor.

``torch.compile(model, backend="popc", options={"sparsity": 0.4})``
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils.weak import WeakTensorKeyDictionary

from popc import compat, version
from popc.analysis.capture import Captured, capture_dynamo
from popc.analysis.findings import Findings, Region
from popc.analysis.input_groups import InputGroup, find_input_groups
from popc.analysis.linears import all_linears
from popc.analysis.mutation import is_written
from popc.analysis.plan import Plan, Skipped
from popc.analysis.propagation import shape
from popc.analysis.regions import find_regions
from popc.analysis.tokens import is_one_token, rows_of
from popc.config import Config
from popc.errors import ConfigError, GraphError, PassError, PopcWarning
from popc.log import log_graph, logger
from popc.passes.base import run_pass
from popc.passes.dense.pipeline import run_dense_passes
from popc.passes.experts import can_flatten
from popc.passes.pack import has_kernel
from popc.passes.packing import slot_of
from popc.passes.weight_layout import store_channel_major
from popc.planning.budget_solver import resolve
from popc.planning.cost import saves
from popc.runtime.compiled_graph import Compiled, CompiledGraph, RewritePlan
from popc.runtime.interpreter import Interpreted


def popc_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    config: Config | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    measure_only: bool = False,
    only: Collection[Hashable] | None = None,
    has_calibration: bool = False,
) -> Compiled:
    """Compile one Dynamo graph; registered with ``torch.compile`` as ``"popc"``.

    Args:
        options: fields of :class:`popc.Config` by name.
        mode: a mode of ``torch.compile``, turned into Inductor's options.
        on_plan: called with the plan of each graph; ``popc.compile`` collects them.
        measure_only: treat a decode graph as a prefill: dense, with statistics.
        only: keys of the regions that are pruned by units; None: all that ``config`` has.
        has_calibration: whether a text given beforehand was, or will be, measured.

    Raises:
        ConfigError: an option is unknown or has a value that is not allowed.
    """
    config = given = Config.of(config, options)
    if config.calibrated and not has_calibration:
        allowed = "one that goes by the prompt; popc.compile(..., calibration=...) takes a text"
        raise ConfigError("policy", config.calibrated, allowed)
    if options and config.guards != "token":
        allowed = "'token', or popc.compile: torch.compile itself makes the guards"
        raise ConfigError("guards", config.guards, allowed)
    inductor = {**compat.mode_options(mode), **config.inductor}

    def generate(graph: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        if given.codegen == "eager":
            return Interpreted(graph)
        if graph is not gm:
            compat.keep_inputs(graph, gm, is_written)
        # Inductor's own key has the graph and its options; of the rest of Config nothing reaches
        # the code, so that thresholds of another sparsity find it again. What does is how popc's
        # ops and passes are written.
        return compat.inductor(graph, inputs, inductor, f"popc {version.sources_digest()}")

    if _needs_grad(example_inputs):
        warnings.warn(
            "popc prunes inference only: this call needs gradients and runs dense. "
            "Call the model under torch.no_grad() to have it pruned.",
            stacklevel=2,
        )
        return generate(gm, example_inputs)

    def construct(captured: Captured, work: RewritePlan, config: Config) -> Compiled:
        if work.measured or work.measured_inputs:
            # CUDA graphs of prompts gain nothing, and each length is recorded on its own.
            inductor["triton.cudagraphs"] = False
        again = None
        if not measure_only:
            again = functools.partial(
                popc_backend, config=config, mode=mode, has_calibration=has_calibration
            )
        return CompiledGraph(gm, captured, work, example_inputs, config, generate, again, on_plan)

    job = _Job(gm, example_inputs, config, measure_only, only, generate, construct)
    made, found = job.run()
    if on_plan is not None:
        on_plan(found.plan())
    return made


@dataclass(frozen=True)
class _Job:
    """A graph to compile.

    ``generate`` makes code of a graph as it is; ``construct`` has the passes rewrite it first.
    """

    gm: fx.GraphModule
    example_inputs: Sequence[Any]
    config: Config
    measure_only: bool
    only: Collection[Hashable] | None
    generate: Callable[[fx.GraphModule, Sequence[Any]], Compiled]
    construct: Callable[[Captured, RewritePlan, Config], Compiled]

    def run(self) -> tuple[Compiled, Findings]:
        """What it was compiled to, and what of it is pruned: nothing, if a pass fails.

        Passes work on a trace of their own, so the graph that Dynamo gave is as it was then.
        """
        made, failed, plan = None, None, Findings()
        try:
            while made is None:
                plan = Findings()
                made = self._attempt(plan)
        except GraphError as error:
            logger.warning("left dense: %s", error)
            plan.leave(str(error), "capture")
        except PassError as error:
            failed = str(error)
            plan.leave(failed, "failed")
        if failed is not None:
            warnings.warn(_FAILED.format(failed), PopcWarning, stacklevel=3)
        return made or self.generate(self.gm, self.example_inputs), plan

    def _attempt(self, plan: Findings) -> Compiled | None:
        """None if weights were laid out otherwise: what was captured is out of date then.

        ``plan`` gains what is found, as soon as it is.
        """
        captured = run_pass("capture", capture_dynamo, self.gm, self.example_inputs)
        log_graph("captured", captured.gm)
        config = _find(captured, self.config, plan)
        _leave(plan, lambda region: self._unmeasured(region, config), "unmeasured")
        rewritten = _laid_out(captured, plan, config)
        if rewritten is None:
            return None
        work = run_pass("choose work", _work, captured, *rewritten, config, self.measure_only)
        logger.info(
            "%d regions and %d inputs of linears: %d pruned here, %d measured; %d refusals",
            len(plan.regions),
            len(plan.inputs),
            len(work.pruned) + len(work.contracted),
            len(work.measured) + len(work.measured_inputs),
            len(plan.skipped),
        )
        if work.device is not None:
            return run_pass("construct", self.construct, captured, work, config)
        if captured.runnable and run_dense_passes(captured, decodes=False):
            return run_pass("generate code", self.generate, captured.gm, self.example_inputs)
        return self.generate(self.gm, self.example_inputs)

    def _unmeasured(self, region: Region, config: Config) -> str | None:
        if self.only is None or not config.prunes_units(region) or region.key in self.only:
            return None
        return _UNMEASURED


_UNMEASURED = "its prompt was measured in a graph that splits the model otherwise"
_FAILED = (
    "popc: {}. This graph runs dense: what it gives is right, but nothing is saved. It is a fault "
    "of popc's, please report it; with POPC_RAISE=1 in the environment the error itself is raised."
)


def _find(captured: Captured, config: Config, plan: Findings) -> Config:
    """Regions and inputs of the graph, those that ``config`` has pruned: they go to ``plan``.

    Returns:
        ``config`` with a sparsity for this graph.
    """
    found = run_pass("find regions", find_regions, captured)
    plan.regions = [_as_known(region, captured) for region in found.regions]
    plan.skipped = found.skipped
    if not captured.runnable:
        reason = "the graph holds values that only its trace had, of a vmap or a loop"
        _leave(plan, lambda _: reason, "vmap")
    else:
        plan.inputs = run_pass("find inputs", find_input_groups, captured, plan.regions)
    sizes = {id(tensor): tensor.numel() for tensor in captured.parameters.values()}
    described = run_pass("describe regions", plan.plan)
    config = run_pass("resolve budget", resolve, config, sum(sizes.values()), described)
    run_pass("choose regions", _choose, plan, config)
    return config


def _choose(plan: Findings, config: Config) -> None:
    """Leave out of ``plan`` what ``config`` does not prune, or not with a gain."""
    _leave(plan, lambda region: _refused(region, config), "policy")
    _leave(plan, lambda region: _costs_more(region, config), "costs more")
    by_units = {
        linear.node
        for region in plan.regions
        if prunable(region, config)
        for linear in region.linears
    }
    plan.inputs = [
        group
        for group in plan.inputs
        # Between two regions, with nothing between them, a linear may be of both kinds.
        if _contracts(group, config) and by_units.isdisjoint(n.node for n in group.linears)
    ]


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


def _leave(plan: Findings, reason_of: Callable[[Region], str | None], kind: str) -> None:
    """Take the regions out of the plan for which there is a reason."""
    for region in list(plan.regions):
        reason = reason_of(region)
        if reason is not None:
            plan.regions.remove(region)
            plan.skipped.append(Skipped(region.name, reason, "", region.source, kind))


def _refused(region: Region, config: Config) -> str | None:
    if not config.prunes_units(region):
        return None
    reason = config.unit_policy(region.kind).refuses(region)
    return None if reason is None else f"{config.policy_of(region.kind)}: {reason}"


def _costs_more(region: Region, config: Config) -> str | None:
    """Why the lists of a targeted region are larger than what pruning leaves unread."""
    if not config.prunes_units(region) or _active(region, config) == region.units:
        return None
    return saves(region.record, config)


def _laid_out(
    captured: Captured, plan: Findings, config: Config
) -> tuple[list[Region], list[InputGroup]] | None:
    """What to rewrite, its weights laid out by channel; None if that moved some."""
    regions = [r for r in plan.regions if prunable(r, config)]
    device = RewritePlan(measured=regions, measured_inputs=plan.inputs).device
    if device is None or not has_kernel(device):
        return regions, list(plan.inputs)
    owners = [*regions, *plan.inputs]
    changed, refused = run_pass("lay out weights", store_channel_major, captured, owners)
    if changed:
        compat.take_new_strides(changed)
        return None
    for owner, reason in refused.items():
        plan.skipped.append(Skipped(owner.name, reason, "", owner.source, "layout"))
    plan.regions = [region for region in plan.regions if region not in refused]
    plan.inputs = [group for group in plan.inputs if group not in refused]
    return [region for region in regions if region not in refused], list(plan.inputs)


def _contracts(group: InputGroup, config: Config) -> bool:
    if not config.prunes_inputs(group.kind) or config.input_budget.share >= 1:
        return False
    if config.scope == "batch" or len(shape(group.x)) == 3:
        return True
    rows = rows_of(group.x)
    return rows is not None and rows.is_plain


def _active(region: Region, config: Config) -> int:
    return config.counts(region.units, region.kind).active


def _needs_grad(inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in inputs
    )


def prunable(region: Region, config: Config) -> bool:
    """Whether ``config`` wants the region rewritten; with every unit active it stays dense."""
    if not config.prunes_units(region):
        return False
    if region.experts and (
        region.one_pass or config.scope == "sequence" or not all(map(can_flatten, region.linears))
    ):
        return False
    if config.scope == "sequence" and len(shape(region.hidden)) != 3:
        rows = rows_of(region.hidden)
        if region.one_pass or rows is None or not rows.is_plain:
            return False
    return _active(region, config) < region.units


def _work(
    captured: Captured,
    regions: Sequence[Region],
    inputs: Sequence[InputGroup],
    config: Config,
    measure_only: bool,
) -> RewritePlan:
    """What to measure in a graph, and what to prune."""
    single: dict[Any, bool | None] = {r: is_one_token(r.hidden) for r in regions}
    single |= {group: is_one_token(group.x) for group in inputs}
    # Where rows can't be told apart, they are of the tokens that the others are of; where none of
    # these can, as with stacked experts alone, of those of the graph's other linears.
    told: Collection[bool | None] = single.values()
    if all(one is None for one in told):
        told = [is_one_token(linear.x) for linear in all_linears(captured)]
    default = any(told)

    def prunes(owner: Region | InputGroup) -> bool:
        one = single[owner]
        return (default if one is None else one) and not measure_only

    slots = [r for r in regions if r.one_pass or prunes(r)]
    contracted = [group for group in inputs if prunes(group)]
    return RewritePlan(
        measured=[r for r in regions if r not in slots],
        pruned=[slot_of(r, config) for r in slots],
        # What runs on many tokens in a decode step, as on a whole cache, is never contracted.
        measured_inputs=[] if contracted else inputs,
        contracted=contracted,
    )

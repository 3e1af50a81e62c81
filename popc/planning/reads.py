"""What a decode step reads of the weights, as planned or as counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from popc.analysis.plan import InputRecord, Plan, RegionRecord
from popc.config import Config


def decode_bytes(region: RegionRecord, config: Config) -> float:
    """Weight bytes that one decode step reads: live units' rows, active units' columns, and of
    what comes after a gate the rows of active units alone."""
    counts = config.counts(region.units, region.kind)
    live, active = counts.live / region.units, counts.active / region.units
    late = region.late_bytes if config.scores_gates(region) else 0
    return (region.producer_bytes - late) * live + (region.consumer_bytes + late) * active


def body_size(plan: Plan) -> tuple[int, int]:
    """How many weights all linears but the last have, and in how many bytes."""
    owners: list[InputRecord | RegionRecord] = [g for g in plan.inputs if g.kind != "head"]
    owners += [region for region in plan.regions if _is_apart(region)]
    return sum(o.parameters for o in owners), sum(o.weight_bytes for o in owners)


def _is_apart(region: RegionRecord) -> bool:
    """Whether its linears are in none of the plan's inputs."""
    return region.one_pass or (bool(region.experts) and not region.by_grade)


def decode_share(plan: Plan, config: Config) -> float:
    """See :meth:`popc.Plan.decode_share`."""
    regions = [region for region in plan.regions if config.prunes_units(region)]
    dense = sum(region.weight_bytes for region in regions)
    read = sum(decode_bytes(region, config) for region in regions)
    for group in plan.inputs:
        if config.prunes_inputs(group.kind):
            dense += group.weight_bytes
            read += (1 - config.sparsity) * group.weight_bytes
    return read / dense if dense else 1.0


def read_share(
    plan: Plan,
    config: Config,
    reads: Mapping[Any, Sequence[float]] | None = None,
    pruned: Plan | None = None,
) -> float:
    """See :meth:`popc.Plan.read_share`."""
    targets = pruned or plan
    regions = {region.key for region in targets.regions if config.prunes_units(region)}
    thresholded = {group.key for group in targets.inputs if config.prunes_inputs(group.kind)}
    dense = read = 0.0
    for region in plan.regions:
        if _is_apart(region):
            dense += region.weight_bytes
            read += region.weight_bytes
        if region.key in regions:
            read += decode_bytes(region, config) - region.weight_bytes
    for group in plan.inputs:
        if group.kind == "head":
            continue
        share = share_read(group, config, reads) if group.key in thresholded else 1.0
        dense += group.weight_bytes
        read += share * group.weight_bytes
    return read / dense if dense else 1.0


def read_bits(
    plan: Plan,
    config: Config,
    reads: Mapping[Any, Sequence[float]] | None = None,
    pruned: Plan | None = None,
) -> float:
    """See :meth:`popc.Plan.read_bits`."""
    parameters, total = body_size(plan)
    return 8 * read_share(plan, config, reads, pruned) * total / max(1, parameters)


def share_read(
    group: InputRecord, config: Config, reads: Mapping[Any, Sequence[float]] | None = None
) -> float:
    """The share of a group's channels that a step reads, if its inputs are pruned; of its bytes, if
    it reads them by grade.

    ``reads`` is as in :meth:`popc.Plan.read_share`.
    """
    steps = (reads or {}).get(group.key)
    return sum(steps) / len(steps) / group.width if steps else 1 - config.sparsity

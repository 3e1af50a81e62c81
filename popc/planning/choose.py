"""Which of the regions and inputs that the analysis found a configuration prunes, and gains by."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable

from torch.utils.weak import WeakTensorKeyDictionary

from popc.analysis.capture import Captured
from popc.analysis.findings import Findings, Region
from popc.analysis.input_groups import InputGroup
from popc.analysis.propagation import shape
from popc.analysis.tokens import rows_of
from popc.config import Config
from popc.planning.cost import saves

UNMEASURED = "its prompt was measured in a graph that splits the model otherwise"


def choose(findings: Findings, config: Config, only: Collection[Hashable] | None) -> None:
    """Leave out of ``findings`` what ``config`` does not prune, or not with a gain.

    Args:
        only: keys of the regions that are pruned by units; None: all that ``config`` has.
    """

    def unmeasured(region: Region) -> str | None:
        if only is None or not config.prunes_units(region) or region.key in only:
            return None
        return UNMEASURED

    refuse_where(findings, lambda region: _policy_refusal(region, config), "policy")
    refuse_where(findings, lambda region: _cost_refusal(region, config), "costs more")
    by_units = {
        linear.node
        for region in findings.regions
        if prunable(region, config)
        for linear in region.linears
    }
    findings.inputs = [
        group
        for group in findings.inputs
        # Between two regions, with nothing between them, a linear may be of both kinds.
        if _prunes_inputs(group, config) and by_units.isdisjoint(n.node for n in group.linears)
    ]
    refuse_where(findings, unmeasured, "unmeasured")


def refuse_where(findings: Findings, reason_of: Callable[[Region], str | None], kind: str) -> None:
    """Refuse the regions that have a reason."""
    reasons = {region: reason_of(region) for region in findings.regions}
    findings.refuse({r: reason for r, reason in reasons.items() if reason is not None}, kind)


_units = WeakTensorKeyDictionary()


def with_known_units(region: Region, captured: Captured) -> Region:
    """The region with the coarsest units that any graph has shown.

    Where keys and values of another sequence come from a cache, the graph shows query heads alone:
    that some share a KV head stands in the graph that filled the cache.
    """
    by_key = _units.setdefault(captured.parameters[region.consumers[0].weight.parameter], {})
    known = by_key.get(region.key)
    if known is None or len(known) > region.units:
        by_key[region.key] = region.columns
    elif len(known) < region.units:
        return region.coarsened(known)
    return region


def prunable(region: Region, config: Config) -> bool:
    """Whether ``config`` wants the region rewritten; with every unit active it stays dense."""
    if not config.prunes_units(region):
        return False
    if region.experts and (
        region.one_pass
        or config.scope == "sequence"
        or not all(linear.has_flat_rows for linear in region.linears)
    ):
        return False
    if config.scope == "sequence" and any(c.x is not region.hidden for c in region.consumers):
        return False  # some consumers have flattened its rows: whose are whose is not told
    if config.scope == "sequence" and len(shape(region.hidden)) != 3:
        rows = rows_of(region.hidden)
        if region.one_pass or rows is None or not rows.is_plain:
            return False
    return _active(region, config) < region.units


def _policy_refusal(region: Region, config: Config) -> str | None:
    if not config.prunes_units(region):
        return None
    reason = config.unit_policy(region.kind).refuses(region)
    return None if reason is None else f"{config.policy_of(region.kind)}: {reason}"


def _cost_refusal(region: Region, config: Config) -> str | None:
    """Why the lists of a targeted region are larger than what pruning leaves unread."""
    if not config.prunes_units(region) or _active(region, config) == region.units:
        return None
    return saves(region.record, config)


def _prunes_inputs(group: InputGroup, config: Config) -> bool:
    if not config.prunes_inputs(group.kind):
        return False
    if config.input_budget.share >= 1 and not group.is_quantized:
        return False  # what is read by grade gives calls budgets of their own at no cost
    if group.experts:
        return config.scope == "batch"  # whose rows are whose is not told
    if config.scope == "batch" or len(shape(group.x)) == 3:
        return True
    rows = rows_of(group.x)
    return rows is not None and rows.is_plain


def _active(region: Region, config: Config) -> int:
    return config.counts(region.units, region.kind).active

"""Budgets of a whole model, turned into the sparsity of what is targeted."""

from __future__ import annotations

from dataclasses import replace

from popc.analysis.plan import Plan
from popc.config import Config
from popc.errors import ConfigError
from popc.planning.reads import decode_bytes

_STEPS = 30
_HIGH = 0.99  # sparsity


def resolve(config: Config, parameters: int, plan: Plan) -> Config:
    """``config`` with a sparsity for this plan, where ``model_sparsity`` or ``bytes`` is given.

    Args:
        parameters: how many the graph, or the model, uses.

    Raises:
        ConfigError: what is targeted is too little to meet it.
    """
    if config.model_sparsity is not None:
        prunable = sum(r.parameters for r in plan.regions if config.prunes_units(r))
        prunable += sum(g.parameters for g in plan.inputs if config.prunes_inputs(g.kind))
        return config.resolved(parameters, prunable)
    if config.bytes is not None:
        return _with_bytes(config, plan)
    return config


def _with_bytes(config: Config, plan: Plan) -> Config:
    """r such that all linears but the last read ``bytes`` of their weights in a decode step."""
    assert config.bytes is not None
    body = [group for group in plan.inputs if group.kind != "head"]
    total = sum(group.weight_bytes for group in body)
    total += sum(r.weight_bytes for r in plan.regions if r.experts or r.one_pass)
    if not total:
        return replace(config, bytes=None)

    def read(sparsity: float) -> float:
        saved = sum(sparsity * g.weight_bytes for g in body if config.prunes_inputs(g.kind))
        at = replace(config, sparsity=sparsity, bytes=None)
        for region in plan.regions:
            if config.prunes_units(region):
                saved += region.weight_bytes - decode_bytes(region, at)
        return (total - saved) / total

    if read(_HIGH) > config.bytes:
        raise ConfigError(
            "bytes",
            config.bytes,
            f"what {config.targets} name leaves {read(_HIGH):.1%} of the bytes to read at least; "
            "add targets or ask for less",
        )
    low, high = 0.0, _HIGH
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if read(middle) > config.bytes else (low, middle)
    return replace(config, sparsity=high if config.bytes < 1 else 0.0, bytes=None)

"""Budgets of a whole model, turned into the sparsity of what is targeted."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

from popc.analysis.plan import Plan
from popc.config import CallBudget, Config
from popc.errors import ConfigError
from popc.planning.reads import body_size, decode_bytes
from popc.policies.allocation import Budget

_STEPS = 30
_HIGH = 0.99  # sparsity


@dataclass
class Budgets:
    """What decode steps of one graph may read: what its Config says, or a call.

    Attributes:
        asked: the Config as it was given.
        parameters: how many the graph uses.
        plan: what there is to prune in it.
    """

    asked: Config = field(default_factory=Config)
    parameters: int = 0
    plan: Plan = field(default_factory=Plan)
    _of_calls: dict[CallBudget, Budget] = field(default_factory=dict)

    @cached_property
    def config(self) -> Config:
        """``asked``, with a sparsity for this graph."""
        return resolve(self.asked, self.parameters, self.plan)

    def of(self, call: CallBudget | None) -> Budget:
        """That of a call; of the Config where a call has none.

        Raises:
            ConfigError: what is targeted is too little to meet it.
        """
        if call is None:
            return self.config.input_budget
        if call not in self._of_calls:
            config = resolve(self.asked.at(call), self.parameters, self.plan)
            self._of_calls[call] = config.input_budget
        return self._of_calls[call]


def resolve(config: Config, parameters: int, plan: Plan) -> Config:
    """``config`` with a sparsity for this plan, by ``model_sparsity``, ``bytes`` or ``bits``.

    Args:
        parameters: how many the graph, or the model, uses.

    Raises:
        ConfigError: what is targeted is too little to meet it.
    """
    if config.model_sparsity is not None:
        prunable = sum(r.parameters for r in plan.regions if config.prunes_units(r))
        prunable += sum(g.parameters for g in plan.inputs if config.prunes_inputs(g.kind))
        return config.resolved(parameters, prunable)
    if config.bits is not None:
        parameters, total = body_size(plan)
        share = config.bits * parameters / 8 / total if total else 1.0
        return _reading(replace(config, bits=None), plan, share, "bits", config.bits)
    if config.bytes is not None:
        asked = "bytes", config.bytes
        return _reading(replace(config, bytes=None), plan, config.bytes, *asked)
    return config


def _reading(config: Config, plan: Plan, share: float, name: str, asked: float) -> Config:
    """r such that all linears but the last read ``share`` of their weights in a decode step.

    Args:
        name: of the field by which it is asked for.
    """
    body = [group for group in plan.inputs if group.kind != "head"]
    _, total = body_size(plan)
    if not total:
        return config
    if share >= 1:
        return replace(config, sparsity=0.0)

    def read(sparsity: float) -> float:
        saved = sum(sparsity * g.weight_bytes for g in body if config.prunes_inputs(g.kind))
        at = replace(config, sparsity=sparsity)
        for region in plan.regions:
            if config.prunes_units(region):
                saved += region.weight_bytes - decode_bytes(region, at)
        return (total - saved) / total

    if read(_HIGH) > share:
        raise ConfigError(
            name,
            asked,
            f"what {config.targets} name leaves {read(_HIGH):.1%} of the bytes to read at least; "
            "add targets or ask for less",
        )
    low, high = 0.0, _HIGH
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if read(middle) > share else (low, middle)
    return replace(config, sparsity=high)

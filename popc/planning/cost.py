"""Cost: FLOPs and bytes read of every region, dense and pruned, as sympy expressions.

Symbols: ``B`` sequences; ``T`` new tokens of each, in the region's own count (patches in a vision
tower); ``S`` keys that they attend to, their own included; ``r`` and ``γ`` as in popc.Config.
Counted: products of linears and of attention (a multiplication and an addition are two FLOPs,
masked scores count), weights, keys and values, and the lists that pruning reads. Not counted:
activations, elementwise ops, and a linear's channels that are in no region.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import sympy  # type: ignore[import-untyped]
from rich.console import Console
from rich.table import Table

from popc.analysis.plan import InputRecord, Plan, RegionRecord
from popc.config import Config

B, T, S = sympy.symbols("B T S", positive=True, integer=True)
r, gamma = sympy.symbols("r γ", nonnegative=True)
_NAMED = {"B": B, "T": T, "S": S, "r": r, "gamma": gamma}

ZERO = sympy.S.Zero
INDEX, NORM = 8, 4  # bytes of an int64 in a list, of a float32 norm


class Amount(NamedTuple):
    """A cost in numbers."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Cost:
    """FLOPs, and bytes read: of weights, of lists with norms, of the context's keys and values."""

    flops: sympy.Expr
    weights: sympy.Expr
    lists: sympy.Expr = ZERO
    context: sympy.Expr = ZERO

    @property
    def bytes(self) -> sympy.Expr:
        """All bytes that a call reads."""
        return self.weights + self.lists + self.context

    def __add__(self, other: Cost) -> Cost:
        a, b = vars(self), vars(other)
        return Cost(**{name: a[name] + b[name] for name in a})

    def at(self, **values: float) -> Amount:
        """The numbers at ``B, T, S, r, gamma``, given by name: all that the expressions hold."""
        substitutions = {_NAMED[name]: value for name, value in values.items()}
        return Amount(*(round(float(e.subs(substitutions))) for e in (self.flops, self.bytes)))


class RegionCost(NamedTuple):
    """What a region costs with all its units, and with live and active ones alone."""

    dense: Cost
    pruned: Cost


def region_cost(region: RegionRecord, config: Config | None = None) -> RegionCost:
    """The cost of a region: in B, T, S, r and γ, the counts of units unrounded.

    With ``config``, its rounded counts replace r and γ, and its scope matters.
    """
    if config is not None and config.prunes_inputs(region.kind):
        if not config.prunes_units(region):
            return _inputs_cost_of(region, config)
    units = sympy.Integer(region.units)
    live = units * sympy.Min(1, sympy.Max(1 - r + gamma / 2, gamma))
    active = units * (1 - r)
    if config is not None:
        counts = config.counts(region.units, region.kind)
        live, active = sympy.Integer(counts.live), sympy.Integer(counts.active)
    late = region.late if config is not None and config.scores_gates(region) else None
    width = region.columns.shape[1]
    if region.one_pass:
        live = units  # this very pass scores: too late to leave rows out
    else:
        width += sum(p.channels for i, p in enumerate(region.producers) if i != late)
    dense, pruned = _linears(region, units, units), _linears(region, live, active, late)
    # Each expert has lists of its own, and a mark whether it runs dense.
    lists = _experts(region)[1] * live * (INDEX * width + NORM) + INDEX * region.experts
    per_sequence = config is not None and config.scope == "sequence" and not region.experts
    times = B if per_sequence else 1  # each sequence reads what its own lists name
    pruned = Cost(pruned.flops, times * pruned.weights, times * lists)
    attention = _attention(region)
    return RegionCost(dense + attention, pruned + attention)


def _inputs_cost_of(region: RegionRecord, config: Config) -> RegionCost:
    """Each linear reads 1 - r of its input channels, and a norm for each of them."""
    units = sympy.Integer(region.units)
    dense, share = _linears(region, units, units), 1 - sympy.Float(config.sparsity)
    norms = sympy.Integer(NORM * region.input_channels)
    pruned = Cost(share * dense.flops, share * dense.weights, norms)
    attention = _attention(region)
    return RegionCost(dense + attention, pruned + attention)


def inputs_cost(group: InputRecord, config: Config) -> RegionCost:
    """The cost of linears that share an input, dense and with it pruned, in B and T."""
    flops = 2 * B * T * sympy.Integer(group.parameters)
    dense = Cost(flops, sympy.Integer(group.weight_bytes))
    if not config.prunes_inputs(group.kind):
        return RegionCost(dense, dense)
    share = 1 - sympy.Float(config.sparsity)
    norms = sympy.Integer(NORM * group.width)
    return RegionCost(dense, Cost(share * dense.flops, share * dense.weights, norms))


def saves(region: RegionRecord, config: Config, B: int = 1) -> str | None:
    """None if a pruned decode step of ``B`` sequences reads fewer bytes; else why it does not."""
    dense, pruned = region_cost(region, config)
    lists = Cost(ZERO, pruned.lists).at(B=B, T=1).bytes
    saved = Cost(ZERO, dense.weights - pruned.weights).at(B=B, T=1).bytes
    if lists < saved:
        return None
    if saved < 0:
        return f"pruning would read {_size(-saved)} of weights more than dense does"
    return f"pruning would read {_size(lists)} of lists to save {_size(saved)} of weights"


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _linears(
    region: RegionRecord, rows: sympy.Expr, columns: sympy.Expr, late: int | None = None
) -> Cost:
    """Of the linears, where ``rows`` units are produced and ``columns`` units contracted.

    The producer of the number ``late`` comes after a gate, and produces only what is contracted.
    """
    flops, read = ZERO, ZERO
    for number, producer in enumerate(region.producers):
        linear = producer.linear
        channels = (columns if number == late else rows) * producer.channels
        flops += 2 * B * (S if producer.context else T) * channels * linear.inputs
        read += channels * (linear.inputs * linear.element_bytes + linear.bias_bytes)
    for linear in region.consumers:
        weights = columns * region.columns.shape[1] * linear.outputs
        flops += 2 * B * T * weights
        read += weights * linear.element_bytes
    each, stacks = _experts(region)
    return Cost(each * flops, stacks * read)


def _experts(region: RegionRecord) -> tuple[sympy.Expr, sympy.Expr]:
    """Experts that each token meets, and weights that are read: at most, since tokens may share an
    expert. 1 and 1 in other regions."""
    if not region.experts:
        return sympy.S.One, sympy.S.One
    each = sympy.Integer(region.experts_met)
    return each, sympy.Min(region.experts, B * T * each)


def _attention(region: RegionRecord) -> Cost:
    """Of ``q kᵀ`` and ``softmax(·) v``, in an attention's region."""
    if region.attention is None:
        return Cost(ZERO, ZERO)
    flops = 2 * B * T * S * region.attention.channels
    return Cost(flops, ZERO, context=B * S * sympy.sympify(region.attention.context_bytes))


class Row(NamedTuple):
    """A region, dense and as it runs; ``note`` says why the two are the same."""

    kind: str
    name: str
    dense: Amount
    pruned: Amount
    note: str


@dataclass(frozen=True)
class PlanCost:
    """What a plan's regions cost in one call; the last row is their sum."""

    title: str
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        table = Table(title=self.title)
        for heading in ("kind", "name", "MFLOP", "pruned", "MB", "pruned", "left dense because"):
            table.add_column(heading)
        for kind, name, dense, pruned, note in self.rows:
            numbers = (dense.flops, pruned.flops, dense.bytes, pruned.bytes)
            table.add_row(kind, name, *(f"{number / 1e6:11.4f}" for number in numbers), note)
        console = Console(width=140, no_color=True)
        with console.capture() as capture:
            console.print(table)
        return capture.get()


def plan_cost(plan: Plan, B: int, T: int, S: int, config: Config) -> PlanCost:
    """See :meth:`popc.Plan.cost`."""
    at = {"B": B, "T": T, "S": S}
    rows, both = [], (Cost(ZERO, ZERO), Cost(ZERO, ZERO))
    for region in plan.regions:
        dense, pruned = region_cost(region, config)
        note = "its kind is no target" if not config.prunes(region.kind) else None
        note = note or saves(region, config, B)
        pruned = dense if note else pruned
        both = (both[0] + dense, both[1] + pruned)
        rows.append(Row(region.kind, region.name, dense.at(**at), pruned.at(**at), note or ""))
    for group in plan.inputs:
        if group.kind in ("other", "head") and config.prunes(group.kind):
            dense, pruned = inputs_cost(group, config)
            both = (both[0] + dense, both[1] + pruned)
            rows.append(Row(group.kind, group.name, dense.at(**at), pruned.at(**at), ""))
    rows.append(Row("total", "", both[0].at(**at), both[1].at(**at), ""))
    return PlanCost(f"popc: cost at B={B}, T={T}, S={S}, r={config.sparsity}", tuple(rows))

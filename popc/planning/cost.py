"""Cost: FLOPs and bytes read of every region, dense and pruned, as sympy expressions.

Symbols: ``B`` sequences; ``T`` new tokens of each, in the region's own count (patches in a vision
tower); ``S`` keys that they attend to, their own included; ``r`` and ``γ`` as in popc.Config.
Counted: products of linears and of attention (a multiplication and an addition are two FLOPs,
masked scores count), weights, keys and values, and the lists that pruning reads. Not counted:
activations, elementwise ops, and a linear's channels that are in no region.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import sympy  # type: ignore[import-untyped]
import torch
from rich.console import Console
from rich.table import Table
from torch import fx

from popc.analysis.input_groups import InputGroup
from popc.analysis.labels import same_size
from popc.analysis.linears import Linear
from popc.analysis.plan import Plan, Region
from popc.analysis.propagation import shape
from popc.analysis.rules.traits import Trait, has
from popc.analysis.tokens import rows_of
from popc.config import Config

aten = torch.ops.aten

B, T, S = sympy.symbols("B T S", positive=True, integer=True)
r, gamma = sympy.symbols("r γ", nonnegative=True)
_NAMED = {"B": B, "T": T, "S": S, "r": r, "gamma": gamma}

ZERO = sympy.S.Zero
INDEX, NORM = 8, 4  # bytes of an int64 in a list, of a float32 norm

# What lays a value out anew or repeats it: no more than its source is read from the cache.
_LAYOUTS = Trait.RESHAPE | Trait.TRANSPOSE | Trait.AXIS | Trait.COPY | Trait.REPEAT


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
        return self.weights + self.lists + self.context

    def __add__(self, other: Cost) -> Cost:
        mine, its = vars(self), vars(other)
        return Cost(**{name: mine[name] + its[name] for name in mine})

    def at(self, **values: float) -> Amount:
        """The numbers at ``B, T, S, r, gamma``, given by name: all that the expressions hold."""
        given = {_NAMED[name]: value for name, value in values.items()}
        return Amount(*(round(float(e.subs(given))) for e in (self.flops, self.bytes)))


class RegionCost(NamedTuple):
    """What a region costs with all its units, and with live and active ones alone."""

    dense: Cost
    pruned: Cost


def region_cost(region: Region, config: Config | None = None) -> RegionCost:
    """The cost of a region: in B, T, S, r and γ, the counts of units unrounded.

    With ``config`` r and γ are gone: its rounded counts stand for them, and its scope counts.
    """
    if config is not None and config.prunes_inputs(region.kind):
        if not region.by_units(config):
            return _inputs_cost_of(region, config)
    units = sympy.Integer(region.units)
    live = units * sympy.Min(1, sympy.Max(1 - r + gamma / 2, gamma))
    active = units * (1 - r)
    if config is not None:
        counts = config.counts(region.units, region.kind)
        live, active = sympy.Integer(counts.live), sympy.Integer(counts.active)
    gate = region.staged(config) if config is not None else None
    late = None if gate is None else gate.late
    width = region.columns.shape[1]
    if region.one_pass:
        live = units  # this very pass scores: too late to leave rows out
    else:
        width += sum(p.rows.shape[1] for p in region.producers if p.linear is not late)
    dense, pruned = _linears(region, units, units), _linears(region, live, active, late)
    # Each expert has lists of its own, and a mark whether it runs dense.
    lists = _experts(region)[1] * live * (INDEX * width + NORM) + INDEX * region.experts
    own = config is not None and config.scope == "sequence" and not region.experts
    times = B if own else 1  # each sequence reads what its own lists name
    pruned = Cost(pruned.flops, times * pruned.weights, times * lists)
    attention = _attention(region) if region.kind == "attention" else Cost(ZERO, ZERO)
    return RegionCost(dense + attention, pruned + attention)


def _inputs_cost_of(region: Region, config: Config) -> RegionCost:
    """Each linear reads 1 - r of its input channels, and a norm for each of them."""
    units = sympy.Integer(region.units)
    dense, share = _linears(region, units, units), 1 - sympy.Float(config.sparsity)
    norms = NORM * sum({linear.x: linear.inputs for linear in region.linears}.values())
    pruned = Cost(share * dense.flops, share * dense.weights, sympy.Integer(norms))
    attention = _attention(region) if region.kind == "attention" else Cost(ZERO, ZERO)
    return RegionCost(dense + attention, pruned + attention)


def inputs_cost(group: InputGroup, config: Config) -> RegionCost:
    """The cost of linears that share an input, dense and with it pruned, in B and T."""
    flops = 2 * B * T * sympy.Integer(group.parameters)
    dense = Cost(flops, sympy.Integer(group.weight_bytes))
    if not config.prunes_inputs(group.kind):
        return RegionCost(dense, dense)
    share = 1 - sympy.Float(config.sparsity)
    norms = sympy.Integer(NORM * group.width)
    return RegionCost(dense, Cost(share * dense.flops, share * dense.weights, norms))


def saves(region: Region, config: Config, B: int = 1) -> str | None:
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
    region: Region, rows: sympy.Expr, columns: sympy.Expr, late: Linear | None = None
) -> Cost:
    """Of the linears, where ``rows`` units are produced and ``columns`` units contracted.

    ``late`` comes after a gate, and produces only what is contracted.
    """
    flops, read = ZERO, ZERO
    for producer in region.producers:
        linear = producer.linear
        channels = (columns if linear is late else rows) * producer.rows.shape[1]
        bias = 0 if linear.bias is None else linear.bias.meta["val"].element_size()
        flops += 2 * B * _tokens(linear.x, region) * channels * linear.inputs
        read += channels * (linear.inputs * linear.weight.element_bytes + bias)
    for linear in region.consumers:
        weights = columns * region.columns.shape[1] * linear.outputs
        flops += 2 * B * T * weights
        read += weights * linear.weight.element_bytes
    each, stacks = _experts(region)
    return Cost(each * flops, stacks * read)


def _tokens(x: fx.Node, region: Region) -> sympy.Symbol:
    """S where ``x`` are not h's tokens: those that a cross-attention makes its keys of."""
    given, own = rows_of(x), rows_of(region.hidden)
    if region.kind != "attention" or given is None or own is None:
        return T
    pairs = zip(shape(given.grid)[1:-1], shape(own.grid)[1:-1], strict=False)
    return T if all(same_size(a, b) for a, b in pairs) else S


def _experts(region: Region) -> tuple[sympy.Expr, sympy.Expr]:
    """Experts that each token meets (all where that is not known), and weights that are read: at
    most, since tokens may share an expert. 1 and 1 in other regions."""
    if not region.experts:
        return sympy.S.One, sympy.S.One
    each, rows = sympy.Integer(region.experts), rows_of(region.hidden)
    if rows is not None:
        hidden, tokens = _product(shape(region.hidden)), _product(shape(rows.grid)[:-1])
        count = sympy.cancel(hidden / region.width / tokens)
        each = count if count.is_Integer and count > 0 else each
    return each, sympy.Min(region.experts, B * T * each)


def _attention(region: Region) -> Cost:
    """Of ``q kᵀ`` and ``softmax(·) v``, all heads: they see zeros where nothing was computed."""
    rows = rows_of(region.hidden)
    batch = _product(shape(rows.grid)[:1]) if rows else sympy.S.One

    def heads(sizes: Sequence[Any]) -> sympy.Expr:
        count = sympy.cancel(_product(sizes) / batch)
        return count if count.is_Integer else sympy.Integer(region.units)

    channels, stored = ZERO, {}
    for lead, own, width, operand in _contractions(region):
        channels += heads(lead) * width
        source = operand
        while has(source, _LAYOUTS):
            source = source.args[0]  # type: ignore[assignment]
        times = sympy.cancel(_product(shape(operand)) / _product(shape(source)))
        kept = heads(own) * width / (times if times.is_Integer else 1)
        stored[source] = kept * source.meta["val"].element_size()
    context = B * S * sum(stored.values(), ZERO)
    return Cost(2 * B * T * S * channels, ZERO, context=context)


def _contractions(region: Region) -> Iterator[tuple[Sequence[Any], Sequence[Any], int, fx.Node]]:
    """Products of two activations: sizes of batch and heads in the result and in the second
    operand; channels of a head; the second operand, which is k or v."""
    weights: set[fx.Node] = set()  # products, and what is made of them
    found: list[Any] = [n.args[0] if n.target is operator.getitem else n for n in region.body]
    for node in dict.fromkeys(found):
        if has(node, Trait.ATTENTION):
            q, *operands = node.args[:3]
            for operand in operands:
                yield shape(q)[:-2], shape(operand)[:-2], shape(operand)[-1], operand
        elif has(node, Trait.BATCHED) and "..." not in str(node.args[0]):
            a, b, left, right, out = _operands(node)
            sizes = dict(zip(right, shape(b), strict=True))
            both = set(left) & set(right) & set(out)
            # q kᵀ sums over a head's channels; attention weights times v give them.
            inner = set(right) & (set(out) - set(left) if a in weights else set(left) - set(out))
            width = _product([sizes[letter] for letter in inner])
            if width.is_Integer:
                result = zip(out, shape(node), strict=True)
                lead = [size for letter, size in result if letter in both]
                yield lead, [sizes[letter] for letter in both], int(width), b
        if has(node, Trait.BATCHED) or not weights.isdisjoint(node.all_input_nodes):
            weights.add(node)


def _operands(node: fx.Node) -> tuple[Any, Any, str, str, str]:
    """A product's operands, and the letters of their dims and of the result's, as in einsum."""
    args: Any = node.args
    if node.target is aten.einsum.default:
        left, right, out = args[0].replace(" ", "").replace("->", ",").split(",")
        return *args[1], left, right, out
    a, b = args[1:3] if node.target is aten.baddbmm.default else args[:2]
    lead = "abcdefgh"[: len(shape(node)) - 2]
    left, right = (lead[len(lead) + 2 - len(shape(x)) :] for x in (a, b))
    return a, b, left + "mk", right + "kn", lead + "mn"


def _product(sizes: Sequence[Any]) -> sympy.Expr:
    exprs = [size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes]
    return sympy.prod(map(sympy.sympify, exprs))


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
    """See :meth:`popc.analysis.plan.Plan.cost`."""
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

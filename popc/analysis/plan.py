"""A plan, as plain data: regions to prune, and why everything else was left alone.

Nothing in it leads to a graph or a tensor: it can be kept, copied, pickled and sent.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from popc.config import Config

if TYPE_CHECKING:
    from rich.table import Table

    from popc.analysis.linears import Position
    from popc.planning.cost import PlanCost


@dataclass(frozen=True)
class LinearRecord:
    """A linear ``y = x Wᵀ + b``, or one for each expert.

    Attributes:
        op: the op that it is, as ``"aten.linear.default"``.
        name: where in the model, for people.
        inputs, outputs: K and N, numbers of channels.
        experts: E, how many weights are stacked; 0 for one weight.
        weight: the weight's identity: see :func:`popc.analysis.linears.replayed`.
        out_dim: the dim of N in that weight.
        bytes: of the whole weight, all experts; ``element_bytes`` of one value.
        bias_bytes: of the bias of one output channel; 0 without.
        position: where in its graph.
    """

    op: str
    name: str
    inputs: int
    outputs: int
    experts: int
    weight: tuple[Any, ...]
    out_dim: int
    bytes: int
    element_bytes: float
    bias_bytes: int
    position: Position

    def to_dict(self) -> dict[str, Any]:
        """For :meth:`Plan.to_dict`."""
        names = ("op", "name", "inputs", "outputs", "experts")
        return {name: getattr(self, name) for name in names} | {"weight_bytes": self.bytes}


@dataclass(frozen=True, eq=False)
class ProducerRecord:
    """A linear that writes channels of a region.

    Attributes:
        rows: int64 ``[U, m]``, its output channels that belong to each unit.
        context: it reads not h's tokens, but those that a cross-attention attends to.
    """

    linear: LinearRecord
    rows: np.ndarray
    context: bool = False

    @property
    def channels(self) -> int:
        """m, how many of its output channels belong to each unit."""
        return int(self.rows.shape[1])


@dataclass(frozen=True)
class AttentionRecord:
    """The products ``q kᵀ`` and ``softmax(·) v`` of a region, all heads.

    Attributes:
        channels: of all heads of both products: a pair of a query and a key takes as many
            multiplications.
        context_bytes: bytes of keys and values for each token of a sequence.
    """

    channels: int
    context_bytes: int | float


@dataclass(frozen=True, eq=False)
class RegionRecord:
    """Units that are produced and contracted by the same linears, in one place of a model.

    A *unit* is the least that can be pruned: one channel of an MLP or of each expert, or one KV
    group with all its query heads. Units are numbered by the columns that contract them.

    Attributes:
        kind: ``"mlp"``, ``"attention"`` or ``"experts"``.
        name: where in the model, for people; no rule reads it.
        units: U, how many there are.
        columns: int64 ``[U, m]``, the positions of each unit along the contracted dim of h, which
            is what the consumers read.
        rank: the number of h's dims.
        producers: linears that write the units' channels.
        consumers: linears that contract h.
        cached: whether the units' keys or values are kept in a cache.
        key: the same in every graph that the region is part of: the identities of the weights
            that contract it, which use of them in the graph it is, and its first column.
        source: file and line in the model's code.
        one_pass: whether it surely runs in one forward pass, as in encoders.
        by_grade: whether it has experts with quantised weights, each of which can read its inputs
            by grade; its linears then are among those of :attr:`Plan.inputs`.
        late: the number of the producer that comes after a gate: of it only the channels are needed
            that the gate lets through. None without a gate.
        input_channels: of all values that its linears read, each counted once.
        experts_met: how many experts each token meets, all where that is not known; 1 without.
        attention: of an attention's region alone.
    """

    kind: str
    name: str
    units: int
    columns: np.ndarray
    rank: int
    producers: tuple[ProducerRecord, ...]
    consumers: tuple[LinearRecord, ...]
    cached: bool
    key: tuple[Any, ...]
    source: str = ""
    one_pass: bool = False
    by_grade: bool = False
    late: int | None = None
    input_channels: int = 0
    experts_met: int = 1
    attention: AttentionRecord | None = None

    @property
    def experts(self) -> int:
        """E, the number of experts whose weights are stacked; 0 in other regions."""
        return self.consumers[0].experts

    @property
    def width(self) -> int:
        """K, the size of h along the contracted dim."""
        return self.consumers[0].inputs

    @property
    def weight_bytes(self) -> int:
        """Bytes of the region's weights, dense: the rows and columns of its units."""
        return self.producer_bytes + self.consumer_bytes

    @property
    def producer_bytes(self) -> int:
        """Bytes of its rows of the producers' weights."""
        return sum(
            p.linear.bytes * self.units * p.channels // p.linear.outputs for p in self.producers
        )

    @property
    def consumer_bytes(self) -> int:
        """Bytes of its columns of the consumers' weights."""
        return sum(c.bytes * self.columns.size // c.inputs for c in self.consumers)

    @property
    def late_bytes(self) -> int:
        """Bytes of the weight that comes after the gate; 0 without a gate."""
        return 0 if self.late is None else self.producers[self.late].linear.bytes

    @property
    def parameters(self) -> int:
        """How many weights the region has: the rows and columns of its units."""
        return round(self.weight_bytes / self.consumers[0].element_bytes)

    def to_dict(self) -> dict[str, Any]:
        """See :meth:`Plan.to_dict`."""
        names = ("kind", "name", "source", "units", "width", "experts", "one_pass", "cached")
        return {name: getattr(self, name) for name in (*names, "parameters", "weight_bytes")} | {
            "producers": [producer.linear.to_dict() for producer in self.producers],
            "consumers": [linear.to_dict() for linear in self.consumers],
        }


@dataclass(frozen=True, eq=False)
class InputRecord:
    """The linears that contract one value.

    Attributes:
        kind: ``"mlp"``, ``"attention"`` or ``"experts"``, after the region that they produce or
            consume; ``"head"`` where no other linear comes after in the model; else ``"other"``.
        name: where in the model, for people.
        linears: those that read the value; each has one weight for all rows, or a stack of experts.
        key: the same in every graph that they are part of.
        source: file and line in the model's code.
    """

    kind: str
    name: str
    linears: tuple[LinearRecord, ...]
    key: tuple[Any, ...]
    source: str = ""

    @property
    def width(self) -> int:
        """K, how many channels the value has."""
        return self.linears[0].inputs

    @property
    def weight_bytes(self) -> int:
        """Bytes of the linears' weights."""
        return sum(linear.bytes for linear in self.linears)

    @property
    def parameters(self) -> int:
        """How many weights the linears have."""
        return sum(n.inputs * n.outputs * max(1, n.experts) for n in self.linears)

    def to_dict(self) -> dict[str, Any]:
        """See :meth:`Plan.to_dict`."""
        names = ("kind", "name", "source", "width", "parameters", "weight_bytes")
        return {name: getattr(self, name) for name in names} | {
            "linears": [linear.to_dict() for linear in self.linears]
        }


@dataclass(frozen=True)
class Skipped:
    """A linear whose output channels are not pruned, and why.

    Attributes:
        op: what caused it; ``source`` is its file and line in the model's code.
        kind: the class of the reason; what helps against each: :func:`popc.report.explain.remedy`.
        linear: None where no linear is meant.
        key: of what would have been a region, or inputs, had no pass failed.
    """

    name: str
    reason: str
    op: str = ""
    source: str = ""
    kind: str = ""
    linear: LinearRecord | None = field(default=None, compare=False, repr=False)
    key: Any = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """See :meth:`Plan.to_dict`."""
        names = ("name", "reason", "kind", "op", "source")
        size = 0 if self.linear is None else self.linear.bytes
        return {name: getattr(self, name) for name in names} | {"weight_bytes": size}


Record = TypeVar("Record", RegionRecord, InputRecord)


def with_parameters(record: Record, parameters: Sequence[int]) -> Record:
    """``record`` for other parameters, as its graph may serve several layers.

    Args:
        parameters: their numbers, one for each weight of the key: see
            :func:`popc.analysis.capture.identity`.
    """
    weights, *rest = record.key
    weight_keys = tuple((p, *steps) for p, (_, *steps) in zip(parameters, weights, strict=True))
    return replace(record, key=(weight_keys, *rest))


@dataclass
class Plan:
    """Regions and refusals of one graph, or of all pieces of a model.

    It can be pickled and copied. Keys tell regions apart within one process: in another, and for a
    copy of the model, the same keys mean nothing.

    Attributes:
        regions: what can be pruned, in graph order.
        skipped: linears left dense, each with its reason.
        inputs: linears of which a decode step leaves input channels out, by what they read.
        breaks: reasons for which the model was traced in more than one piece.
    """

    regions: list[RegionRecord] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    inputs: list[InputRecord] = field(default_factory=list)
    breaks: list[str] = field(default_factory=list)

    def extend(self, other: Plan) -> None:
        """Add another graph's plan; what both hold is listed once.

        What a graph had to leave, since a pass failed, is not listed as pruned for another's sake:
        a prompt's graph only measures what a decode step's is to prune.
        """
        known = {region.key for region in self.regions}
        self.regions += [region for region in other.regions if region.key not in known]
        read = {group.key for group in self.inputs}
        self.inputs += [group for group in other.inputs if group.key not in read]
        self.skipped += [skip for skip in other.skipped if skip not in self.skipped]
        self.breaks += [reason for reason in other.breaks if reason not in self.breaks]
        left = {skip.key for skip in self.skipped if skip.key is not None}
        if left:
            self.regions = [region for region in self.regions if region.key not in left]
            self.inputs = [group for group in self.inputs if group.key not in left]

    def count(self, kind: str) -> int:
        """How many regions there are of a kind."""
        return sum(region.kind == kind for region in self.regions)

    def to_dict(self) -> dict[str, Any]:
        """The plan in dicts, lists, texts and numbers, as JSON takes them.

        - ``"regions"``, in graph order: ``kind``, ``name``, ``source``, ``units``, ``width``,
          ``experts``, ``one_pass``, ``cached``, ``parameters`` and ``weight_bytes`` as in
          :class:`RegionRecord`; ``producers`` and ``consumers``, its linears.
        - ``"inputs"``: ``kind``, ``name``, ``source``, ``width``, ``parameters`` and
          ``weight_bytes`` as in :class:`InputRecord`; ``linears``.
        - ``"skipped"``: ``name``, ``reason``, ``kind``, ``op`` and ``source`` as in
          :class:`Skipped`; ``weight_bytes`` of the linear, 0 where none is meant.
        - ``"breaks"``: texts.

        Each linear has ``op``, ``name``, ``inputs``, ``outputs``, ``experts`` and ``weight_bytes``,
        of its whole weight: see :class:`LinearRecord`. Keys of regions and of inputs are left out.
        """
        return {
            "regions": [region.to_dict() for region in self.regions],
            "inputs": [group.to_dict() for group in self.inputs],
            "skipped": [skip.to_dict() for skip in self.skipped],
            "breaks": list(self.breaks),
        }

    # What is made of a plan stands above this module: these lead there.
    def decode_share(self, config: Config) -> float:
        """The share of the pruned linears' weight bytes that a decode step reads.

        Of pruned inputs it is what thresholds are set for; tokens read more and less than that.
        """
        from popc.planning import reads

        return reads.decode_share(self, config)

    def read_share(
        self,
        config: Config,
        reads: Mapping[Any, Sequence[float]] | None = None,
        pruned: Plan | None = None,
    ) -> float:
        """The share of the weight bytes of all linears but the last that a decode step reads.

        For plans of :func:`popc.analyze`, which hold all linears.

        Args:
            reads: what was counted, as ``session.inputs.reads`` holds it under
                ``Config(count=True)``: the channels that groups of ``inputs`` read, step by step.
                Without it, what thresholds are for.
            pruned: the plan of a compiled model that has run, without what it found it must leave
                dense.
        """
        from popc.planning import reads as of

        return of.read_share(self, config, reads, pruned)

    def read_bits(
        self,
        config: Config,
        reads: Mapping[Any, Sequence[float]] | None = None,
        pruned: Plan | None = None,
    ) -> float:
        """How many bits of each weight :meth:`read_share` comes to, scales counted."""
        from popc.planning import reads as of

        return of.read_bits(self, config, reads, pruned)

    def cost(self, B: int = 1, T: int = 1, S: int = 1024, config: Config | None = None) -> PlanCost:
        """FLOPs and bytes read in a call, region by region and in all, dense and pruned.

        Args:
            B: sequences. T: new tokens of each. S: keys that they attend to, their own included.
            config: the default one if not given; a ``model_sparsity`` in it must be resolved.
        """
        from popc.planning.cost import plan_cost

        return plan_cost(self, B, T, S, config or Config())

    def table(self) -> Table:
        """A rich table: one row for each region, then one for each distinct refusal."""
        from popc.report.plan_table import plan_table

        return plan_table(self)

    def __str__(self) -> str:
        from popc.report.plan_table import plan_text

        return plan_text(self)


def __getattr__(name: str) -> Any:
    """Names of popc 0.1, with a warning."""
    now = {"Region": "RegionRecord", "Producer": "ProducerRecord"}.get(name)
    if now is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"popc.analysis.plan.{name} is {now} now", DeprecationWarning, stacklevel=2)
    return globals()[now]

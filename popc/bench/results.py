"""What was measured, as data, and as JSON.

The JSON is :class:`Result` field by field: dataclasses are objects, tuples are lists. ``schema``
grows with every change that a reader of the old one would not understand.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from popc.analysis.plan import Plan
from popc.bench.machine import Machine, commit, versions
from popc.bench.rates import Spread
from popc.bench.settings import Settings
from popc.config import Config
from popc.errors import ModelError
from popc.planning.cost import region_cost
from popc.planning.reads import body_size, share_read

SCHEMA = 2


@dataclass(frozen=True)
class Bytes:
    """Bytes that one step reads: of weights, keys and values, and popc's lists.

    ``bits`` are those of each quantised weight: see :class:`Run`.

    ``dense`` with all units; ``read`` as it ran, counted where each token chooses. A step that has
    its weights in no cache can be faster by ``dense / read`` and not more.
    """

    dense: int
    read: int
    bits: float | None = None

    @property
    def limit(self) -> float:
        """The speed-up if decoding took nothing but reading the bytes."""
        return self.dense / self.read

    @property
    def saved(self) -> float:
        """The share of the dense bytes that is left unread."""
        return 1 - self.read / self.dense

    def each(self, count: int) -> Bytes:
        """One of ``count`` equal parts."""
        return Bytes(self.dense // count, self.read // count)


@dataclass(frozen=True)
class Run:
    """One way to run a model at one batch size and context.

    Attributes:
        name: for people.
        policy, sparsity: popc's; None for the dense ones.
        batch: sequences; a step decodes a token of each.
        context: tokens in the cache at the first step; None where there is no cache.
        seconds: of one step.
        tokens_per_s: ``batch / seconds``.
        speedup: over the faster dense run: the ratio of the medians.
        dense_bytes, read_bytes, saved, limit: see :class:`Bytes`.
        of_limit: ``speedup / limit``.
        of_bandwidth: ``read_bytes / seconds.median`` as a share of the copy bandwidth.
        weights: what they are quantised to; None: not at all.
        bits: read of each weight of all linears but the last, scales included; None where weights
            are not quantised.
    """

    name: str
    policy: str | None
    sparsity: float | None
    batch: int
    context: int | None
    seconds: Spread
    tokens_per_s: Spread
    speedup: float
    dense_bytes: int
    read_bytes: int
    saved: float
    limit: float
    of_limit: float
    of_bandwidth: float
    weights: str | None = None
    bits: float | None = None


@dataclass(frozen=True)
class Model:
    """What ran. ``weight_bytes`` are those of all parameters, shared ones counted once."""

    name: str
    layers: int
    parameters: int
    weight_bytes: int


@dataclass(frozen=True)
class Start:
    """A process that builds a model and runs it, from a cold compiler.

    Attributes:
        kernels_s: seconds to build popc's CPU kernels, which are then in the cache for all models.
        prefill_s, decode_s: the first prefill call, and the first two decode calls; seconds.
        peak_bytes: the most memory that the process ever had (on CUDA: the device's).
        running_peak_bytes: the same after compilation, over one more prefill and decode; None
            where the system can't tell.
    """

    kernels_s: float
    prefill_s: float
    decode_s: float
    peak_bytes: int
    running_peak_bytes: int | None

    @property
    def compile_s(self) -> float:
        """Seconds of the calls that compile the model."""
        return self.prefill_s + self.decode_s


@dataclass(frozen=True)
class Extras:
    """Overhead outside the decode step, at batch 1, the first policy and the highest sparsity.

    Attributes:
        cold: :class:`Start` of ``"dense"``, under ``torch.compile``, and of ``"popc"``.
        compile_ratio, memory_ratio, running_memory_ratio: popc's over dense's.
        prefill_tokens: length of the prompt of the two next.
        dense_prefill, popc_prefill: seconds of a prefill, both compiled.
        prefill_overhead: the ratio of their medians, less one.
        host: seconds per decoded token in popc's Python around the compiled graph.
        prompts: how many different lengths of prompts the two next have seen.
        dense_compilations, popc_compilations: graphs that they were compiled to.
    """

    cold: Mapping[str, Start]
    compile_ratio: float
    memory_ratio: float
    running_memory_ratio: float | None
    prefill_tokens: int
    dense_prefill: Spread
    popc_prefill: Spread
    prefill_overhead: float
    host: Spread
    prompts: int
    dense_compilations: int
    popc_compilations: int


@dataclass(frozen=True)
class Result:
    """One benchmark. ``kind`` is ``"decode"``, or ``"ffn"``, where a step is one block's."""

    schema: int
    kind: str
    created: str
    machine: Machine
    versions: Mapping[str, str | None]
    commit: str | None
    model: Model
    settings: Mapping[str, Any]
    copy_bandwidth: Spread
    runs: tuple[Run, ...]
    extras: Extras | None = None

    @classmethod
    def of(
        cls,
        kind: str,
        where: Machine,
        model: Model,
        settings: Settings,
        bandwidth: Spread,
        runs: Sequence[Run],
        extras: Extras | None = None,
    ) -> Result:
        """With the time, and the versions and the commit that ran."""
        return cls(
            schema=SCHEMA,
            kind=kind,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            machine=where,
            versions=versions(),
            commit=commit(),
            model=model,
            settings={**asdict(settings), "model": model.name},
            copy_bandwidth=bandwidth,
            runs=tuple(runs),
            extras=extras,
        )

    def write(self, path: Path) -> None:
        """As JSON; folders that are missing are made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def runs_of(
    ways: Mapping[str, Config | None],
    seconds: Mapping[str, Sequence[float]],
    read: Mapping[str, Bytes],
    bandwidth: Spread,
    batch: int,
    context: int | None = None,
) -> list[Run]:
    """One :class:`Run` for each way, from the seconds of a step in every round.

    Args:
        ways: name to popc's options; None where it runs dense.
    """
    spreads = {name: Spread.of(seconds[name]) for name in ways}
    fastest = min(spreads[name].median for name, config in ways.items() if config is None)
    runs = []
    for name, config in ways.items():
        spread, amount = spreads[name], read[name]
        speedup = fastest / spread.median
        runs.append(
            Run(
                name=name,
                policy=config.policy_name if config else None,
                sparsity=config.sparsity if config else None,
                batch=batch,
                context=context,
                seconds=spread,
                tokens_per_s=spread.rate(batch),
                speedup=speedup,
                dense_bytes=amount.dense,
                read_bytes=amount.read,
                saved=amount.saved,
                limit=amount.limit,
                of_limit=speedup / amount.limit,
                of_bandwidth=amount.read / spread.median / bandwidth.median,
                weights=config.weights if config else None,
                bits=amount.bits,
            )
        )
    return runs


def step_bytes(
    module: torch.nn.Module,
    plan: Plan,
    config: Config | None,
    batch: int,
    cached: int = 0,
    reads: Mapping[Hashable, Sequence[float]] | None = None,
) -> Bytes:
    """What a decode step reads of ``module``; dense without ``config``.

    Counted is every parameter once, but: of embeddings that are no linear as well, a row for each
    sequence; of stacked experts, as many as ``batch`` tokens can meet; and what pruning leaves out.

    Args:
        plan: of the module's decode step. Experts that are in none of its regions count in full.
        cached: bytes of keys and values.
        reads: see :func:`popc.bench.reads.channels_read`; of a group that is not in it, what its
            threshold is set for.
    """
    dense = cached + sum(parameter.nbytes for parameter in module.parameters())
    shared = {
        id(linear.weight) for linear in module.modules() if isinstance(linear, torch.nn.Linear)
    }
    for embedding in module.modules():
        if isinstance(embedding, torch.nn.Embedding) and id(embedding.weight) not in shared:
            row = embedding.embedding_dim * embedding.weight.element_size()
            dense -= embedding.weight.nbytes - batch * row
    for region in plan.regions:
        if region.experts:
            cost = region_cost(region).dense
            dense -= cost.at(B=region.experts, T=1).bytes - cost.at(B=batch, T=1).bytes
    if config is None:
        return Bytes(dense, dense)
    total = plan.cost(B=batch, T=1, S=1, config=config).rows[-1]
    read = dense - (total.dense.bytes - total.pruned.bytes)
    for group in plan.inputs:
        more = share_read(group, config, reads) - share_read(group, config)
        read += round(more * group.weight_bytes)
    return Bytes(dense, read)


def quantized_step_bytes(
    dense: Bytes, plan: Plan, quantized: Plan, config: Config, reads: Mapping[Any, Sequence[float]]
) -> Bytes:
    """What a decode step of quantised weights reads, in place of a dense one.

    Args:
        dense: see :func:`step_bytes`.
        plan, quantized: as from :func:`popc.analyze`, of the model and of the compiled one; they
            hold all linears.
        config: resolved for ``quantized``. ``reads``: as in :func:`step_bytes`.

    Raises:
        ModelError: the model has experts, of which a step reads some alone.
    """
    if any(linear.experts for group in quantized.inputs for linear in group.linears):
        raise ModelError("popc bench can't tell what a step reads of quantised experts")
    share = quantized.read_share(config, reads)
    read = dense.dense - sum(_body_and_head(plan))
    body, head = _body_and_head(quantized)
    return Bytes(dense.dense, read + round(share * body) + head, quantized.read_bits(config, reads))


def _body_and_head(plan: Plan) -> tuple[int, int]:
    """Bytes of all linears but the last, and of the last."""
    head = sum(group.weight_bytes for group in plan.inputs if group.kind == "head")
    return body_size(plan)[1], head


def model_of(name: str, module: torch.nn.Module, layers: int) -> Model:
    """``module`` in figures; of a folder the last name alone."""
    parameters = list(module.parameters())
    short = Path(name).name if Path(name).is_dir() else name
    return Model(
        name=short,
        layers=layers,
        parameters=sum(parameter.numel() for parameter in parameters),
        weight_bytes=sum(parameter.nbytes for parameter in parameters),
    )

"""What :mod:`benchmarks.peers` measured: as data, as JSON, and as tables."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from benchmarks.workers import Worker
from popc.bench.machine import Machine, commit, versions
from popc.bench.rates import Spread
from popc.bench.results import Model

if TYPE_CHECKING:
    from benchmarks.peers import PeerSettings

SCHEMA = 1
PACKAGES = ("llama-cpp-python", "torchao")


@dataclass(frozen=True)
class Quality:
    """On windows of text, over all tokens after each window's prompt.

    Attributes:
        perplexity: no unit; ``over_dense``: by how much it is above float32's, as a share of that.
        agreement: share of tokens where the most likely one is float32's.
        bits: read there per weight of the layers' linears, scales counted.
    """

    perplexity: float
    over_dense: float
    agreement: float
    bits: float


@dataclass(frozen=True)
class Peer:
    """An engine in figures.

    Attributes:
        seconds: of a decode step at batch 1; ``tokens_per_s`` is one over it.
        prefill: seconds of the long prompt.
        bits: read by a step per weight of the layers' linears, scales counted.
        stored_bits: those that a weight is stored in.
        read_bytes: by a step: the layers' linears, the last linear, keys and values.
        of_bandwidth: ``read_bytes / seconds.median`` as a share of the read bandwidth.
        memory: bytes of the process once it is warm; ``empty``: before the model was there.
    """

    name: str
    seconds: Spread
    tokens_per_s: Spread
    prefill: Spread
    bits: float
    stored_bits: float
    read_bytes: int
    of_bandwidth: float
    memory: int
    empty: int
    quality: Quality | None

    @classmethod
    def of(
        cls,
        worker: Worker,
        seconds: Spread,
        prefill: Spread,
        bandwidth: Spread,
        quality: Quality | None,
    ) -> Peer:
        """With what else the engine says of itself."""
        stored, share = worker.call("stored"), worker.call("share_read")
        read = round(share * stored.layers) + stored.head + worker.call("cached")
        return cls(
            name=worker.name,
            seconds=seconds,
            tokens_per_s=seconds.rate(1),
            prefill=prefill,
            bits=share * stored.bits,
            stored_bits=stored.bits,
            read_bytes=read,
            of_bandwidth=read / seconds.median / bandwidth.median,
            memory=worker.memory,
            empty=worker.empty,
            quality=quality,
        )


@dataclass(frozen=True)
class PeerResult:
    """One run. ``perplexity`` is that of the model in float32, None without windows."""

    schema: int
    kind: str
    created: str
    machine: Machine
    versions: Mapping[str, str | None]
    commit: str | None
    model: Model
    settings: Mapping[str, Any]
    read_bandwidth: Spread
    perplexity: float | None
    peers: tuple[Peer, ...]

    @classmethod
    def of(
        cls,
        where: Machine,
        model: Model,
        settings: PeerSettings,
        bandwidth: Spread,
        perplexity: float | None,
        peers: Sequence[Peer],
    ) -> PeerResult:
        """With the time, and the versions and the commit that ran."""
        return cls(
            schema=SCHEMA,
            kind="peers",
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            machine=where,
            versions={**versions(), **{name: _version(name) for name in PACKAGES}},
            commit=commit(),
            model=model,
            settings={**asdict(settings), "model": model.name},
            read_bandwidth=bandwidth,
            perplexity=perplexity,
            peers=tuple(peers),
        )

    def write(self, path: Path) -> None:
        """As JSON; folders that are missing are made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def show(result: PeerResult) -> RenderableType:
    """A table of speed, a row for each engine; with windows, one of quality too."""
    settings, bandwidth = result.settings, result.read_bandwidth.median / 1e9
    where = f"{result.machine.cpu}, {settings['threads']} threads, {bandwidth:.1f} GB/s read"
    prompt = f"prompt of {settings['prompt']}, ms"
    headings = ("", "tokens/s (low – high)", "bits read", "of read", prompt, "MB added")
    speed = _table(f"{result.model.name}, {where}", headings)
    for peer in result.peers:
        rate = peer.tokens_per_s
        speed.add_row(
            peer.name,
            f"{rate.median:.1f} ({rate.low:.1f} – {rate.high:.1f})",
            f"{peer.bits:.2f}",
            f"{peer.of_bandwidth:.0%}",
            f"{1e3 * peer.prefill.median:.0f}",
            f"{(peer.memory - peer.empty) / 1e6:.0f}",
        )
    if result.perplexity is None:
        return speed
    title = f"{settings['windows']} windows of text, perplexity {result.perplexity:.2f} in float32"
    quality = _table(title, ("", "bits read", "perplexity", "over float32", "same top-1"))
    for peer in result.peers:
        if (found := peer.quality) is not None:
            cells = f"{found.bits:.2f}", f"{found.perplexity:.2f}", f"{found.over_dense:+.1%}"
            quality.add_row(peer.name, *cells, f"{found.agreement:.3f}")
    return Group(speed, quality)


def _table(title: str, headings: Sequence[str]) -> Table:
    made = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for heading in headings:
        made.add_column(heading, justify="right" if heading else "left", no_wrap=bool(heading))
    return made

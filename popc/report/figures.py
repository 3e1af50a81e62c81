"""What ``popc report`` draws, as read from the files of other commands."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from popc.bench.show import sized
from popc.errors import ConfigError

_QUALITY = ("policy", "sparsity", "read", "perplexity", "dense_perplexity", "agreement", "windows")
_RUN = ("policy", "batch", "context", "speedup", "saved", "limit", "tokens_per_s")

_PEER = ("bits", "over_dense", "agreement")


@dataclass(frozen=True)
class Point:
    """One run of ``popc eval``, at one budget.

    Attributes:
        read: share of the layers' weight bytes; ``bits``: the same in bits of each weight, scales
            included, which files of earlier versions do not have.
        rise: of the perplexity over dense, as a share of it.
        weights: what they are quantised to, if they are.
    """

    model: str
    policy: str
    sparsity: float
    candidate: float
    read: float
    rise: float
    agreement: float
    windows: int
    bits: float | None = None
    weights: str | None = None

    @property
    def kind(self) -> str:
        """The policy, and the weights where they are quantised."""
        return _kind(self.policy, self.weights)


@dataclass(frozen=True)
class Speed:
    """One pruned run of ``popc bench``: see :class:`popc.bench.results.Run`."""

    model: str
    policy: str
    sparsity: float
    size: str
    saved: float
    speedup: float
    limit: float
    rate: float


@dataclass(frozen=True)
class Peer:
    """An engine of ``benchmarks/peers.py``, and its quality: as in :class:`Point`."""

    model: str
    name: str
    bits: float
    rise: float
    agreement: float
    windows: int


@dataclass
class Figures:
    """The content of files: of ``popc eval --out`` and ``popc bench --out``, and of peers."""

    points: list[Point] = field(default_factory=list)
    speeds: list[Speed] = field(default_factory=list)
    peers: list[Peer] = field(default_factory=list)

    @classmethod
    def read(cls, paths: Sequence[Path], peers: Sequence[Path] = ()) -> Figures:
        """Of all ``paths``, and of ``peers``, which ``benchmarks/peers.py --out`` wrote.

        Raises:
            ConfigError: a file is none of these.
            OSError: a file can't be read.
        """
        figures = cls()
        for path in paths:
            _take("figures", path, "`popc eval --out` or `popc bench --out`", figures._add)
        for path in peers:
            _take("peers", path, "`benchmarks/peers.py --windows W --out`", figures._add_peers)
        figures.points.sort(key=lambda point: (point.model, point.kind, point.read))
        figures.speeds.sort(key=lambda speed: (speed.model, speed.policy, speed.size, speed.saved))
        figures.peers.sort(key=lambda peer: (peer.model, peer.bits))
        return figures

    def _add(self, data: Any) -> None:
        if isinstance(data, list):
            for one in data:
                self._add(one)
            return
        if "runs" in data:
            name = data["model"]["name"]
            for run in data["runs"]:
                policy, batch, context, speedup, saved, limit, rate = (run[key] for key in _RUN)
                if policy is not None:
                    figures = sized(batch, context), saved, speedup, limit, rate["median"]
                    kind = _kind(policy, run.get("weights"))
                    self.speeds.append(Speed(name, kind, run["sparsity"], *figures))
            return
        policy, sparsity, read, perplexity, dense, agreement, windows = (
            data[key] for key in _QUALITY
        )
        rise, candidate = perplexity / dense - 1, data["candidate"]
        scores = float(read), rise, agreement, windows, data.get("read_bits"), data.get("weights")
        self.points.append(Point(data["model"], policy, sparsity, candidate, *scores))

    def _add_peers(self, data: Any) -> None:
        name, windows = data["model"]["name"], data["settings"]["windows"]
        scored = [(peer["name"], peer["quality"]) for peer in data["peers"]]
        scored = [(peer, quality) for peer, quality in scored if quality is not None]
        if not scored:
            raise ValueError("no engine has a quality")
        for peer, quality in scored:
            bits, rise, agreement = (float(quality[key]) for key in _PEER)
            self.peers.append(Peer(name, peer, bits, rise, agreement, windows))


def _kind(policy: str, weights: str | None) -> str:
    return ", ".join(filter(None, (policy, weights)))


def _take(option: str, path: Path, writers: str, add: Callable[[Any], None]) -> None:
    """``add`` what is in a file that one of ``writers`` wrote."""
    try:
        add(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(option, str(path), f"a file of {writers} ({error!r})") from error

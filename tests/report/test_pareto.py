"""The report: figures from files, partitions and their drift, and a page that stands alone."""

from __future__ import annotations

import copy
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import popc
from popc import cli
from popc.report.figures import Figures
from popc.report.pareto import report
from popc.report.stability import Drift, Reads, RegionDrift, measure
from tests.helpers.models import tiny_llama

pytestmark = pytest.mark.usefixtures("fresh_compiler")

CONFIG = popc.Config(sparsity=0.5, candidate=0.2, codegen="eager")
QUALITY = {
    "model": "a <b> & c",
    "policy": "threshold",
    "sparsity": 0.37,
    "candidate": 0.1,
    "read": 0.634,
    "perplexity": 22.0,
    "dense_perplexity": 20.0,
    "agreement": 0.807,
    "windows": 48,
}
RUN = {
    "policy": "pop",
    "sparsity": 0.4,
    "batch": 1,
    "context": 128,
    "speedup": 1.37,
    "saved": 0.21,
    "limit": 1.27,
    "tokens_per_s": {"median": 22.2},
}
BENCH = {"model": {"name": "shape"}, "runs": [{**RUN, "policy": None, "sparsity": None}, RUN]}

GRADED = {**QUALITY, "policy": "graded", "weights": "int8", "sparsity": 0.47}
ELASTIC = [
    {**GRADED, "read_bits": 5.02, "perplexity": 21.0},
    {**GRADED, "read_bits": 3.57, "perplexity": 23.0},
]


def peer(name: str, bits: float, over_dense: float | None) -> dict[str, object]:
    """An engine, as benchmarks/peer_results.py writes it; without a quality if it has none."""
    quality = {"perplexity": 1.0, "over_dense": over_dense, "agreement": 0.931, "bits": bits}
    return {"name": name, "bits": bits, "quality": None if over_dense is None else quality}


PEERS = {
    "model": {"name": "small"},
    "settings": {"windows": 6},
    "peers": [
        peer("llama.cpp Q4_0", 4.5, 0.247),
        peer("dense float32", 32, 0.0),
        peer("timed alone", 8, None),
    ],
}


class Page(HTMLParser):
    """Cells of tables, what is fetched from elsewhere, and tags left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.sources: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


def ids(length: int = 40) -> Tensor:
    return torch.randint(96, (1, length), generator=torch.Generator().manual_seed(2))


def written(folder: Path, **files: dict[str, object]) -> list[Path]:
    paths = [folder / f"{name}.json" for name in files]
    for path, data in zip(paths, files.values(), strict=True):
        path.write_text(json.dumps(data))
    return paths


def test_figures_are_those_of_the_files(tmp_path: Path) -> None:
    figures = Figures.read(written(tmp_path, quality=QUALITY, bench=BENCH))
    (point,), (speed,) = figures.points, figures.speeds
    assert point.rise == pytest.approx(0.1)
    assert (point.read, point.agreement, point.windows) == (0.634, 0.807, 48)
    assert (speed.policy, speed.size, speed.rate) == ("pop", "batch 1, context 128", 22.2)
    page = Page(report(figures, None, "a <title>"))
    assert not page.open
    for cell in ("a <b> & c", "0.634", "+10.0%", "0.807", "21.0%", "1.37 ×", "1.27 ×", "22.2"):
        assert cell in page.cells
    assert len(page.sources) == 2 and all(s.startswith("data:image/png") for s in page.sources)


def test_the_frontier_of_quality_against_bits(tmp_path: Path) -> None:
    """Budgets of quantised weights, and other engines; what says nothing of bits is not in it."""
    *paths, peers = written(tmp_path, old=QUALITY, elastic=ELASTIC, peers=PEERS)  # type: ignore[arg-type]
    figures = Figures.read(paths, [peers])
    assert [point.bits for point in figures.points if point.weights == "int8"] == [5.02, 3.57]
    assert [(engine.name, engine.bits) for engine in figures.peers] == [
        ("llama.cpp Q4_0", 4.5),
        ("dense float32", 32.0),
    ]
    page = Page(report(figures, None, "frontier"))
    assert not page.open and len(page.sources) == 2
    rows = page.cells[page.cells.index("bits read") - 2 :]
    assert rows[6:12] == ["a <b> & c", "graded, int8", "5.02", "+5.0%", "0.807", "48"]
    assert rows[18:24] == ["small", "llama.cpp Q4_0", "4.50", "+24.7%", "0.931", "6"]
    assert len(rows) == 6 * 5


@pytest.mark.parametrize("data", [QUALITY, BENCH, [], {**PEERS, "peers": [peer("a", 8, None)]}])
def test_a_file_that_is_not_of_peers(data: object, tmp_path: Path) -> None:
    (path,) = written(tmp_path, other=data)  # type: ignore[arg-type]
    with pytest.raises(popc.ConfigError, match=r"peers='.*other.json' is not allowed: a file of"):
        Figures.read([], [path])


def test_what_peers_writes_has_the_fields_that_are_read() -> None:
    from benchmarks.peer_results import Peer, PeerResult, Quality

    assert {"model", "settings", "peers"} <= PeerResult.__dataclass_fields__.keys()
    assert {"name", "quality"} <= Peer.__dataclass_fields__.keys()
    assert {"bits", "over_dense", "agreement"} <= Quality.__dataclass_fields__.keys()


def test_without_figures_it_says_what_makes_them() -> None:
    text = report(Figures(), None, "nothing")
    assert "popc eval MODEL --out FILE.json" in text and "popc bench MODEL --out" in text
    assert not Page(text).sources


@pytest.mark.parametrize("data", [{"policy": "pop"}, [1, 2], "text", {"runs": [{}], "model": {}}])
def test_a_file_that_is_something_else(data: object, tmp_path: Path) -> None:
    (path,) = written(tmp_path, other=data)  # type: ignore[arg-type]
    with pytest.raises(popc.ConfigError, match=r"figures='.*other.json' is not allowed: a file of"):
        Figures.read([path])


def test_partitions_and_their_drift() -> None:
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    drift = measure(model, ids(), CONFIG, tokens=24, chunk=8)
    assert (drift.prompt, drift.generated, drift.chunk) == (40, 24, 8)
    kinds = [region.kind for region in drift.regions]
    assert kinds.count("mlp") == 2
    for region in drift.regions:
        counts = CONFIG.of(CONFIG, {"policy": "pop"}).counts(region.partition.size)
        assert (region.partition == 2).sum() == counts.retained
        assert (region.partition == 1).sum() == counts.candidate
        assert len(region.overlap) == 3
        assert region.chance == counts.live / region.partition.size
        # Two sets of `live` units share at least what does not fit beside one of them.
        assert all(max(0.0, 2 - 1 / region.chance) <= share <= 1 for share in region.overlap)
    assert drift.reads and all(len(group.shares) == 24 for group in drift.reads)
    assert all(0 < share <= 1 for group in drift.reads for share in group.shares)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_drift_of_quantised_weights() -> None:
    """At a budget in bits; what is read is by grade, and so the share of a channel's bytes."""
    config = popc.Config(weights="int8", bits=5.0, codegen="eager")
    drift = measure(tiny_llama(), ids(), config, tokens=16, chunk=8)
    assert all(len(region.overlap) == 2 for region in drift.regions)
    shares = [share for group in drift.reads for share in group.shares]
    assert shares and sum(shares) / len(shares) == pytest.approx(5 / 8.5, abs=0.1)


def test_a_text_like_its_prompt_does_not_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = ids(16)
    monkeypatch.setattr(
        "popc.report.stability._generated", lambda compiled, _, tokens: prompt.repeat(1, 2)
    )
    drift = measure(tiny_llama(), prompt, CONFIG, tokens=32, chunk=16)
    assert all(region.overlap == (1.0, 1.0) for region in drift.regions)


def test_a_chunk_longer_than_the_text() -> None:
    with pytest.raises(popc.ConfigError, match="chunk=32 is not allowed: 2 to 16"):
        measure(tiny_llama(), ids(), CONFIG, tokens=16, chunk=32)


def test_the_page_of_a_drift() -> None:
    partition = np.array([[2, 1, 0, 0], [0, 0, 1, 2]], dtype=np.int8)
    regions = (RegionDrift("experts", "layers.<0>", partition, (0.75, 0.5), 0.5),)
    drift = Drift(regions, (Reads("layers.0.up", (0.25, 0.75)),), 40, 16, 8)
    page = Page(report(Figures(), drift, "drift"))
    assert not page.open
    row = page.cells.index("layers.<0>")
    assert page.cells[row : row + 5] == ["layers.<0>", "8", "2", "2", "4"]
    for cell in ("0.75", "0.50", "0.500", "0.250", "0.750"):
        assert cell in page.cells
    assert len(page.sources) == 3


def test_the_command_leaves_what_was_there_if_it_fails(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    paths = written(tmp_path, quality=QUALITY, other={"a": 1})
    good = ["report", str(out), "--tokens", "0", "--figures", str(paths[0])]
    (peers,) = written(tmp_path, peers=PEERS)
    done = CliRunner().invoke(cli.app, [*good, "--peers", str(peers)])
    assert done.exit_code == 0, done.output
    before = out.read_text()
    assert "0.807" in before and "llama.cpp Q4_0" in before
    done = CliRunner().invoke(cli.app, [*good, "--figures", str(paths[1])])
    assert done.exit_code == 2
    assert "other.json" in " ".join(done.stderr.split())
    assert out.read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "other.json",
        "page.html",
        "peers.json",
        "quality.json",
    ]

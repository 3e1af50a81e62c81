"""The benchmarks measure what they say: bytes by hand, ratios of medians, and steps that prune."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig
from typer.testing import CliRunner

import popc
from popc import cli
from popc.bench import Result, Run, Settings, command, extras, ffn, results
from popc.bench.cold import cold_start, start
from popc.bench.machine import Machine, copy_bandwidth, last_level_cache, machine, versions
from popc.bench.models import SHAPES, build, random_model
from popc.bench.reads import channels_read
from popc.bench.show import plot, show
from popc.errors import ModelError
from popc.planning.cost import region_cost
from popc.sessions import Session
from tests.helpers.models import tiny_llama

PNG = b"\x89PNG\r\n\x1a\n"
D, F, KV, HEAD, VOCABULARY = 64, 160, 2, 16, 96  # of tiny_llama
BATCH, LAYERS = 2, 1
SMALL = {
    "batch": (BATCH,),
    "context": (24,),
    "prefill": 16,
    "tokens": 4,
    "rounds": 3,
    "layers": LAYERS,
}
# r = 0.4: 96 channels are active, and 104 are retained or candidates.
PRUNED = {"policies": ("pop",), "sparsity": (0.0, 0.4), "codegen": "eager"}
ACTIVE, LIVE = 96, 104


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model, and a tokenizer of one word, on disk."""
    path = tmp_path_factory.mktemp("tiny")
    tiny_llama().save_pretrained(path)
    words = Tokenizer(WordLevel({"word": 0}, unk_token="word"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def settings(folder: str) -> Settings:
    return Settings(model=folder, **SMALL, **PRUNED)


@pytest.fixture(scope="module")
def result(settings: Settings) -> Result:
    said: list[str] = []
    measured = command.bench_model(settings, with_extras=False, progress=said.append)
    assert len(said) == command.total_steps(settings, with_extras=False)
    return measured


def lists(regions: int, live: int, active: int, shape: tuple[int, int]) -> int:
    """Bytes of popc's lists for gated MLPs of a shape, as popc.planning.cost counts them."""
    d, f = shape
    module = ffn.Block(ffn.Shape(d, f)).eval()
    plan = popc.analyze(module, (torch.randn(1, 1, d),))
    config = popc.Config(policy="pop", sparsity=0.4)
    counts = config.counts(f)
    assert (counts.live, counts.active) == (live, active)
    return regions * int(region_cost(plan.regions[0], config).pruned.lists)


def test_runs_are_all_there(result: Result) -> None:
    names = ["dense, eager", "dense, compiled", "pop r=0", "pop r=0.4"]
    assert [(run.batch, run.name) for run in result.runs] == [(BATCH, name) for name in names]
    assert {run.context for run in result.runs} == {24}
    assert all(len(run.seconds.rounds) == 3 for run in result.runs)


def test_ratios_are_of_medians(result: Result) -> None:
    assert result.copy_bandwidth.median > 0
    fastest = min(run.seconds.median for run in result.runs[:2])
    for run in result.runs:
        assert 0 < run.seconds.low <= run.seconds.median <= run.seconds.high
        assert run.tokens_per_s.median == pytest.approx(BATCH / run.seconds.median)
        assert run.tokens_per_s.low == pytest.approx(BATCH / run.seconds.high)
        assert run.speedup == fastest / run.seconds.median
        assert run.of_limit == run.speedup / run.limit
        rate = run.read_bytes / run.seconds.median
        assert run.of_bandwidth == pytest.approx(rate / result.copy_bandwidth.median)
    assert max(run.speedup for run in result.runs[:2]) == 1


def test_bytes_are_those_counted_by_hand(result: Result) -> None:
    weights = LAYERS * (3 * D * F + 2 * D * D + 2 * D * KV * HEAD + 2 * D) + D + VOCABULARY * D
    unread = LAYERS * D * (2 * (F - LIVE) + (F - ACTIVE))
    for run in result.runs:
        cached = LAYERS * 2 * KV * HEAD * (24 + 4) * BATCH
        assert run.dense_bytes == 4 * (weights + cached + BATCH * D)  # rows of the embedding
        if run.sparsity == 0.4:
            saved = 4 * unread - lists(LAYERS, LIVE, ACTIVE, (D, F))
            assert run.dense_bytes - run.read_bytes == saved
            assert run.limit == run.dense_bytes / (run.dense_bytes - saved) > 1
            assert run.saved == pytest.approx(saved / run.dense_bytes)
        else:
            assert (run.limit, run.saved) == (1.0, 0.0)


def test_json_has_every_field(result: Result, folder: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    result.write(path)
    read = json.loads(path.read_text())
    assert read.keys() == {field.name for field in fields(Result)}
    assert (read["schema"], read["kind"], read["extras"]) == (results.SCHEMA, "decode", None)
    assert read["machine"].keys() == {field.name for field in fields(Machine)}
    assert read["machine"]["memory"] > 1 << 30
    assert read["machine"]["threads"] == torch.get_num_threads()
    assert torch.__version__.startswith(read["versions"]["torch"].split("+")[0])
    assert read["versions"].keys() >= {"popc", "python", "torch", "transformers", "triton"}
    assert read["model"]["layers"] == LAYERS
    assert read["model"]["weight_bytes"] == 4 * read["model"]["parameters"]
    assert read["model"]["name"] == read["settings"]["model"] == Path(folder).name
    assert read["settings"]["rounds"] == 3
    for run in read["runs"]:
        assert run.keys() == {field.name for field in fields(Run)}
        assert run["seconds"].keys() == {"median", "low", "high", "rounds"}
    assert {run["policy"] for run in read["runs"]} == {None, "pop"}


def test_plot_is_a_picture(result: Result, tmp_path: Path) -> None:
    path = tmp_path / "new" / "plot.png"
    plot(result, path)
    assert path.read_bytes().startswith(PNG)
    assert path.stat().st_size > 10_000


def test_quantised_weights_are_ways_to_run(settings: Settings) -> None:
    """Their bytes by hand; one compiled model serves both budgets."""
    one = {"policies": ("threshold",), "sparsity": (0.4,), "codegen": "eager", "batch": (1,)}
    small = {**SMALL, **one, "rounds": 1, "weights": "int8", "bits": (8.5, 5.0)}
    quantised = Settings(model=settings.model, **small)
    said: list[str] = []
    measured = command.bench_model(quantised, with_extras=False, progress=said.append)
    assert len(said) == command.total_steps(quantised, with_extras=False)
    dense, _, plain, whole, half = measured.runs
    assert (plain.weights, plain.bits) == (None, None)
    assert [(run.name, run.policy, run.weights) for run in (whole, half)] == [
        (f"graded int8 {bits} bits", "graded", "int8") for bits in ("8.5", "5")
    ]
    weights = LAYERS * (3 * D * F + 2 * D * D + 2 * D * KV * HEAD)
    head = VOCABULARY * D
    assert whole.bits == pytest.approx(8.5) and whole.sparsity < 1e-6
    assert half.bits == pytest.approx(5, abs=0.6) and half.sparsity == pytest.approx(3.5 / 8.5)
    for run in (whole, half):
        assert run.bits is not None
        unread = 4 * weights - round(run.bits * weights / 8) + (4 - 8.5 / 8) * head
        assert run.dense_bytes == dense.dense_bytes
        assert run.dense_bytes - run.read_bytes == pytest.approx(unread, abs=2)
    console = Console(width=160)
    with console.capture() as capture:
        console.print(show(measured))
    assert "GB/s" in capture.get() and " 8.50 " in capture.get()


def test_one_ffn(tmp_path: Path) -> None:
    d, f, blocks = 32, 160, 3
    small = {"dtype": "float32", "batch": (2,), "tokens": 4, "rounds": 2, "layers": blocks}
    settings = Settings(**small, **PRUNED)
    said: list[str] = []
    measured = command.bench_ffn(ffn.Shape(d, f), settings, said.append)
    assert len(said) == ffn.ffn_steps(settings)
    assert (measured.kind, measured.model.layers) == ("ffn", blocks)
    assert measured.model.parameters == blocks * 3 * d * f
    last = measured.runs[-1]
    assert (last.batch, last.context, last.sparsity) == (2, None, 0.4)
    assert last.dense_bytes == 4 * 3 * d * f
    saved = 4 * d * (2 * (f - LIVE) + (f - ACTIVE)) - lists(1, LIVE, ACTIVE, (d, f))
    assert last.read_bytes == last.dense_bytes - saved
    assert last.tokens_per_s.median == pytest.approx(2 / last.seconds.median)
    plot(measured, tmp_path / "ffn.png")
    assert (tmp_path / "ffn.png").read_bytes().startswith(PNG)


def test_the_threshold_policy_reads_what_was_counted() -> None:
    """One token about as many as thresholds are set for, eight more."""
    small = {"dtype": "float32", "tokens": 2, "rounds": 1, "layers": 2, "codegen": "eager"}
    settings = Settings(**small, policies=("threshold",), sparsity=(0, 0.5), batch=(1, 8))
    measured = command.bench_ffn(ffn.Shape(64, 192), settings, lambda _: None)
    whole, one, _, eight = [run for run in measured.runs if run.policy]
    assert whole.read_bytes == whole.dense_bytes > eight.read_bytes > 1.2 * one.read_bytes
    assert one.saved == pytest.approx(0.5, abs=0.15)
    assert eight.limit == eight.dense_bytes / eight.read_bytes


def test_steps_that_count_nothing_are_an_error() -> None:
    plan = popc.analyze(ffn.Block(ffn.Shape(64, 192)), (torch.randn(1, 1, 64),))
    config = popc.Config(policy="threshold", sparsity=0.5)
    with pytest.raises(ModelError, match="were dense: no channels"):
        channels_read(plan, config, Session(), lambda: None)
    for none in (popc.Config(policy="pop", sparsity=0.5), popc.Config(sparsity=0)):
        assert channels_read(plan, none, Session(), lambda: None) == {}


def test_bytes_follow_the_channels_counted() -> None:
    blocks = ffn.build_blocks(ffn.Shape(64, 192), Settings(dtype="float32", layers=2))
    plan = popc.analyze(blocks, (torch.randn(1, 1, 64),))
    half, most = (popc.Config(policy="threshold", sparsity=r) for r in (0.5, 0.2))
    meant = results.step_bytes(blocks, plan, half, 1)
    assert meant.dense / 2 < meant.read < 0.52 * meant.dense  # norms too
    for share, expected in ((0.5, meant.read), (1, meant.read + meant.dense / 2)):
        counted = {group.key: [int(share * group.width)] for group in plan.inputs}
        assert results.step_bytes(blocks, plan, most, 1, reads=counted).read == expected


def test_values_stay_finite_in_many_blocks() -> None:
    """Of values that overflow every channel counts, and nothing would be left out."""
    blocks = ffn.build_blocks(ffn.Shape(256, 704), Settings(dtype="bfloat16", layers=64))
    assert blocks(torch.randn(1, 4, 256).bfloat16()).isfinite().all()


def test_blocks_exceed_the_cache() -> None:
    shape = ffn.Shape(512, 2048)
    blocks = ffn.build_blocks(shape, Settings(dtype="bfloat16"))
    size = sum(parameter.nbytes for parameter in blocks.parameters())
    assert len(blocks) == ffn.MOST or size >= max(ffn.WEIGHTS, 4 * last_level_cache())


def test_extras(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "PROMPTS", 3)
    monkeypatch.setattr(extras, "PREFILL", 32)
    # One in a process of its own is enough here.
    run = {"dense": start, "popc": cold_start}
    monkeypatch.setattr(extras, "cold_start", lambda way, asked: run[way](way, asked))
    said: list[str] = []
    cold = extras.cold_starts(settings, said.append)
    for one in cold.values():
        assert one.prefill_s > 0
        assert one.decode_s > 0
        assert one.peak_bytes > 50 << 20  # torch alone is more
        assert one.running_peak_bytes is None or one.running_peak_bytes <= one.peak_bytes
    dense, model = build(settings), build(settings)
    more = extras.extras(dense, model, settings, cold, said.append)
    assert len(said) == extras.extra_steps(settings)
    assert more.compile_ratio == cold["popc"].compile_s / cold["dense"].compile_s
    assert more.memory_ratio == cold["popc"].peak_bytes / cold["dense"].peak_bytes
    ratio = more.popc_prefill.median / more.dense_prefill.median
    assert more.prefill_overhead == pytest.approx(ratio - 1)
    assert (more.prompts, more.prefill_tokens) == (3, 32)
    assert 0 < more.host.median < 0.1
    # A prompt of a new length makes the length a symbol, once; so does the cache's.
    assert 2 <= more.popc_compilations <= more.dense_compilations


def test_a_cold_start_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho loading >&2; echo out of memory >&2; exit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ModelError, match="cold start of popc failed: out of memory"):
        cold_start("popc", Settings())


def test_experts_that_no_token_meets_are_not_read() -> None:
    sizes = {"hidden_size": 32, "moe_intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64}
    config = Qwen3MoeConfig(**sizes, **heads, num_experts=8, num_experts_per_tok=2)
    model = random_model(config, torch.float32, torch.device("cpu"))
    plan = popc.analyze(model)
    assert plan.count("experts") == 2
    every = sum(parameter.nbytes for parameter in model.parameters())
    for batch, met in ((1, 2), (2, 4), (4, 8), (8, 8)):
        unmet = 2 * (8 - met) * 3 * 32 * 40 * 4
        rows = 4 * 32 * (64 - batch)  # of the embedding
        assert results.step_bytes(model, plan, None, batch).dense == every - unmet - rows
    pruned = results.step_bytes(model, plan, popc.Config(policy="pop", sparsity=0.5), 1)
    assert 0 < pruned.saved < 0.5


@pytest.mark.parametrize(
    ("name", "billions"),
    [("tinyllama-shape", 1.10), ("llama3-8b-shape", 8.03), ("qwen3-moe-shape", 30.53)],
)
def test_shapes_have_the_size_of_their_models(name: str, billions: float) -> None:
    model = random_model(SHAPES[name], torch.bfloat16, torch.device("meta"))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e9 == pytest.approx(billions, abs=0.01)


def test_random_weights() -> None:
    shape = tiny_llama().config
    model = random_model(shape, torch.bfloat16, torch.device("cpu"), layers=1)
    assert (len(model.model.layers), model.config.num_hidden_layers) == (1, 1)
    assert shape.num_hidden_layers == 2  # the shape itself stays
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.bfloat16
    assert float(weight.detach().float().std()) == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(weight[0], weight[1])
    assert (model.model.norm.weight == 1).all()
    with torch.no_grad():
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_a_loaded_model_is_cut(folder: str) -> None:
    model = build(Settings(model=folder, layers=1))
    assert (len(model.model.layers), model.config.num_hidden_layers) == (1, 1)
    with torch.no_grad():
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_machine() -> None:
    here = machine()
    assert here.cpu
    assert here.cores >= 1
    assert here.load >= 0
    assert here.gpu is None
    assert versions()["torch"]
    bandwidth = copy_bandwidth(rounds=3)
    assert len(bandwidth.rounds) == 3
    assert 1e8 < bandwidth.low <= bandwidth.median < 1e13


def test_settings_survive_json(settings: Settings) -> None:
    assert Settings.from_json(settings.to_json()) == settings


def test_command(tmp_path: Path) -> None:
    """Through Inductor, as a user runs it."""
    torch.compiler.reset()
    out, picture = tmp_path / "ffn.json", tmp_path / "ffn.png"
    size = ["--hidden", "32", "--channels", "160", "--layers", "1", "--dtype", "float32"]
    short = ["--sparsity", "0.4", "--tokens", "4", "--rounds", "2"]
    command = ["bench", "--ffn", *size, *short, "--out", str(out), "--plot", str(picture)]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    assert "speed-up" in done.output
    read = json.loads(out.read_text())
    assert read["model"]["name"] == "FFN D=32 F=160"
    policies = [None, None, "threshold", "pop"]
    assert [run["policy"] for run in read["runs"]] == policies
    assert [run["sparsity"] for run in read["runs"]] == [None, None, 0.4, 0.4]
    assert picture.read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "1,two"], "batch='1,two' is not allowed"),
        (["--context", "1"], "context=(1,) is not allowed: at least 2"),
        (["--sparsity", "0.2,1.5"], "sparsity=1.5 is not allowed"),
        (["--sparsity", ","], "sparsity=() is not allowed: at least one value"),
        (["--policies", "best"], "policy='best' is not allowed"),
        (["--weights", "int3", "--bits", "4"], "weights='int3' is not allowed"),
        (["--weights", "int8"], "bits=() is not allowed: at least one value"),
        (["--bits", "4"], "bits=(4.0,) is not allowed: none without weights"),
        (["--weights", "int8", "--bits", "4", "--ffn"], "weights='int8' is not allowed: None with"),
        (["--device", "tpu"], "device='tpu' is not allowed"),
        (["--dtype", "int8"], "dtype='int8' is not allowed"),
        (["--no-extras", "--layers", "3"], "layers=3 is not allowed: the model has 2"),
    ],
)
def test_bad_options_are_named(options: list[str], message: str, folder: str) -> None:
    done = CliRunner().invoke(cli.app, ["bench", folder, *options])
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr

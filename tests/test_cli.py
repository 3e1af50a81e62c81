"""The command, and the examples as a user would run them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import popc
from popc import cli, models
from popc.cli import options
from tests.helpers.models import tiny_llama

EXAMPLES = Path(__file__).parent.parent / "examples"
runner = CliRunner()


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A tiny model with SmolLM2's tokenizer, on disk."""
    _, tokenizer = models.load_model()
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def test_version() -> None:
    result = runner.invoke(cli.app, ["--version"])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[0] == f"popc {popc.__version__}"
    assert f"torch {torch.__version__.split('+')[0]}" in result.output


def test_starting_imports_no_torchao() -> None:
    code = "import sys, popc.cli; sys.exit('torchao' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_analyze(folder: str) -> None:
    torch._dynamo.reset()
    result = runner.invoke(cli.app, ["analyze", folder])
    assert result.exit_code == 0, result.output
    assert "4 regions" in result.output


def test_demo(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense, pruned and quantised answers, with rates and the bits that were counted."""
    torch._dynamo.reset()
    load = models.load_model
    monkeypatch.setattr(models, "load_model", lambda name, dtype: load(folder, dtype))
    result = runner.invoke(cli.app, ["demo", "--tokens", "16", "--rounds", "1"])
    assert result.exit_code == 0, result.output
    rows = [line.split("│") for line in result.output.splitlines() if line.count("│") == 5]
    bits = {row[1].strip(): float(row[2]) for row in rows}
    assert list(bits) == [
        *("dense, eager", "dense, torch.compile", "popc, r = 0.2"),
        *("popc, int8, 8.5 bits", "popc, int8, 4.5 bits"),
    ]
    assert bits["dense, eager"] == 32 and 20 < bits["popc, r = 0.2"] < 30
    assert bits["popc, int8, 8.5 bits"] == 8.5
    assert bits["popc, int8, 4.5 bits"] == pytest.approx(4.5, abs=0.6)
    assert all(float(row[3].split()[0]) > 0 for row in rows)


def test_generate_and_eval(folder: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    say = ["generate", folder, "--prompt", "Hello", "--sparsity", "0.4", "--tokens", "4"]
    result = runner.invoke(cli.app, say)
    assert result.exit_code == 0, result.output
    out = tmp_path / "figures.json"
    sizes = ["--windows", "2", "--prompt", "16", "--continuation", "8"]
    result = runner.invoke(cli.app, ["eval", folder, "--sparsity", "0", *sizes, "--out", str(out)])
    assert result.exit_code == 0, result.output
    figures = json.loads(out.read_text())
    assert figures["agreement"] == 1.0
    assert figures["pruned_bytes"] == figures["read"] == 1.0
    assert figures["perplexity"] == pytest.approx(figures["dense_perplexity"], rel=1e-4)


def test_quantised_weights(folder: str, tmp_path: Path) -> None:
    """An answer, and one compiled model over several budgets, with the bits that were counted."""
    torch._dynamo.reset()
    quantised = ["--weights", "int8", "--bits"]
    say = ["generate", folder, "--prompt", "Hello", *quantised, "4.5", "--tokens", "4"]
    result = runner.invoke(cli.app, say)
    assert result.exit_code == 0, result.output
    out = tmp_path / "figures.json"
    sizes = ["--windows", "2", "--prompt", "32", "--continuation", "8", "--out", str(out)]
    result = runner.invoke(cli.app, ["eval", folder, *quantised, "8.5,5,3.5", *sizes])
    assert result.exit_code == 0, result.output
    points = json.loads(out.read_text())
    assert [(point["bits"], point["policy"], point["weights"]) for point in points] == [
        (bits, "graded", "int8") for bits in (8.5, 5.0, 3.5)
    ]
    for point, least in zip(points, (0.01, 0.5, 0.5), strict=True):
        assert point["read_bits"] == pytest.approx(point["bits"], abs=least)
        assert f"{point['read_bits']:.2f}" in result.output
    away = [abs(p["perplexity"] / p["dense_perplexity"] - 1) for p in points]
    assert away[0] < 0.01 and len(set(away)) == 3
    result = runner.invoke(cli.app, ["eval", folder, *quantised, "5", *sizes])
    assert result.exit_code == 0, result.output
    alone = json.loads(out.read_text())
    assert alone["bits"] == 5
    assert alone["read_bits"] == pytest.approx(points[1]["read_bits"])


@pytest.mark.parametrize(
    ("asked", "sparsity", "read"),
    [
        # By another text: half of the channels, and so half of the bytes.
        (["--policy", "mlp=wanda_sp", "--sparsity", "0.5", "--calibration", "2"], 0.5, None),
        (["--bytes", "0.6"], pytest.approx(0.4), pytest.approx(0.6, abs=0.1)),
    ],
)
def test_eval_by_other_means(
    asked: list[str], sparsity: float, read: float | None, folder: str, tmp_path: Path
) -> None:
    torch._dynamo.reset()
    out = tmp_path / "figures.json"
    sizes = ["--windows", "1", "--prompt", "32", "--continuation", "8"]
    result = runner.invoke(cli.app, ["eval", folder, *asked, *sizes, "--out", str(out)])
    assert result.exit_code == 0, result.output
    figures = json.loads(out.read_text())
    assert figures["sparsity"] == sparsity
    if read is None:
        assert figures["calibration"] == 2
        assert figures["pruned_bytes"] == pytest.approx(0.5, abs=0.01)
    else:
        assert figures["read"] == read
    assert figures["perplexity"] != pytest.approx(figures["dense_perplexity"], rel=1e-5)


def test_a_mass_makes_the_budget_elastic() -> None:
    config = options.config_of("threshold", sparsity=0.4, mass=0.9)
    assert (config.budget, config.mass) == ("elastic", 0.9)
    assert options.config_of("threshold", "mlp", sparsity=0.4, mass=None).budget == "fixed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["analyze", "no/such/model"], "'no/such/model' could not be loaded"),
        (["generate", "smollm2", "--sparsity", "1.5"], "sparsity=1.5 is not allowed"),
        (["generate", "smollm2", "--targets", "mlp,heads"], "targets=('mlp', 'heads') is not"),
        (["analyze", "smollm2", "--dtype", "int8"], "dtype='int8' is not allowed"),
        (["generate", "smollm2", "--weights", "int3"], "weights='int3' is not allowed"),
        (["explain", "smollm2", "--bits", "0"], "bits=0.0 is not allowed"),
        (["report", "page.html", "--bits", "65"], "bits=65.0 is not allowed"),
        (["eval", "smollm2", "--bits", "4", "--bytes", "0.5"], "bits=4.0 is not allowed: None"),
        (["eval", "smollm2", "--bits", "8.5,four"], "bits='8.5,four' is not allowed: numbers"),
        (["eval", "smollm2", "--bits", "9,4", "--policy", "pop"], "policy='pop' is not allowed"),
        (["eval", "smollm2", "--bits", "9,4", "--tasks", "copy"], "none where several bits"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str) -> None:
    result = runner.invoke(cli.app, arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


# The real model has 30 layers, which take their time to compile.
SCRIPT = """
import runpy
from popc import models
from tests.helpers.profiles import THOROUGH
load = models.load_model
def two_layers(name):
    model, tokenizer = load(name)
    del model.model.layers[2:]
    model.config.num_hidden_layers = 2
    return model, tokenizer
models.load_model = load if THOROUGH else two_layers
runpy.run_path({path!r}, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("example", "shows"),
    [
        ("generate.py", "The capital of France is"),
        ("backend_string.py", "["),
        ("analyze_any_module.py", "1 regions"),
        ("unit_policy.py", "first_come ["),
        ("input_policy.py", "magnitude ["),
    ],
)
def test_example(example: str, shows: str) -> None:
    command = [sys.executable, "-c", SCRIPT.format(path=str(EXAMPLES / example))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert shows in done.stdout

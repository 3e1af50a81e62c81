"""What people do to a model after it was compiled, and machines on which nothing works."""

from __future__ import annotations

import copy
import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import popc
from popc.errors import ModelError
from tests.models import tiny_llama
from tests.oracle import relative
from tests.test_stress import POLICIES, generated, prompt, twin_of


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()


def loaded(model: nn.Module) -> None:
    model.load_state_dict(tiny_llama(seed=5).state_dict())


def merged(model: nn.Module) -> None:
    """As PEFT merges a LoRA, past the version counters."""
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            made = torch.Generator().manual_seed(len(name))
            down = torch.randn(2, weight.shape[1], generator=made)
            weight.data += torch.randn(weight.shape[0], 2, generator=made) @ down / 4


def replaced(model: nn.Module) -> None:
    for weight in model.parameters():
        weight.data = weight.data * 2


def scaled(model: nn.Module) -> None:
    """Some input channels of a linear count for more; the norms say so."""
    for layer in model.model.layers:
        with torch.no_grad():
            layer.mlp.down_proj.weight[:, ::3] *= 8


@pytest.mark.parametrize("change", [loaded, merged, replaced, scaled])
@pytest.mark.parametrize("policy", POLICIES)
def test_changed_weights_are_followed(policy: str, change) -> None:
    model = tiny_llama()
    twin = twin_of(model, policy)
    before = generated(twin, prompt(0))
    change(model)
    got = generated(twin, prompt(0))
    assert relative(got, before) > 1e-2
    torch.compiler.reset()
    fresh = tiny_llama()
    change(fresh)
    assert torch.equal(got, generated(twin_of(fresh, policy), prompt(0)))


def test_another_dtype_is_followed() -> None:
    model = tiny_llama()
    twin = twin_of(model)
    generated(twin, prompt(0))
    twin.to(torch.float64)
    torch.compiler.reset()
    expected = generated(twin_of(tiny_llama().double()), prompt(0))
    got = generated(twin, prompt(0))
    assert got.dtype == torch.float64
    assert relative(got, expected) < 1e-6


def test_a_deep_copy_has_weights_of_its_own() -> None:
    twin = twin_of(tiny_llama(), "pop")
    expected = generated(twin, prompt(0))
    other = copy.deepcopy(twin)
    assert torch.equal(generated(other, prompt(0)), expected)
    with torch.no_grad():
        for weight in other.parameters():
            weight.zero_()
    assert generated(other, prompt(0)).abs().max() == 0
    assert torch.equal(generated(twin, prompt(0)), expected)


def test_a_calibrated_twin_is_not_copied() -> None:
    twin = popc.compile(
        tiny_llama(), policy="wanda_sp", sparsity=0.5, codegen="eager", calibration=[prompt(1)]
    )
    with pytest.raises(ModelError, match="calibration"):
        copy.deepcopy(twin)


def test_pickling_says_what_to_do() -> None:
    twin = twin_of(tiny_llama())
    with pytest.raises(ModelError, match="state_dict"):
        pickle.dumps(twin)
    assert not any(key.startswith("popc") for key in twin.state_dict())


def test_a_cache_from_a_file_decodes_dense(tmp_path: Path) -> None:
    from transformers import DynamicCache

    twin, cache = twin_of(tiny_llama()), DynamicCache()
    generated(twin, prompt(0), 1, cache)
    read = pickle.loads(pickle.dumps(cache))
    dense = generated(tiny_llama(), prompt(2, 1), 0, copy.deepcopy(read))
    assert relative(generated(twin, prompt(2, 1), 0, read), dense) < 1e-5


def test_saved_files_are_as_before(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "before")
    twin = popc.compile(model, policy="pop", sparsity=0.5)
    generated(twin, prompt(0), 1)
    for number, saved in enumerate((model, twin)):
        saved.save_pretrained(tmp_path / str(number))
        ours = (tmp_path / str(number) / "model.safetensors").read_bytes()
        assert ours == (tmp_path / "before" / "model.safetensors").read_bytes()


def test_compiling_a_twin_is_compiling_its_model() -> None:
    model = tiny_llama()
    first = twin_of(model, "pop")
    expected = generated(first, prompt(0))
    second = popc.compile(first, sparsity=0, codegen="eager")
    assert relative(generated(second, prompt(0)), generated(tiny_llama(), prompt(0))) < 1e-4
    assert torch.equal(generated(first, prompt(0)), expected)


SCRIPT = """
import torch, popc
from tests.models import tiny_llama
from tests.test_stress import generated, prompt
twin = popc.compile(tiny_llama(), policy={policy!r}, sparsity={sparsity}, codegen={codegen!r})
print("sum", float(generated(twin, prompt(0)).double().abs().sum()))
"""


def started(folder: Path, environment: dict[str, str] | None = None, version: str = "", **options):
    given = {"policy": "pop", "sparsity": 0.5, "codegen": "eager", **options}
    code = SCRIPT.format(**given)
    if version:
        code = f"import popc.version; popc.version.__version__ = {version!r}\n" + code
    known = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    known["PYTHONPATH"] = str(Path(__file__).parent.parent)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**known, **(environment or {})},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finished(process) -> tuple[float, str]:
    """What the script printed, and its warnings."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return float(out.split("sum")[1]), err


@pytest.fixture(scope="module")
def expected() -> float:
    torch.compiler.reset()
    return float(generated(twin_of(tiny_llama(), "pop"), prompt(0)).double().abs().sum())


def test_a_compiler_that_fails_is_a_warning(tmp_path: Path, expected: float) -> None:
    got, warned = finished(started(tmp_path, {"CXX": "/bin/false"}))
    assert got == pytest.approx(expected, rel=1e-5)
    assert "could not be built" in warned


def test_a_cache_that_cant_be_written_is_a_warning(tmp_path: Path, expected: float) -> None:
    """A file stands where its folder should be, as on a full or read-only disk."""
    (tmp_path / "taken").write_text("")
    got, warned = finished(started(tmp_path / "taken" / "cache"))
    assert got == pytest.approx(expected, rel=1e-5)
    assert "could not be built" in warned


def test_two_processes_build_at_once_and_a_broken_build_is_built_anew(
    tmp_path: Path, expected: float
) -> None:
    both = [started(tmp_path), started(tmp_path)]
    for process in both:
        got, warned = finished(process)
        assert got == pytest.approx(expected, rel=1e-5) and "built" not in warned
    (built,) = [p for p in tmp_path.rglob("*.so") if b"score_histogram" in p.read_bytes()]
    built.chmod(built.stat().st_mode | stat.S_IWUSR)
    built.write_bytes(built.read_bytes()[:1000])
    got, _ = finished(started(tmp_path))
    assert got == pytest.approx(expected, rel=1e-5)


def test_no_two_configs_share_a_cached_graph(tmp_path: Path) -> None:
    """What generated code is kept for one sparsity, or version of popc, serves no other."""
    alone = {
        r: finished(started(tmp_path / str(r), sparsity=r, codegen="inductor"))[0]
        for r in (0.3, 0.6)
    }
    assert alone[0.3] != pytest.approx(alone[0.6], rel=1e-3)
    shared = tmp_path / "shared"
    for r, expected in (*alone.items(), *alone.items()):
        got, _ = finished(started(shared, sparsity=r, **generated_code))
        assert got == pytest.approx(expected, rel=1e-6)
    got, _ = finished(started(shared, sparsity=0.3, **generated_code, version="0.0.other"))
    assert got == pytest.approx(alone[0.3], rel=1e-6)

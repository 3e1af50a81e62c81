"""What people do to a model after it was compiled, and machines on which nothing works."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers import DynamicCache

import popc
from popc import version
from popc.errors import ModelError
from popc.testing import MLP, Layer, Transformer
from tests.helpers.forms import Attention, D, thirds
from tests.helpers.generation import POLICIES, compiled_of, generated, prompt
from tests.helpers.models import tiny_llama
from tests.helpers.oracle import relative

pytestmark = pytest.mark.usefixtures("fresh_compiler")


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
    compiled = compiled_of(model, policy)
    before = generated(compiled, prompt(0))
    change(model)
    got = generated(compiled, prompt(0))
    assert relative(got, before) > 1e-2
    torch.compiler.reset()
    changed = tiny_llama()
    change(changed)
    assert torch.equal(got, generated(compiled_of(changed, policy), prompt(0)))


def test_changed_weights_of_an_encoder_are_followed() -> None:
    """Its one pass measures nothing that is kept, but goes by norms too."""

    def made() -> nn.Module:
        torch.manual_seed(0)
        return Attention(3 * D, thirds).eval()

    options = {"policy": "pop", "sparsity": 0.5, "targets": ("attention",), "codegen": "eager"}
    module, changed, x = made(), made(), torch.randn(1, 6, D)
    compiled = popc.compile(module, **options)
    with torch.no_grad():
        compiled(x)
        for head in torch.arange(D).chunk(4):  # in turn the one that counts by far
            for each in (module, changed):
                each.o.weight[:, head] *= 4096
            got = compiled(x)
            torch.compiler.reset()
            assert torch.equal(got, popc.compile(changed, **options)(x))


def test_another_dtype_is_followed() -> None:
    model = tiny_llama()
    compiled = compiled_of(model)
    generated(compiled, prompt(0))
    compiled.to(torch.float64)
    torch.compiler.reset()
    expected = generated(compiled_of(tiny_llama().double()), prompt(0))
    got = generated(compiled, prompt(0))
    assert got.dtype == torch.float64
    assert relative(got, expected) < 1e-6


def test_a_deep_copy_has_weights_of_its_own() -> None:
    compiled = compiled_of(tiny_llama(), "pop")
    expected = generated(compiled, prompt(0))
    other = copy.deepcopy(compiled)
    assert torch.equal(generated(other, prompt(0)), expected)
    with torch.no_grad():
        for weight in other.parameters():
            weight.zero_()
    assert generated(other, prompt(0)).abs().max() == 0
    assert torch.equal(generated(compiled, prompt(0)), expected)


def test_a_calibrated_model_is_not_copied() -> None:
    compiled = popc.compile(
        tiny_llama(), policy="wanda_sp", sparsity=0.5, codegen="eager", calibration=[prompt(1)]
    )
    with pytest.raises(ModelError, match="calibration"):
        copy.deepcopy(compiled)


def test_pickling_says_what_to_do() -> None:
    compiled = compiled_of(tiny_llama())
    with pytest.raises(ModelError, match="state_dict"):
        pickle.dumps(compiled)
    assert not any(key.startswith("popc") for key in compiled.state_dict())


def test_a_cache_from_a_file_decodes_dense(tmp_path: Path) -> None:
    compiled, cache = compiled_of(tiny_llama()), DynamicCache()
    generated(compiled, prompt(0), 1, cache)
    read = pickle.loads(pickle.dumps(cache))
    dense = generated(tiny_llama(), prompt(2, 1), 0, copy.deepcopy(read))
    assert relative(generated(compiled, prompt(2, 1), 0, read), dense) < 1e-5


def test_saved_files_are_as_before(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "before")
    compiled = popc.compile(model, policy="pop", sparsity=0.5)
    generated(compiled, prompt(0), 1)
    for number, saved in enumerate((model, compiled)):
        saved.save_pretrained(tmp_path / str(number))
        ours = (tmp_path / str(number) / "model.safetensors").read_bytes()
        assert ours == (tmp_path / "before" / "model.safetensors").read_bytes()


def test_compiling_a_compiled_model_is_compiling_its_original() -> None:
    model = tiny_llama()
    first = compiled_of(model, "pop")
    expected = generated(first, prompt(0))
    second = popc.compile(first, sparsity=0, codegen="eager")
    assert relative(generated(second, prompt(0)), generated(tiny_llama(), prompt(0))) < 1e-4
    assert torch.equal(generated(first, prompt(0)), expected)


QUICK = {"CXX": str(Path(__file__).parents[1] / "helpers/quick-c++")}
SCRIPT = """
import torch, popc
from tests.runtime.test_faults import MODEL, decoded
compiled = popc.compile(MODEL.make(), policy={policy!r}, sparsity={sparsity}, codegen={codegen!r})
print("sum", decoded(compiled))
"""
MODEL = Transformer(layers=(Layer(block=MLP(channels=64)),), width=32, dtype="float32")


@torch.no_grad()
def decoded(call) -> float:
    """The size of what a prompt and three more tokens give."""
    cache, total = DynamicCache(), 0.0
    for ids in prompt(0).remainder(MODEL.vocabulary).split([6, 1, 1, 1], 1):
        total += float(call(ids, cache=cache, use_cache=True).logits.double().abs().sum())
    return total


def started(folder: Path, environment: dict[str, str] | None = None, before: str = "", **options):
    """The script in a process of its own; ``before`` is code that goes before it."""
    arguments = {"policy": "pop", "sparsity": 0.5, "codegen": "eager", **options}
    known = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    known["PYTHONPATH"] = str(Path(__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-c", before + SCRIPT.format(**arguments)],
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


def expected(sparsity: float = 0.5, policy: str = "pop") -> float:
    torch.compiler.reset()
    return decoded(compiled_of(MODEL.make(), policy, sparsity=sparsity))


def test_a_compiler_that_fails_is_a_warning(tmp_path: Path) -> None:
    got, warned = finished(started(tmp_path, {"CXX": "/bin/false"}))
    assert got == pytest.approx(expected(), rel=1e-5)
    assert "could not be built" in warned


def test_a_full_disk_is_a_warning(tmp_path: Path) -> None:
    """No file can grow beyond a few bytes: neither source nor build can be kept."""
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
    got, warned = finished(started(tmp_path, before=full))
    assert got == pytest.approx(expected(), rel=1e-5)
    assert "could not be built" in warned


SMALL = """
from popc.ops import native
native.source = lambda: 'extern "C" { extern const char popc_mark[] = "popc was here"; }'
"""


def test_builds_at_once_and_a_build_that_was_damaged(tmp_path: Path) -> None:
    """Two processes wait for one another; what is not as it was built is built anew.

    What is built is next to nothing: the ops' reference then does the work.
    """
    both = [started(tmp_path, QUICK, SMALL) for _ in range(2)]
    for process in both:
        got, warned = finished(process)
        assert got == pytest.approx(expected(), rel=1e-5) and "built" not in warned
    (built,) = [p for p in tmp_path.rglob("*.so") if b"popc was here" in p.read_bytes()]
    whole = built.read_bytes()
    built.write_bytes(whole[: len(whole) // 2])
    got, warned = finished(started(tmp_path, QUICK, SMALL))
    assert got == pytest.approx(expected(), rel=1e-5)
    assert "built anew" in warned and built.stat().st_size == len(whole)


def cached(policy: str, sparsity: float, right: dict[float, float]) -> tuple[int, int]:
    """How often generated code was found in Inductor's cache, and how often it was not."""
    torch.compiler.reset()
    counters.clear()
    compiled = compiled_of(MODEL.make(), policy, sparsity=sparsity, codegen="inductor")
    assert decoded(compiled) == pytest.approx(right[sparsity], rel=1e-5)
    seen = counters["inductor"]
    return seen["fxgraph_cache_hit"], seen["fxgraph_cache_miss"]


@pytest.mark.parametrize("policy", ["threshold", "pop"])
def test_generated_code_is_kept_by_what_it_depends_on(tmp_path: Path, monkeypatch, policy) -> None:
    """Thresholds are inputs, so any sparsity finds the same code; counts are shapes, so that of a
    decode step is generated anew. Code of other sources of popc is never loaded."""
    right = {sparsity: expected(sparsity, policy) for sparsity in (0.3, 0.6)}
    assert right[0.3] != pytest.approx(right[0.6], rel=1e-4)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    hits, made = cached(policy, 0.3, right)
    assert hits == 0 and made > 1
    others, again = cached(policy, 0.6, right)
    assert others + again == made and again == (0 if policy == "threshold" else 1)
    monkeypatch.setattr("popc.version.sources_digest", lambda: "of other sources")
    assert cached(policy, 0.6, right) == (0, made)
    assert cached(policy, 0.6, right) == (made, 0)


def test_the_digest_of_sources_is_of_all_of_them(tmp_path: Path) -> None:
    seen = {version._digest(tmp_path)}
    for name, content in (
        ("a.py", "x = 1"),
        ("a.py", "x = 2"),
        ("ops/cpu/k.h", "x"),
        ("ops/cpu/k.cpp", "x"),
        ("ops/cpu/k.cpp", "y"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
        seen.add(version._digest(tmp_path))
    assert len(seen) == 6
    (tmp_path / "a.pyc").write_text("compiled")
    assert version._digest(tmp_path) in seen
    (tmp_path / "ops/cpu/k.h").rename(tmp_path / "ops/cpu/l.h")
    assert version._digest(tmp_path) not in seen
    assert version.sources_digest() == version._digest(Path(popc.__file__).parent)

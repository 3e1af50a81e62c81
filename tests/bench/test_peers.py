"""Peers are measured alike: files hold the model, and windows are counted as popc eval does."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import popc
from benchmarks import engines, llama_files, peers
from benchmarks.engines import POPC, Spec, Task, engine_of
from benchmarks.llama_files import interleave_rotary, llama_cpp, write_f16
from benchmarks.peer_results import show
from benchmarks.peers import PeerSettings, Reference, check_logits, measure, parsed
from benchmarks.scores import Scores
from benchmarks.stored import stored_in, stored_of, tensor_bytes
from popc.bench.machine import read_bandwidth
from popc.errors import ConfigError, ModelError
from popc.tools.evaluate import evaluate
from tests.helpers.models import tiny_llama

D, F, KV, HEAD, VOCABULARY, LAYERS = 64, 160, 2, 16, 96, 2  # of tiny_llama
BUILT = importlib.util.find_spec("llama_cpp") is not None
needs_llama = pytest.mark.skipif(not BUILT, reason="llama-cpp-python, of popc[peers], is missing")
EAGER = "policy=dense,sparsity=0.0,dtype=float32,codegen=eager"


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: LlamaForCausalLM) -> Path:
    """The tiny model, and a tokenizer of one word."""
    path = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(path)
    words = Tokenizer(WordLevel({"word": 0}, unk_token="word"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(path)
    return path


@pytest.fixture
def task(folder: Path) -> Task:
    ids = torch.randint(VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(0))
    return Task(str(folder), None, ids[:, :16], ids, tokens=4, threads=1)


@pytest.fixture
def text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of random tokens, of 12, where 8 are the prompt."""

    def windows(_: object, count: int, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(VOCABULARY, (count, length), generator=generator)

    monkeypatch.setattr(peers, "windows", windows)
    monkeypatch.setattr(peers, "WINDOW", 12)
    monkeypatch.setattr(peers, "PROMPT", 8)


def interleaved_rotary(x: Tensor, base: float) -> Tensor:
    """llama.cpp's embedding of ``[T, HEAD]``: values 2 i and 2 i + 1 are turned together."""
    position = torch.arange(len(x))[:, None]
    angle = position * base ** (-torch.arange(0, HEAD, 2) / HEAD)
    even, odd = x[:, ::2], x[:, 1::2]
    turned = even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()
    return torch.stack(turned, dim=-1).flatten(1)


def test_interleaved_rows_give_the_same_attention_scores(model: LlamaForCausalLM) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    attention, heads = model.model.layers[0].self_attn, model.config.num_attention_heads
    x, base = torch.randn(7, D), model.config.rope_parameters["rope_theta"]
    q, k = attention.q_proj.weight, attention.k_proj.weight
    cos, sin = model.model.rotary_emb(x[None], torch.arange(7)[None])
    ours = [(x @ weight.T).view(1, 7, -1, HEAD).transpose(1, 2) for weight in (q, k)]
    q_there, k_there = apply_rotary_pos_emb(*ours, cos, sin)
    first = q_there[0, 0] @ k_there[0, 0].T
    ours = [(x @ interleave_rotary(w, h).T)[:, :HEAD] for w, h in ((q, heads), (k, KV))]
    q_here, k_here = (interleaved_rotary(rows, base) for rows in ours)
    torch.testing.assert_close(q_here @ k_here.T, first, atol=1e-4, rtol=1e-4)


def test_a_bias_is_interleaved_as_the_rows_are(model: LlamaForCausalLM) -> None:
    weight = torch.arange(2 * HEAD).float()
    rows = interleave_rotary(weight[:, None].expand(-1, 3), 2)
    assert torch.equal(interleave_rotary(weight, 2), rows[:, 0])
    assert interleave_rotary(weight, 2)[:4].tolist() == [0, HEAD // 2, 1, HEAD // 2 + 1]


@pytest.mark.parametrize("tied", [False, True])
def test_a_file_holds_the_model(tmp_path: Path, tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    write_f16(model, tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(tensors) == 9 * LAYERS + 2 + (not tied)
    assert ("output.weight" in tensors) is not tied
    layer = model.model.layers[1]
    expected = {
        "blk.1.ffn_down.weight": layer.mlp.down_proj.weight,
        "blk.1.attn_k.weight": interleave_rotary(layer.self_attn.k_proj.weight, KV),
        "token_embd.weight": model.model.embed_tokens.weight,
    }
    for name, weight in expected.items():
        assert np.array_equal(tensors[name], weight.detach().half().numpy()), name
    assert tensors["output_norm.weight"].dtype == np.float32
    assert reader.fields["llama.attention.head_count_kv"].contents() == KV
    assert reader.fields["llama.rope.freq_base"].contents() == 10000.0


def test_what_is_no_plain_llama_is_refused(tmp_path: Path) -> None:
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(ModelError, match="plain rotary"):
        write_f16(tiny_llama(rope_parameters=scaled), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_are_those_of_linears(tmp_path: Path, tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    write_f16(model, tmp_path / "model.gguf")
    weights = LAYERS * (3 * D * F + 2 * D * D + 2 * D * KV * HEAD)
    here, there = stored_of(model), stored_in(tmp_path / "model.gguf")
    assert (here.layers, here.head, here.weights) == (4 * weights, 4 * VOCABULARY * D, weights)
    assert (there.layers, there.head, there.weights) == (2 * weights, 2 * VOCABULARY * D, weights)
    assert (here.bits, there.bits) == (32, 16)


def test_bytes_of_a_wrapper_are_those_within() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    linear = nn.Sequential(nn.Linear(D, F, bias=False).bfloat16())
    quantize_(linear, Int8WeightOnlyConfig())
    scales = tensor_bytes(linear[0].weight) - D * F
    assert F * 2 <= scales <= F * 16


def test_options_are_parsed() -> None:
    spec = Spec.popc("sparsity=0.25,policy=pop,dtype=float32,count=True")
    assert (spec.kind, spec.format) == (POPC, "float32")
    assert spec.options == {"sparsity": 0.25, "policy": "pop", "count": True}
    assert spec.name == "popc float32 sparsity=0.25 policy=pop count=True"
    assert Spec.popc("").format == "bfloat16"
    with pytest.raises(ConfigError, match="name=value"):
        Spec.popc("sparsity")
    with pytest.raises(ConfigError, match="dtype"):
        Spec.popc("dtype=int3")


def test_settings_refuse_what_can_not_be_measured() -> None:
    nothing = {"formats": (), "dense": (), "torchao": ()}
    with pytest.raises(ConfigError, match="nothing"):
        PeerSettings("smollm2", **nothing)
    with pytest.raises(ConfigError, match="Q8_0"):
        PeerSettings("smollm2", formats=("Q9",))
    with pytest.raises(ConfigError, match="random weights"):
        PeerSettings("tinyllama-shape", windows=1)
    given = vars(parsed(["tinyllama-shape", "--dense", "", "--popc", "a=1", "--popc", "b=2"]))
    assert (given["dense"], given["popc"]) == ((), ["a=1", "b=2"])


def test_counted_are_the_tokens_after_the_prompt() -> None:
    windows, prompt = torch.tensor([[1, 2, 3, 0, 2]]), 2
    rows = torch.zeros(3, 4)
    rows[0, 3] = rows[1, 1] = 5.0

    def logits(window: Tensor, given: int) -> Tensor:
        assert (window.tolist(), given) == ([1, 2, 3, 0, 2], prompt)
        return rows

    scores = Scores.of(windows, prompt, logits)
    likely = math.log(1 + 3 * math.exp(-5))
    expected = [likely, 5 + likely, math.log(4)]
    assert scores.losses.tolist() == [pytest.approx(expected, rel=1e-5)]
    assert scores.perplexity == pytest.approx(math.exp(sum(expected) / 3), rel=1e-5)
    other = Scores(scores.losses, torch.tensor([[3, 2, 0]]))
    assert scores.agreement(other) == pytest.approx(2 / 3)


def test_what_popc_eval_says_is_said_too(
    model: LlamaForCausalLM, task: Task, fresh_compiler: None
) -> None:
    options = EAGER.replace("dense,sparsity=0.0", "threshold,sparsity=0.5")
    windows = torch.randint(VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        engine = engine_of(Spec.popc(options), task)
        scores, share = engine.scores(windows, 12)
        config = {**Spec.popc(options).options, "count": True}
        other = tiny_llama()
        plan, compiled = popc.analyze(other), popc.compile(other, **config)
        quality = evaluate(model, compiled, windows, 12, plan=plan)
    assert scores.losses.shape == (2, 8)
    assert scores.perplexity == pytest.approx(quality.perplexity, rel=1e-5)
    assert share == pytest.approx(quality.read)
    whole = Scores.of(windows, 12, lambda window, prompt: model(window[None]).logits[0, 11:-1])
    assert scores.agreement(whole) == quality.agreement
    assert 0 < share < 1 and 0 < engine.share_read() < 1


def test_a_run_has_all_figures(folder: Path, text: None, tmp_path: Path) -> None:
    nothing = {"formats": (), "dense": (), "torchao": ()}
    sizes = {"windows": 2, "context": 16, "prompt": 24, "tokens": 4, "rounds": 2, "threads": 1}
    settings = PeerSettings(str(folder), popc=(EAGER,), **nothing, **sizes)
    said: list[str] = []
    result = measure(settings, tmp_path, said.append)
    (dense,) = result.peers
    assert dense.name == Spec.popc(EAGER).name and f"quality of {dense.name}" in said
    assert (dense.bits, dense.stored_bits) == (32, 32)
    weights = LAYERS * (3 * D * F + 2 * D * D + 2 * D * KV * HEAD) + VOCABULARY * D
    assert dense.read_bytes == 4 * (weights + LAYERS * 2 * KV * HEAD * (16 + 4))
    rate = dense.read_bytes / dense.seconds.median
    assert dense.of_bandwidth == pytest.approx(rate / result.read_bandwidth.median)
    assert len(dense.seconds.rounds) == len(dense.prefill.rounds) == 2
    assert dense.memory > dense.empty > 0
    assert dense.quality.over_dense == pytest.approx(0, abs=1e-4)
    assert (dense.quality.agreement, dense.quality.bits) == (1, 32)
    console = Console(file=io.StringIO(), width=100)
    console.print(show(result))
    shown = console.file.getvalue()
    assert f"{dense.tokens_per_s.median:.1f} (" in shown and "0.0%" in shown
    result.write(tmp_path / "new" / "result.json")
    read = json.loads((tmp_path / "new" / "result.json").read_text())
    assert read["peers"][0]["quality"]["perplexity"] == dense.quality.perplexity
    assert read["settings"]["model"] == folder.name


def test_a_worker_says_what_failed(task: Task) -> None:
    with pytest.raises(ModelError, match=r"popc float32 sparsity=2: ConfigError .*sparsity"):
        peers.Worker(Spec.popc("sparsity=2,dtype=float32"), task)


class Fixed:
    """In place of a worker: an engine with the logits given."""

    name = "fixed"

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def call(self, method: str, window: Tensor, prompt: int) -> Tensor:
        assert (method, prompt) == ("logits", 1)
        return self.logits


def test_wrong_logits_stop_the_run(task: Task, model: LlamaForCausalLM) -> None:
    with torch.no_grad():
        logits = model(task.short).logits[0, :-1]
    reference = Reference(None, logits, None, None)
    check_logits(Fixed(logits.half().float()), task, reference)
    for wrong in (logits.roll(1, 0), logits * 1.03, logits * float("nan")):
        with pytest.raises(ModelError, match="differ"):
            check_logits(Fixed(wrong), task, reference)


@pytest.mark.skipif(BUILT, reason="llama-cpp-python is installed")
def test_it_is_said_what_to_install() -> None:
    with pytest.raises(ModelError, match=r"popc\[peers\]"):
        llama_cpp()


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(ModelError, match=r"popc\[peers\]"):
        llama_cpp()


def test_reading_is_measured() -> None:
    rates = read_bandwidth(rounds=2)
    assert len(rates.rounds) == 2 and 1e8 < rates.low <= rates.median


@needs_llama
@pytest.mark.parametrize("tied", [False, True])
def test_llama_cpp_gives_the_logits_of_transformers(tmp_path: Path, task: Task, tied: bool) -> None:
    model, path = tiny_llama(tie_word_embeddings=tied), tmp_path / "model-F16.gguf"
    write_f16(model, path)
    llama_files.quantize(path, tmp_path / "model-Q8_0.gguf", "Q8_0", 1)
    engine = engine_of(Spec(engines.LLAMA, "F16", file=path), task)
    window = task.long[0]
    with torch.no_grad():
        expected = model(window[None]).logits[0, 9:-1]
    logits = engine.logits(window, 10)
    assert (logits - expected).norm() < 0.01 * expected.norm()
    assert engine.decode() > 0 and engine.prefill() > 0 and engine.decode() > 0
    assert engine.cached() == 2 * 2 * LAYERS * KV * HEAD * 20
    assert 8 <= stored_in(tmp_path / "model-Q8_0.gguf").bits <= 16

"""popc as a model of lm-evaluation-harness, on a task and a model that are files made here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast

import popc
from popc.compat import cache_keyword
from tests.helpers.models import tiny_llama

TASK = """
task: local_words
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list:
  - metric: acc
"""
DOCS = [
    {"text": "w1 w2 w3 w4 w5 w6 w7", "choices": ["w8 w9 w10", "w3 w2"], "label": 0},
    {"text": "w9 w1 w9 w1 w9 w1 w9", "choices": ["w1 w9 w1", "w4 w4"], "label": 0},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w95"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0").save_pretrained(path)
    return path


def requests() -> list[tuple[tuple[str, str], list[int], list[int]]]:
    made = []
    for doc in DOCS:
        context = [int(word[1:]) for word in doc["text"].split()]
        for choice in doc["choices"]:
            ids = [int(word[1:]) for word in choice.split()]
            made.append(((doc["text"], choice), context, ids))
    return made


def likelihoods(**options: object) -> list[float]:
    from popc.harness import PopcLM

    torch.compiler.reset()
    model = PopcLM(device="cpu", dtype="float32", codegen="eager", **options)
    return [likely for likely, _ in model._loglikelihood_tokens(requests(), disable_tqdm=True)]


def test_without_sparsity_it_is_the_harness_own(folder: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    dense = HFLM(str(folder), device="cpu", dtype="float32")
    expected = dense._loglikelihood_tokens(requests(), disable_tqdm=True)
    got = likelihoods(pretrained=str(folder), sparsity=0)
    assert got == pytest.approx([likely for likely, _ in expected], abs=1e-4)


def test_pruned_is_what_decoding_gives(folder: Path) -> None:
    got = likelihoods(pretrained=str(folder), sparsity=0.6, targets="mlp+attention")
    dense = likelihoods(pretrained=str(folder), sparsity=0)
    torch.compiler.reset()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    compiled = popc.compile(model, sparsity=0.6, codegen="eager", targets=("mlp", "attention"))
    expected = []
    for _, context, continuation in requests():
        cache = {cache_keyword(compiled.forward): DynamicCache()}
        total, ids = 0.0, context
        for token in continuation:
            with torch.no_grad():
                logits = compiled(torch.tensor([ids]), **cache, use_cache=True).logits[0, -1]
            total += float(logits.log_softmax(-1)[token])
            ids = [token]
        expected.append(total)
    assert got == pytest.approx(expected, abs=1e-4)
    assert got != pytest.approx(dense, abs=1e-3)


def test_a_bad_option_is_popcs_own_error(folder: Path) -> None:
    with pytest.raises(popc.ConfigError, match="sparsity=2 is not allowed"):
        likelihoods(pretrained=str(folder), sparsity=2)


def test_the_command_runs_a_local_task(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    (tmp_path / "task.yaml").write_text(TASK.format(data=data))
    model_args = f"pretrained={folder},sparsity=0.4,policy=pop,codegen=eager,dtype=float32"
    command = [sys.executable, "-m", "popc.harness", "run", "--model", "popc", "--device", "cpu"]
    command += ["--model_args", model_args, "--tasks", "local_words"]
    command += ["--include_path", str(tmp_path)]
    command += ["--output_path", str(tmp_path / "out")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | offline)
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = (tmp_path / "out").rglob("results*.json")
    results = json.loads(written.read_text())["results"]["local_words"]
    assert results["acc,none"] in (0.0, 0.5, 1.0)
    assert "local_words" in done.stdout

"""Whether popc is right on a CUDA device, before ``benchmarks/cuda.sh`` times it there.

The Triton kernels on all their cases; a small llama against the oracle of ``popc.testing``; and its
decode steps as CUDA graphs against the same without. Exits with 1 if something fails. With
``--device cpu`` all but the kernels is tried, on popc's other kernels.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

import popc
from popc.bench.decode import random_prompt
from popc.bench.rates import Context
from popc.testing import assert_equivalent

POLICIES = ("contraction", "pop")
PROMPT, TOKENS = 24, 12


def small_llama(device: str) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=1024,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval().to(device)


def kernels() -> str:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.triton_cases"], capture_output=True, text=True, check=True
    )
    wrong = {case: fault for case, fault in json.loads(ran.stdout).items() if fault}
    assert not wrong, wrong
    return f"{len(json.loads(ran.stdout))} cases"


def oracle(policy: str, device: str) -> str:
    model = small_llama(device)
    ids = random_prompt(model, 2, PROMPT, device)
    seen = assert_equivalent(model, ids, policy=policy, sparsity=0.4, dtype=torch.float32)
    assert seen.masked and seen.decided, seen
    return f"{seen.masked} values masked, error {seen.error:.1e}"


def recorded(policy: str, device: str) -> str:
    """The tokens must be the same, and no graph of a decode step go unrecorded."""
    tokens = []
    for options in ({}, torch._inductor.list_mode_options("reduce-overhead")):
        torch.compiler.reset()
        counters.clear()
        model = small_llama(device)
        twin = popc.compile(model, policy=policy, sparsity=0.4, inductor=options)
        prompt = random_prompt(model, 1, PROMPT, device)
        context = Context(model.config, prompt, TOKENS, twin.forward, allocate=model.forward)
        for _ in range(3):  # recorded in the second, replayed from then on
            found = context.decode(twin.forward, TOKENS)[1]
        tokens.append(found.tolist())
    skipped = counters["inductor"]["cudagraph_skips"]
    assert device == "cpu" or not skipped, f"{skipped} graphs were not recorded"
    assert tokens[0] == tokens[1], tokens
    return f"{TOKENS} tokens"


def checks(device: str) -> Iterator[tuple[str, Callable[[], str]]]:
    if device == "cuda":
        yield "kernels", kernels
    for policy in POLICIES:
        yield f"oracle, {policy}", lambda policy=policy: oracle(policy, device)
        yield f"CUDA graphs, {policy}", lambda policy=policy: recorded(policy, device)


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    failed = 0
    for name, check in checks(parser.parse_args().device):
        try:
            print(f"{name}: {check()}", flush=True)
        except Exception as error:
            failed += 1
            print(f"{name}: FAILED: {type(error).__name__}: {error}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

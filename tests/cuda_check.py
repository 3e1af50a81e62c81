"""``python -m tests.cuda_check``: whether popc is right on a CUDA device.

``benchmarks/cuda.sh`` begins with it: the Triton kernels on all their cases, those on quantised
weights too; a small llama against the oracle of ``popc.testing``; and its decode steps as CUDA
graphs against the same without. Exits with 1 if something fails. With ``--device cpu`` all but the
kernels is tried, on popc's other kernels.
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

import popc
from popc.bench.decode import random_prompt
from popc.bench.rates import Context
from popc.testing import assert_equivalent
from tests.helpers.models import tiny_llama

WAYS: dict[str, dict[str, Any]] = {
    "threshold": {"policy": "threshold", "sparsity": 0.4},
    "pop": {"policy": "pop", "sparsity": 0.4},
    "graded, int8": {"weights": "int8", "bits": 4.5},
}
PROMPT, TOKENS = 24, 12


def small_llama(device: str) -> Any:
    return tiny_llama(hidden_size=256, intermediate_size=704, vocab_size=1024).to(device)


def kernels(cases: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-m", f"tests.helpers.{cases}"],
        capture_output=True,
        text=True,
        check=True,
    )
    faults = json.loads(ran.stdout)
    wrong = {case: fault for case, fault in faults.items() if fault}
    assert not wrong, wrong
    return f"{len(faults)} cases"


def oracle(way: str, device: str) -> str:
    model = small_llama(device)
    ids = random_prompt(model, 2, PROMPT, device)
    seen = assert_equivalent(model, ids, **WAYS[way], dtype=torch.float32)
    assert seen.masked and seen.decided, seen
    return f"{seen.masked} values masked, error {seen.error:.1e}"


def recorded(way: str, device: str) -> str:
    """The tokens must be the same, and no graph of a decode step go unrecorded."""
    tokens = []
    for options in ({}, torch._inductor.list_mode_options("reduce-overhead")):
        torch.compiler.reset()
        counters.clear()
        model = small_llama(device)
        compiled = popc.compile(model, **WAYS[way], inductor=options)
        prompt = random_prompt(model, 1, PROMPT, device)
        context = Context(model.config, prompt, TOKENS, compiled.forward, allocate=model.forward)
        for _ in range(3):  # recorded in the second, replayed from then on
            decoded = context.decode(compiled.forward, TOKENS)[1]
        tokens.append(decoded.tolist())
    skipped = counters["inductor"]["cudagraph_skips"]
    assert device == "cpu" or not skipped, f"{skipped} graphs were not recorded"
    assert tokens[0] == tokens[1], tokens
    return f"{TOKENS} tokens"


def checks(device: str) -> Iterator[tuple[str, Callable[[], str]]]:
    if device == "cuda":
        yield "kernels", lambda: kernels("triton_cases")
        yield "kernels on quantised weights", lambda: kernels("triton_plane_cases")
    for way in WAYS:
        yield f"oracle, {way}", lambda way=way: oracle(way, device)
        yield f"CUDA graphs, {way}", lambda way=way: recorded(way, device)


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

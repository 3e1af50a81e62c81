"""``make soak``: 20,000 tokens over changing prompts; tokens, memory and speed must not drift."""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import sys
import time

import torch
from rich.progress import track

import popc
from tests.helpers.models import tiny_llama

EACH = 64  # tokens of a generation
REPEATED = 10  # prompts that come again and again
GROWTH = 16 << 20  # bytes that may be added once all is compiled
SLOWER = 1.25  # the last quarter's time over the first's


def resident() -> int:
    """Bytes of memory in use."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--policy", default="threshold")
    options = parser.parse_args()
    torch.set_num_threads(1)
    compiled = popc.compile(tiny_llama(), policy=options.policy, sparsity=0.5)
    made = torch.Generator().manual_seed(0)
    known: dict[int, torch.Tensor] = {}
    faults: list[str] = []
    seconds: list[float] = []
    base = 0
    generations = -(-options.tokens // EACH)
    for number in track(range(generations), "generating"):
        seed = number % REPEATED if number % 2 else number + REPEATED
        made.manual_seed(seed)
        length = int(torch.randint(4, 24, (), generator=made))
        ids = torch.randint(1, 96, (1, length), generator=made)
        begun = time.perf_counter()
        out = compiled.generate(ids, max_new_tokens=EACH, do_sample=False)
        seconds.append(time.perf_counter() - begun)
        if not torch.equal(known.setdefault(seed, out), out):
            faults.append(f"generation {number}: other tokens than those of the same prompt before")
        if number == generations // 4:
            gc.collect()
            base = resident()
    gc.collect()
    growth = resident() - base
    quarter = generations // 4
    first = statistics.median(seconds[quarter : 2 * quarter])
    last = statistics.median(seconds[-quarter:])
    if growth > GROWTH:
        faults.append(f"memory grew by {growth / 1e6:.1f} MB over the last three quarters")
    if last > SLOWER * first:
        faults.append(f"the last quarter took {last / first:.2f} times the second's time")
    print(
        f"{generations * EACH} tokens, {EACH / last:.0f} a second at last ({first / last:.2f} of "
        f"before), memory {growth / 1e6:+.1f} MB"
    )
    print("\n".join(faults) or "no drift")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

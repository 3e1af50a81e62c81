"""Time the linears of a decode step on a GPU: bfloat16, quantised, and quantised read by grade.

``python benchmarks/cuda_planes.py --out FILE`` takes the shapes of TinyLlama-1.1B and Llama-3-8B,
random weights, the linears of as many layers as exceed every cache, one token or more at a time,
recorded as a CUDA graph. Rounds are interleaved; given are the median, the lowest and the highest.
``--device cpu`` tries the script, not a GPU.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from popc import ops
from popc.bench.machine import copy_bandwidth, machine
from popc.bench.models import SHAPES
from popc.bench.rates import Spread, interleaved

LEAST = 1 << 30  # bytes of all weights in bfloat16
REPEATS = 20  # of the graph, in one round of one way
BITS = {2: 8.5, 1: 4.5}  # read for each weight, scales included, by planes
# Shares of channels of which both planes are read, and of which one is, and the name of each.
GRADES = {
    "graded, all of both planes": (1.0, 0.0),
    "graded, the high plane of all": (0.0, 1.0),
    "graded, mixed": (0.3, 0.45),
}
Step = Callable[[], list[Tensor]]


def linear_sizes(shape: str) -> list[tuple[int, int]]:
    """Outputs and inputs of each linear of a decoder layer."""
    config = SHAPES[shape]
    hidden, ffn = config.hidden_size, config.intermediate_size
    kv = hidden // config.num_attention_heads * config.num_key_value_heads
    attention = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    return [*attention, (ffn, hidden), (ffn, hidden), (hidden, ffn)]


def steps_of(
    sizes: list[tuple[int, int]], batch: int, device: str
) -> dict[str, tuple[Step, float]]:
    """Each way to multiply by all these weights, and the bits for each weight that it reads."""
    dtype = torch.bfloat16
    weights = [torch.randn(size, device=device, dtype=dtype) * 0.02 for size in sizes]
    inputs = {k: torch.randn(batch, 1, k, device=device, dtype=dtype) for _, k in sizes}
    steps: dict[str, tuple[Step, float]] = {}
    steps["dense, bfloat16"] = lambda: [linear(inputs[w.shape[1]], w) for w in weights], 16.0
    for planes, bits in BITS.items():
        for row_dim, rows in ((1, "input"), (0, "output")):
            packed = [ops.quantize(w, row_dim, planes) for w in weights]
            step = quantized_step(packed, sizes, inputs, row_dim, planes)
            steps[f"quantised, {bits} bits, rows by {rows}"] = step, bits
            if (planes, row_dim) == (2, 1):
                both = packed
    for name, (two, one) in GRADES.items():
        step = graded_step(both, sizes, inputs, two, one)
        steps[name] = step, two * BITS[2] + one * BITS[1]
    return steps


def quantized_step(
    packed: list[Tensor],
    sizes: list[tuple[int, int]],
    inputs: dict[int, Tensor],
    row_dim: int,
    planes: int,
) -> Step:
    """All planes of all rows."""
    x = inputs[sizes[0][1]]
    op = ops.select_kernel(ops.quantized_linear, x, packed[0])
    pairs = list(zip(packed, sizes, strict=True))
    return lambda: [
        op(inputs[k], rows, None, None, None, n, row_dim, planes) for rows, (n, k) in pairs
    ]


def graded_step(
    packed: list[Tensor],
    sizes: list[tuple[int, int]],
    inputs: dict[int, Tensor],
    two: float,
    one: float,
) -> Step:
    """Of so large a share of channels both planes, or the high one: at random, for all tokens."""
    x = inputs[sizes[0][1]]
    op = ops.select_kernel(ops.graded_linears, x, packed[0])
    alone = op is not ops.graded_linears
    limit = torch.zeros(1, device=x.device)
    norms = {}
    for k in inputs:
        place = torch.rand(k, device=x.device)
        # Scores above the threshold of 0 are read, and norms of 0 make none.
        norms[k] = (place < two + one).float(), (place < two).float()

    def call(rows: Tensor, n: int, k: int) -> Tensor:
        if alone:
            return op(inputs[k], rows, None, None, n, 2, None, *norms[k], limit)
        return op(inputs[k], [rows], [None], [None], [n], [2], [None], *norms[k], limit)

    return lambda: [call(rows, n, k) for rows, (n, k) in zip(packed, sizes, strict=True)]


def ready(step: Step, device: str) -> Callable[[], float]:
    """Seconds of a step; on a GPU it has been compiled, tuned and recorded."""
    if device == "cpu":
        return lambda: seconds(step, 1, lambda: None)
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    return lambda: seconds(graph.replay, REPEATS, torch.cuda.synchronize)


def seconds(step: Callable[[], object], times: int, wait: Callable[[], object]) -> float:
    """Of one step, on average."""
    wait()
    start = time.perf_counter()
    for _ in range(times):
        step()
    wait()
    return (time.perf_counter() - start) / times


def measure(
    shape: str, batch: int, device: str, layers: int, rounds: int
) -> list[dict[str, object]]:
    """The figures of each way for this shape and number of tokens."""
    layer = linear_sizes(shape)
    each = sum(n * k for n, k in layer)
    layers = layers or -(-LEAST // (2 * each))
    steps = steps_of(layer * layers, batch, device)
    turns = {name: ready(step, device) for name, (step, _) in steps.items()}
    taken = interleaved(turns, rounds, lambda name: None)
    dense = Spread.of(taken["dense, bfloat16"]).median
    results = []
    for name, times in taken.items():
        spread, bits = Spread.of(times), steps[name][1]
        rate = bits / 8 * each * layers / spread.median / 1e9
        print(
            f"{shape}, {batch} tokens, {name}: {spread.median / layers * 1e6:.1f} us a layer, "
            f"{rate:.0f} GB/s, {dense / spread.median:.2f} x dense",
            flush=True,
        )
        results.append(
            {
                "shape": shape,
                "batch": batch,
                "layers": layers,
                "way": name,
                "bits": bits,
                "seconds": asdict(spread),
                "read_gb_per_second": rate,
            }
        )
    return results


@torch.no_grad()
def main() -> None:
    """Take the figures, print them, and write them to the file given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", nargs="+", default=["tinyllama-shape", "llama3-8b-shape"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--layers", type=int, default=0, help="0: as many as exceed every cache")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.manual_seed(0)
    figures: list[dict[str, object]] = []
    for shape in args.shape:
        for batch in args.batch:
            figures += measure(shape, batch, args.device, args.layers, args.rounds)
    if args.out is not None:
        where = asdict(machine(args.device)), asdict(copy_bandwidth(args.device))
        made = {"machine": where[0], "copy_bandwidth": where[1], "figures": figures}
        args.out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

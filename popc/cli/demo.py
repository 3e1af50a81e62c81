"""``popc demo``: a real model, dense and compiled, side by side."""

from __future__ import annotations

import copy
from typing import Annotated, Any

import torch
import typer

import popc
from popc.cli.common import DEMO_PROMPT, console, errors, load, progress, prompt_of
from popc.models import DEFAULT

SPARSITY = 0.2
BITS = (8.5, 4.5)  # all that int8 has with its scales, and about half of it


def demo(
    tokens: Annotated[int, typer.Option(min=3, help="Tokens to decode.")] = 48,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of each model.")] = 3,
) -> None:
    """Compile a real model, generate text with it, and time it against the dense one."""
    from popc.bench import decode_rates
    from popc.bench.decode import at_bits
    from popc.bench.show import decoded_table
    from popc.tools.evaluate import count_bits

    with errors():
        model, tokenizer = load(DEFAULT, "float32")
        # popc changes strides of `model`'s weights: dense has a copy, as they were.
        dense = copy.deepcopy(model)
        pruned = popc.compile(model, sparsity=SPARSITY)
        # One compiled model: budgets are inputs of its calls.
        quantised: Any = popc.compile(model, weights="int8", bits=min(BITS))
        ways: dict[str, tuple[Any, float | None]] = {
            f"popc, r = {SPARSITY}": (pruned, None),
            **{f"popc, int8, {bits} bits": (quantised, bits) for bits in BITS},
        }
        models: dict[str, Any] = {
            "dense, eager": dense,
            "dense, torch.compile": torch.compile(dense.forward),
            **{name: at_bits(compiled, bits) for name, (compiled, bits) in ways.items()},
        }
        ids = prompt_of(tokenizer, DEMO_PROMPT)["input_ids"]
        with progress("compiling", len(models) * (rounds + 1)) as step:
            results = decode_rates(models, model.config, ids, tokens, rounds, step)
        console.print(f"\n[bold]{DEMO_PROMPT}[/]")
        for name, result in results.items():
            text = tokenizer.decode(result.tokens[0], skip_special_tokens=True)
            console.print(f"\n[cyan]{name}[/]: {text}", highlight=False)
        with console.status("counting what was read"):
            read = {
                name: count_bits(compiled, ids[0], results[name].tokens[0], bits)
                for name, (compiled, bits) in ways.items()
            }
        title = f"SmolLM2-135M, float32, batch 1, prompt {ids.shape[1]}, decode"
        console.print(decoded_table(title, results, read, 8 * model.dtype.itemsize, dense=2))
        console.print(
            "Bits are those read of each weight of the layers, scales included, as counted while "
            "the answer was decoded; speed-up is over the faster of the two dense runs."
        )

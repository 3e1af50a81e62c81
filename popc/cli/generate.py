"""``popc generate``: an answer."""

from __future__ import annotations

from typing import Annotated

import typer

from popc.cli import options
from popc.cli.common import DEMO_PROMPT, compiled_by, console, errors, load, prompt_of
from popc.models import DEFAULT


def generate(
    model: options.Model = DEFAULT,
    prompt: Annotated[str, typer.Option(help="What to say to the model.")] = DEMO_PROMPT,
    policy: options.Policy = None,
    sparsity: options.Sparsity = 0.2,
    candidate: options.Candidate = 0.1,
    weights: options.Weights = None,
    bits: options.Bits = None,
    targets: options.Targets = None,
    calibration: options.Calibration = 16,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens, at most.")] = 64,
    dtype: options.Dtype = "float32",
) -> None:
    """Answer PROMPT with MODEL, pruned."""
    with errors():
        chosen = {"sparsity": sparsity, "candidate": candidate, "weights": weights, "bits": bits}
        config = options.config_of(policy, targets, **chosen)
        loaded, tokenizer = load(model, dtype)
        compiled = compiled_by(config, loaded, tokenizer, calibration)
        with console.status("compiling and generating"):
            inputs = prompt_of(tokenizer, prompt)
            out = compiled.generate(**inputs, max_new_tokens=tokens, do_sample=False)
            answer = out[0, inputs["input_ids"].shape[1] :]
        text = tokenizer.decode(answer, skip_special_tokens=True)
        console.print(text, markup=False, highlight=False)

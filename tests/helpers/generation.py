"""Generations as the tests run them, token after token."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import DynamicCache

import popc
from tests.helpers.models import CACHE
from tests.helpers.oracle import MaskedDense, llama_downs

POLICIES = ("threshold", "pop")
TOLERANCE = 1e-4


def prompt(seed: int = 3, length: int = 9, batch: int = 1) -> Tensor:
    make = torch.Generator().manual_seed(seed)
    return torch.randint(1, 96, (batch, length), generator=make)


def compiled_of(model: nn.Module, policy: str = "threshold", **options: object):
    arguments = {"policy": policy, "sparsity": 0.5, "codegen": "eager", **options}
    return popc.compile(model, **arguments)


@torch.no_grad()
def step(call, cache: DynamicCache, ids: Tensor) -> Tensor:
    return call(ids, **{CACHE: cache}, use_cache=True).logits[:, -1].clone()


def generated(call, ids: Tensor, tokens: int = 4, cache: DynamicCache | None = None) -> Tensor:
    """Logits of a greedy generation, ``[B, tokens + 1, V]``."""
    cache = DynamicCache() if cache is None else cache
    out = [step(call, cache, ids)]
    for _ in range(tokens):
        out.append(step(call, cache, out[-1].argmax(-1, keepdim=True)))
    return torch.stack(out, 1)


def run(model, ids: Tensor, prompt: int, mask: Tensor | None = None, cache=None, **first) -> Tensor:
    """Teacher-forced logits of every decode step, ``[steps, B, V]``."""
    cache = DynamicCache() if cache is None else cache
    kwargs = {CACHE: cache, "use_cache": True}
    masked = {} if mask is None else {"attention_mask": mask[:, :prompt]}
    with torch.no_grad():
        model(ids[:, :prompt], **masked, **first, **kwargs)
        rows = []
        for at in range(prompt, ids.shape[1]):
            masked = {} if mask is None else {"attention_mask": mask[:, : at + 1]}
            out = model(ids[:, at : at + 1], **masked, **kwargs)
            rows.append(out.logits[:, -1].clone())
    return torch.stack(rows)


def oracle_run(
    model, config: popc.Config, ids: Tensor, prompt: int, mask=None, downs=llama_downs
) -> Tensor:
    oracle = MaskedDense(model, downs(model), config.sparsity, config.candidate, config.scope)
    valid = {} if mask is None else {"valid": mask[:, :prompt].bool()}
    try:
        return run(oracle, ids, prompt, mask, **valid)
    finally:
        oracle.remove()


def tokens(batch: int = 1, length: int = 16) -> Tensor:
    return torch.randint(1, 96, (batch, length), generator=torch.Generator().manual_seed(7))

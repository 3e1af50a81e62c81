"""Train a small GPT-2 on the Wikipedia text, to confirm figures on a model built differently.

``python benchmarks/second_model.py FOLDER``, then ``popc eval FOLDER``. LayerNorm, plain
GELU MLPs, biases, learned positions and tied embeddings, where SmolLM2 has none of these but the
last. The first articles are left out of the training: ``popc eval`` reads its windows there.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from rich.progress import track
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

from popc.tools.text import wikipedia_articles

HELD_OUT = 40  # articles, of which popc eval takes the first
LENGTH = 256  # tokens


def tokenizer_of(texts: list[str], folder: Path) -> GPT2TokenizerFast:
    """A tokenizer trained on ``texts``, also written to ``folder``."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=2048, special_tokens=["<|endoftext|>"])
    folder.mkdir(parents=True, exist_ok=True)
    trained.save_model(str(folder))
    made = GPT2TokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))
    made.save_pretrained(folder)
    return made


def train(model: GPT2LMHeadModel, ids: Tensor, minutes: float, batch: int = 4) -> float:
    """Cosine decay over the time given; the mean loss of the last tenth, in nats a token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0, betas=(0.9, 0.95), weight_decay=0.1)
    start, losses = time.monotonic(), []
    for _ in track(iter(lambda: time.monotonic() < start + 60 * minutes, False), "training"):
        done = (time.monotonic() - start) / (60 * minutes)
        rate = 1.5e-3 * min(1, done * 20) * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(ids) - LENGTH, (batch,))
        rows = torch.stack([ids[at : at + LENGTH] for at in starts])
        loss = model(rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


def main() -> None:
    """Train the model, and write it to the folder given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=20)
    given = parser.parse_args()
    torch.manual_seed(0)
    texts = wikipedia_articles()[HELD_OUT:]
    tokenizer = tokenizer_of(texts, given.folder)
    ids = torch.cat([tokenizer(text, return_tensors="pt").input_ids[0] for text in texts])
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=512,
        n_embd=256,
        n_layer=6,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).train()
    loss = train(model, ids, given.minutes)
    model.eval().save_pretrained(given.folder)
    print(f"{len(ids)} tokens of text, loss {loss:.3f} nats, perplexity {math.exp(loss):.1f}")


if __name__ == "__main__":
    main()

"""Which tokens are padding, read off the attention mask."""

from __future__ import annotations

import torch

from popc.analysis.tokens import valid_tokens


def causal(valid: torch.Tensor) -> torch.Tensor:
    """``[B, 1, T, T]`` bool: causal, keys and queries of padding tokens hidden."""
    size = valid.shape[1]
    seen = torch.ones(size, size).tril().bool()
    return (seen & valid[:, None, :] & valid[:, :, None])[:, None]


VALID = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]]).bool()


def test_left_and_right_padding() -> None:
    assert torch.equal(valid_tokens(causal(VALID)), VALID)


def test_additive_mask() -> None:
    mask = torch.zeros(3, 1, 4, 4).masked_fill(~causal(VALID), torch.finfo(torch.float32).min)
    assert torch.equal(valid_tokens(mask), VALID)


def test_chunk_with_a_past() -> None:
    """Queries are the last two tokens: left padding shows in their rows."""
    mask = causal(VALID)[:, :, 2:]
    assert torch.equal(valid_tokens(mask)[:2], VALID[:2, 2:])

"""Which tokens are padding, read off the attention mask."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from popc.analysis.capture import capture_module
from popc.analysis.regions import find_regions
from popc.analysis.tokens import mask_of, valid_tokens


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


class Written(nn.Module):
    """Softmax attention written out, whose scores are hidden in one of the usual ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.qkv, self.o = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores, least = q @ k.mT, torch.finfo(x.dtype).min
        if self.how == "masked_fill":
            scores = scores.masked_fill(~seen, least)
        elif self.how == "where":
            scores = torch.where(seen, scores, least)
        elif self.how == "where not":
            scores = torch.where(~seen, torch.tensor(least), scores)
        else:
            scores = scores + (~seen).to(x.dtype) * least
        x = x + self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("how", ["masked_fill", "where", "where not", "added"])
def test_padding_is_seen_in_any_form(how: str) -> None:
    torch.manual_seed(0)
    x, seen = torch.randn(3, 4, 8), causal(VALID)
    captured = capture_module(Written(how), (x, seen))
    (region,) = [r for r in find_regions(captured).regions if r.kind == "mlp"]
    mask = mask_of(region.hidden, captured.gm.graph)
    assert mask is not None
    node = mask.node.name

    class Shows(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node):
            value = super().run_node(n)
            if n.name == node:
                shown.append(value)
            return value

    shown: list[torch.Tensor] = []
    module = Written(how)
    Shows(captured.gm).run(*module.parameters(), x, seen)
    assert torch.equal(valid_tokens(shown[0], mask.hides), VALID)

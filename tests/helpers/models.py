"""Small models for the tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from popc.compat import cache_keyword

# What this transformers calls a KV cache among the arguments, and in the outputs.
CACHE = cache_keyword(LlamaForCausalLM.forward)


def tiny_llama(seed: int = 0, **fields: object) -> LlamaForCausalLM:
    """Two layers, 160 channels, weights large enough that pruning shows in the logits."""
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "eos_token_id": None,
        "pad_token_id": 0,
        "vocab_size": 96,
    }
    config = LlamaConfig(**{**sizes, **fields})
    return LlamaForCausalLM(config).eval()


class Gated(nn.Module):
    """``down(act(gate x) * up x)``."""

    def __init__(self, act=F.silu, bias: bool = False, d: int = 16, f: int = 40) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(d, f, bias), nn.Linear(d, f, bias)
        self.c = nn.Linear(f, d, bias)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.act(self.a(x)) * self.b(x))


class Plain(nn.Module):
    """``down(act(up x))``."""

    def __init__(self, act=F.gelu, bias: bool = True, d: int = 16, f: int = 40) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(d, f, bias), nn.Linear(f, d, bias)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.act(self.a(x)))


class AddmmMLP(nn.Module):
    """GPT-2's Conv1D: weights ``[in, out]``, tokens and batch merged into one axis."""

    def __init__(self, d: int = 16, f: int = 40) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(d, f)), nn.Parameter(torch.randn(f))
        self.w2, self.b2 = nn.Parameter(torch.randn(f, d)), nn.Parameter(torch.randn(d))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.addmm(self.b1, x.reshape(-1, x.shape[-1]), self.w1)
        h = F.gelu(h.view(*x.shape[:-1], -1), approximate="tanh")
        y = torch.addmm(self.b2, h.view(-1, h.shape[-1]), self.w2)
        return y.view(*x.shape[:-1], -1)

    def masked(self, x: Tensor, keep: Tensor) -> Tensor:
        """The same with channels where ``keep`` is 0 left out."""
        h = F.gelu(x @ self.w1 + self.b1, approximate="tanh")
        return (h * keep) @ self.w2 + self.b2


class Interleaved(nn.Module):
    """Gate and up of one linear, channel by channel in turn."""

    def __init__(self, d: int = 16, f: int = 40) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(d, 2 * f), nn.Linear(f, d)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.c(h[..., 1::2] * torch.sigmoid(h[..., ::2]))


class Parallel(nn.Module):
    """Two MLPs of 24 and 40 channels and 8 that are normed, in one linear and out of one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(16, 24 + 8 + 2 * 40), nn.Linear(24 + 8 + 40, 16)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor, keep: tuple[int, int] = (24, 40)) -> Tensor:
        first, normed, gate, up = self.a(x).split((24, 8, 40, 40), -1)
        first, second = F.relu(first), F.silu(gate) * up
        first = first * (torch.arange(24) < keep[0])
        second = second * (torch.arange(40) < keep[1])
        return self.c(torch.cat([first, self.norm(normed), second], -1))


class CachedAttention(nn.Module):
    """Four heads of four channels from one fused linear; keys and values leave, for a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.a(x).unflatten(-1, (4, 3, 4)).transpose(1, 2).unbind(-2)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.c(h if keep is None else h * keep), k, v


class Scaled(Plain):
    """A channelwise scale between the linears."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(40))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.act(self.a(x)) * self.scale)


class InnerNorm(Plain):
    """A norm over the channels mixes them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(40)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.norm(self.act(self.a(x))))


class Leaks(Plain):
    """The hidden value is an output too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.act(self.a(x))
        return self.c(h), h


class TwoValues(Plain):
    """Two different values of one axis are contracted."""

    def __init__(self) -> None:
        super().__init__()
        self.d = nn.Linear(40, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.c(torch.sigmoid(h)) + self.d(torch.tanh(h))


class Softmaxed(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x).softmax(-1))


class Square(nn.Module):
    """A channel's position meets another axis of the same size: it must not be taken for it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(16, 40), nn.Linear(40, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x) @ torch.ones(40, 40))

"""What popc sees in a module it has never met: regions, and why the rest is left alone."""

import torch
from torch import Tensor, nn

import popc


class Block(nn.Module):
    """A gated MLP beside one whose inner norm mixes its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.gate, self.narrow = nn.Linear(32, 96), nn.Linear(32, 96), nn.Linear(96, 32)
        self.mixed = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.Linear(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        gated = self.narrow(self.wide(x) * torch.sigmoid(self.gate(x)))
        return x + gated + self.mixed(x)


plan = popc.analyze(Block(), (torch.randn(1, 5, 32),))
print(plan)

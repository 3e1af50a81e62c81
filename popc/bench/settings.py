"""What to measure."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from popc import compat
from popc.config import Config
from popc.errors import ConfigError
from popc.models import DEFAULT

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Settings:
    """The fields of a benchmark; those that one of them has no use for are ignored.

    Args:
        model: a name of :data:`popc.bench.models.SHAPES`, or what :func:`popc.models.load_model`
            takes.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: of the weights.
        batch: numbers of sequences.
        context: tokens in the cache before the first decoded one.
        prefill: at most so many of them are prefilled; the rest of the cache holds random values,
            which take as long to read. 0: all.
        sparsity, candidate, policies, targets: as in :class:`popc.Config`; popc runs at every
            sparsity under every policy.
        weights, bits: likewise, of quantised weights, under their usual policy; at each of ``bits``
            one compiled model runs. None and empty: none are quantised.
        tokens: steps in one round of one model.
        rounds: how often each model has its turn.
        layers: fewer layers than the model has; None: all.
        guards: as in :class:`popc.Config`.
        codegen: likewise, and for the dense model too.

    Raises:
        ConfigError: a value can't be used.
    """

    model: str = DEFAULT
    device: str = "cpu"
    dtype: str = "float32"
    batch: tuple[int, ...] = (1, 4, 8)
    context: tuple[int, ...] = (128, 1024, 4096)
    prefill: int = 512
    sparsity: tuple[float, ...] = (0.0, 0.2, 0.4, 0.5)
    candidate: float = 0.1
    policies: tuple[str, ...] = ("threshold", "pop")
    targets: tuple[str, ...] | None = None
    tokens: int = 32
    rounds: int = 5
    weights: str | None = None
    bits: tuple[float, ...] = ()
    layers: int | None = None
    guards: str = "token"
    codegen: str = "inductor"

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise ConfigError("device", self.device, f"one of {', '.join(DEVICES)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device", self.device, "this machine has no CUDA device")
        if self.dtype not in DTYPES:
            raise ConfigError("dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        for name in ("batch", "context", "sparsity", "policies"):
            if not getattr(self, name):
                raise ConfigError(name, getattr(self, name), "at least one value")
        for name, least in (("batch", 1), ("context", 2), ("tokens", 1), ("rounds", 1)):
            value = getattr(self, name)
            if min(value if isinstance(value, tuple) else (value,)) < least:
                raise ConfigError(name, value, f"at least {least}")
        if self.weights is None and self.bits:
            raise ConfigError("bits", self.bits, "none without weights")
        if self.weights is not None and not self.bits:
            raise ConfigError("bits", self.bits, "at least one value where weights are quantised")
        list(self.configs())  # which checks the rest
        list(self.quantized_configs())

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """What :meth:`to_json` wrote."""
        values: Any = json.loads(text).items()
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in values}
        return cls(**values)

    def to_json(self) -> str:
        """All fields as one JSON object, to hand to another process."""
        return json.dumps(asdict(self))

    def configs(self) -> Iterator[Config]:
        """popc's options for weights as they are: every policy at every sparsity.

        On CUDA its decode steps are recorded and replayed, as by ``mode="reduce-overhead"``.
        """
        for policy in self.policies:
            for sparsity in self.sparsity:
                yield self._config(sparsity=sparsity, policy=policy)

    def quantized_configs(self) -> Iterator[Config]:
        """popc's options for quantised weights: at all ``bits``."""
        for bits in self.bits:
            yield self._config(weights=self.weights, bits=bits)

    def _config(self, **options: Any) -> Config:
        return Config(
            candidate=self.candidate,
            targets=self.targets,
            guards=self.guards,
            codegen=self.codegen,
            inductor=compat.mode_options("reduce-overhead" if self.cuda else None),
            **options,
        )

    @property
    def cuda(self) -> bool:
        """Whether the models are on a GPU."""
        return self.device == "cuda"

    def compiled(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A dense model's ``forward`` under ``torch.compile``."""
        if self.codegen != "inductor":
            return torch.compile(forward, backend=self.codegen)
        return torch.compile(forward, mode="reduce-overhead" if self.cuda else None)

    @property
    def most_pruned(self) -> Config:
        """Of the first policy, at the highest sparsity."""
        ours = [config for config in self.configs() if config.policy_name == self.policies[0]]
        return max(ours, key=lambda config: config.sparsity)

"""The models of the benchmarks: real ones, and shapes of known models with random weights.

A shape is allocated on its device in its dtype and filled from one short row of random numbers, so
1.1 billion parameters take seconds on two cores.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

from popc.bench.settings import DTYPES, Settings
from popc.errors import ConfigError
from popc.models import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONTEXT = 8192  # tokens that every shape has positions for
# A prime number of values, so that rows and matrices of the usual sizes differ from each other.
PATTERN = 1_000_003


def _shape(kind: Any, **fields: Any) -> PreTrainedConfig:
    config: PreTrainedConfig = kind(**fields, max_position_embeddings=CONTEXT)
    return config


SHAPES: Mapping[str, PreTrainedConfig] = {
    "tinyllama-shape": _shape(
        LlamaConfig,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
    ),
    "llama3-8b-shape": _shape(
        LlamaConfig,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
    # As Qwen3-30B-A3B: 30.5 billion parameters, of which a token uses 3.3 billion.
    "qwen3-moe-shape": _shape(
        Qwen3MoeConfig,
        hidden_size=2048,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        vocab_size=151936,
    ),
}


def default_dtype(model: str) -> str:
    """bfloat16 for shapes; float32 for what is loaded."""
    return "bfloat16" if model in SHAPES else "float32"


def build(settings: Settings) -> PreTrainedModel:
    """The model in eval mode, on its device; each call gives a new one.

    Raises:
        ModelError: it can't be loaded.
        ConfigError: it has fewer layers than ``settings.layers``.
    """
    dtype, device = DTYPES[settings.dtype], torch.device(settings.device)
    if settings.model in SHAPES:
        return random_model(SHAPES[settings.model], dtype, device, settings.layers)
    loaded, _ = load_model(settings.model, dtype)
    model: PreTrainedModel = _cut(loaded, settings.layers).to(device)
    return model


def random_model(
    config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, layers: int | None = None
) -> PreTrainedModel:
    """A causal language model of the shape in ``config``, with small random weights."""
    # Model classes import all that transformers knows of: not when `popc` starts.
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(config)
    if layers is not None:
        _check_layers(layers, config.num_hidden_layers)
        config.num_hidden_layers = layers
        _cut_types(config)
    with no_init_weights(), torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    fill(model)
    return model.eval()


@torch.no_grad()
def fill(module: nn.Module, scale: float = 0.02) -> None:
    """Give all weights small random values, and all vectors (norms have nothing else) ones."""
    pattern: torch.Tensor | None = None
    for parameter in module.parameters():
        if parameter.dim() < 2:
            parameter.fill_(1)
            continue
        if pattern is None or pattern.dtype != parameter.dtype:
            generator = torch.Generator().manual_seed(0)
            pattern = torch.randn(PATTERN, generator=generator).mul_(scale)
            pattern = pattern.to(parameter.device, parameter.dtype)
        flat = parameter.view(-1)
        whole = flat.numel() // PATTERN * PATTERN
        flat[:whole].view(-1, PATTERN).copy_(pattern)
        flat[whole:].copy_(pattern[: flat.numel() - whole])


def _cut(model: Any, layers: int | None) -> Any:
    """The model with its first ``layers`` layers alone."""
    if layers is None:
        return model
    config = model.config
    _check_layers(layers, config.num_hidden_layers)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == config.num_hidden_layers:
                setattr(module, name, child[:layers])
    config.num_hidden_layers = layers
    _cut_types(config)
    return model


def _check_layers(layers: int, most: int) -> None:
    if not 1 <= layers <= most:
        raise ConfigError("layers", layers, f"the model has {most}")


def _cut_types(config: PreTrainedConfig) -> None:
    """A list that says what each layer is must be as long as there are layers."""
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]

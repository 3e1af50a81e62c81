"""First calls of the zoo's models: prompts, pictures, sounds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

InputGroup = Callable[[nn.Module], dict[str, Tensor]]

IMAGE = 95  # the token that stands for a patch of the picture
PROMPT = 8


def tokens(seed: int = 0, length: int = PROMPT, images: int = 0) -> Tensor:
    """One prompt, after ``images`` tokens that stand for patches."""
    text = torch.randint(3, 90, (1, length), generator=torch.Generator().manual_seed(seed))
    return torch.cat([torch.full((1, images), IMAGE), text], 1)


def noise(*shape: int) -> Tensor:
    """Values in place of pixels or sound."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def text(_: nn.Module) -> dict[str, Tensor]:
    return {"input_ids": tokens()}


def pair(_: nn.Module) -> dict[str, Tensor]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(1, 4)}


def sound(_: nn.Module) -> dict[str, Tensor]:
    """Whisper's: eight mel bins."""
    return {"input_features": noise(1, 8, 128), "decoder_input_ids": tokens(1, 4)}


def wave(_: nn.Module) -> dict[str, Tensor]:
    return {"input_values": noise(1, 200)}


def picture(_: nn.Module) -> dict[str, Tensor]:
    return {"pixel_values": noise(1, 3, 16, 16)}


def seen(images: int) -> InputGroup:
    """A picture of 16 by 16 that becomes ``images`` tokens, and a prompt."""

    def inputs(_: nn.Module) -> dict[str, Tensor]:
        return {"input_ids": tokens(images=images), "pixel_values": noise(1, 3, 16, 16)}

    return inputs


def tiles(images: int) -> InputGroup:
    """The same with an axis for several pictures."""

    def inputs(_: nn.Module) -> dict[str, Tensor]:
        return {"input_ids": tokens(images=images), "pixel_values": noise(1, 1, 3, 16, 16)}

    return inputs


def crossed(_: nn.Module) -> dict[str, Tensor]:
    """Mllama's: one picture of one tile, which every token sees."""
    return {
        "input_ids": tokens(),
        "pixel_values": noise(1, 1, 1, 3, 16, 16),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(1, PROMPT, 1, 1, dtype=torch.long),
    }


def patches(_: nn.Module) -> dict[str, Tensor]:
    """Qwen-VL's: four by four flat patches, merged two by two."""
    return {
        "input_ids": tokens(images=4),
        "mm_token_type_ids": torch.tensor([[1] * 4 + [0] * PROMPT]),
        "pixel_values": noise(16, 3 * 2 * 8 * 8),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


def strips(_: nn.Module) -> dict[str, Tensor]:
    """Pix2Struct's: a row, a column and the pixels of each patch."""
    at = torch.tensor([[[1.0, 1], [1, 2], [2, 1], [2, 2]]])
    flat = torch.cat([at, noise(1, 4, 3 * 8 * 8)], 2)
    return {"flattened_patches": flat, "decoder_input_ids": tokens(1, 4)}


# What the zoo's models take; ``seen(4)``: a token for each patch of eight by eight.
four, one, none = seen(4), seen(1), seen(0)

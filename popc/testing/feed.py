"""The inputs of a model's calls: those of the first one, then token after token."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache

from popc.analysis.tokens import valid_tokens
from popc.compat import cache_keyword, pytree

# The keywords of the first call's tokens, of later ones, and of their mask; a decoder's come first.
TOKENS = (
    ("decoder_input_ids", "decoder_input_ids", "decoder_attention_mask"),
    ("decoder_inputs_embeds", "decoder_input_ids", "decoder_attention_mask"),
    ("input_ids", "input_ids", "attention_mask"),
    ("inputs_embeds", "input_ids", "attention_mask"),
)


class Feed:
    """The inputs of a model's calls, as keywords of ``forward`` where it has a name for them.

    Attributes:
        cache: the keyword that takes a KV cache; None if there is none, and no second call.
        tokens: the tensor of the first call's tokens, ids or values.
        batch: how many sequences there are.
    """

    def __init__(
        self, model: nn.Module, inputs: Tensor | Mapping[str, Any], dtype: torch.dtype | None
    ) -> None:
        self.model = model
        self.named = inspect.signature(model.forward).parameters
        self.args, self.kwargs = self._bound(_cast(inputs, dtype))
        wanted = self.kwargs.pop("use_cache", True)
        self.cache = cache_keyword(model.forward) if wanted and "use_cache" in self.named else None
        config = getattr(model, "config", None)
        self.cross = bool(getattr(config, "is_encoder_decoder", False))
        self.name, self.next_name, self.mask_name = self._names()
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        first = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), torch.zeros(1, 1))
        self.tokens: Tensor = first if self.name is None else self.kwargs[self.name]
        self.batch = len(self.tokens) if self.tokens.dim() > 1 else 1

    def _bound(self, inputs: Any) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """A tensor by the name of forward's first argument, or as it is if that has none."""
        if not isinstance(inputs, Tensor):
            return (), dict(inputs)
        first = next(iter(self.named.values()), None)
        if first is None or first.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            return (inputs,), {}
        return (), {first.name: inputs}

    def _names(self) -> tuple[str | None, str | None, str]:
        for name, following, mask in TOKENS:
            if isinstance(self.kwargs.get(name), Tensor):
                return name, following if following in self.named else name, mask
        tensors = {name: v for name, v in self.kwargs.items() if isinstance(v, Tensor) and v.dim()}
        values = [
            n for n in tensors if "mask" not in n and "pos" not in n and n != "token_type_ids"
        ]
        # Ids differ from values by their type.
        values.sort(key=lambda n: tensors[n].is_floating_point())
        first = next(iter((*values, *tensors)), None)
        return first, first, "attention_mask"

    @property
    def valid(self) -> Tensor | None:
        """Bool ``[B, T]``: False at padding of the first call; None if all are valid."""
        leaves = pytree.tree_leaves(self.kwargs.get(self.mask_name))
        mask = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
        if mask is None or mask.dim() not in (2, 4):
            return None
        return mask.bool() if mask.dim() == 2 else valid_tokens(mask).expand(self.batch, -1)

    def new_cache(self) -> Any:
        """An empty one."""
        if self.cross:
            return EncoderDecoderCache(DynamicCache(), DynamicCache())
        return DynamicCache()

    def first(self, cache: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The first call's arguments; copies, as a model may write to them."""
        args, kwargs = copy.deepcopy((self.args, self.kwargs))
        more = {} if self.cache is None else {self.cache: cache, "use_cache": True}
        return args, {**kwargs, **more}

    def step(
        self, number: int, token: Tensor, cache: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Those of the call with the ``number``-th token after the first call."""
        assert self.cache is not None
        kwargs = {
            name: self._later(name, copy.deepcopy(value), number)
            for name, value in self.kwargs.items()
            if name != self.name and self._is_repeated(name, value)
        }
        kwargs |= {self.cache: cache, "use_cache": True}
        if self.next_name is None:
            return (token,), kwargs
        return (), {self.next_name: token, **kwargs}

    def next_token(self, out: Any) -> Tensor:
        """The most likely id; of a model that takes values, its last output, or its last input.

        ``[B, 1]``, or ``[B, 1, D]``.
        """
        last = result(out)
        if not self.tokens.is_floating_point() or self.next_name != self.name:
            token = last.reshape(self.batch, -1, last.shape[-1])[:, -1:].argmax(-1)
            # Without logits, the index may exceed the number of tokens.
            token = token % _vocabulary(self.model, out, self.tokens)
            token = token if self.tokens.is_floating_point() else token.to(self.tokens.dtype)
            return token if self.tokens.dim() > 1 else token[0]
        fits = last.dim() == self.tokens.dim() and last.shape[-1] == self.tokens.shape[-1]
        return (last.to(self.tokens.dtype) if fits else self.tokens)[:, -1:]

    def _is_repeated(self, name: str, value: Any) -> bool:
        """Whether later calls take it too: per token, required, or no tensor but an option."""
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
            return True
        needed = name in self.named and self.named[name].default is inspect.Parameter.empty
        return name == self.mask_name or _is_position(name, value) or needed or self.cross

    def _later(self, name: str, value: Any, number: int) -> Any:
        if name == self.mask_name:
            return pytree.tree_map_only(Tensor, lambda mask: _grown(mask, number), value)
        if _is_position(name, value):
            return value[..., -1:] + number
        per_token = isinstance(value, Tensor) and value.shape[:2] == self.tokens.shape[:2]
        return value[:, -1:] if per_token and not self.cross else value


def result(out: Any) -> Tensor:
    """Logits, or the first tensor of values that a model returns."""
    logits = getattr(out, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    values = dict(out) if isinstance(out, Mapping) else out
    tensors = [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]
    tensors.sort(key=lambda t: (not t.is_floating_point(), not t.dim()))  # stable
    return tensors[0]


def _cast(inputs: Any, dtype: torch.dtype | None) -> Any:
    """Copies, with floating values in the model's dtype; integers and bools stay what they are."""

    def cast(value: Tensor) -> Tensor:
        value = value.detach().clone()
        if dtype is None or not value.is_floating_point():
            return value
        # The least number of a wider type marks what is masked: it must stay finite.
        result, most = value.to(dtype), torch.finfo(dtype).max
        return result.where(value.isinf(), result.clamp(-most, most))

    plain = inputs if isinstance(inputs, Tensor) else dict(inputs)
    return pytree.tree_map_only(Tensor, cast, plain)


def _vocabulary(model: nn.Module, out: Any, tokens: Tensor) -> int:
    """How many tokens the model surely takes."""
    try:
        table = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        table = None
    if isinstance(table, nn.Embedding):
        return table.num_embeddings
    if isinstance(getattr(out, "logits", None), Tensor):
        return int(result(out).shape[-1])
    # Another table may be smaller, as of positions: then fewer tokens are used than could be.
    least = int(tokens.max()) + 1
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    return min((size for size in tables if size >= least), default=least)


def _is_position(name: str, value: Any) -> bool:
    return "pos" in name and isinstance(value, Tensor) and not value.is_floating_point()


def _grown(mask: Tensor, number: int) -> Tensor:
    """A mask with ``number`` more tokens, none hidden; of ``[..., T, K]`` the row of the last."""
    if mask.dim() < 3:
        more = torch.ones_like(mask[..., :1])
    else:
        mask = mask[..., -1:, :]
        seen = torch.ones_like if mask.dtype is torch.bool else torch.zeros_like
        more = seen(mask[..., :1])
    return torch.cat((mask, more.expand(*mask.shape[:-1], number)), -1)

"""assert_equivalent takes what models take: values, nested inputs, several of them, other names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel, T5Config
from transformers import T5ForConditionalGeneration as T5

import popc
from popc import testing
from popc.testing import MLP, Layer, Transformer
from popc.testing.feed import Feed
from tests.helpers.models import tiny_llama

WIDTH = 16
EAGER = {"sparsity": 0.5, "candidate": 0.3, "codegen": "eager"}
IDS = torch.tensor([[3, 5, 7, 2, 9], [4, 4, 8, 1, 6]])


def check(model: nn.Module, inputs: Any, *, prunes: bool = True, **options: Any):
    result = testing.assert_equivalent(model, inputs, **{**EAGER, **options})
    assert result.decided and bool(result.masked) == prunes
    return result


def floats(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    """Attention over a cache, then an MLP, of values."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.ModuleList([testing.Attention(kv_heads=3).make(width)])
        self.mlp = MLP(channels=12).make(width)

    def run(self, x: Tensor, cache: Any) -> Tensor:
        x = x + self.layer[0](F.rms_norm(x, x.shape[-1:]), cache)
        return x + self.mlp(F.rms_norm(x, x.shape[-1:]))


class Values(Block):
    """A decoder of values: it takes no ids, under a name of its own."""

    def forward(self, series: Tensor, cache: Any = None, use_cache: bool = False) -> Tensor:
        return self.run(series, cache)


class Narrower(Values):
    """What it gives is not as wide as what it takes."""

    def forward(self, series: Tensor, cache: Any = None, use_cache: bool = False) -> Tensor:
        return super().forward(series, cache)[..., :5]


class Named(Block):
    """Ids under another name, first of all."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, WIDTH)

    def forward(self, tokens: Tensor, cache: Any = None, use_cache: bool = False) -> Tensor:
        return self.run(self.table(tokens), cache)


class Nested(Block):
    """Values in tuples and dicts, beside ids that must stay integers and a mask of bools."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, WIDTH)

    def forward(
        self,
        tensors: dict[str, Any],
        pair: tuple[Tensor, Tensor],
        mask: Tensor,
        how: str = "sum",
    ) -> dict[str, Any]:
        assert mask.dtype is torch.bool and tensors["ids"].dtype is torch.int64
        x = self.table(tensors["ids"]) + tensors["more"][0] + (pair[0] if how == "sum" else 0)
        x = (x + pair[1]).masked_fill(~mask[..., None], 0)
        return {"count": mask.sum(), "states": [self.run(x, None)]}


def nested() -> dict[str, Any]:
    size = (2, 5, WIDTH)
    pair = floats(*size, seed=1), floats(*size, seed=2)
    tensors = {"ids": IDS, "more": [floats(*size)]}
    return {"tensors": tensors, "pair": pair, "mask": IDS > 2, "how": "sum"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, None])
def test_values_come_in_the_models_dtype(dtype: torch.dtype | None) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).eval()
    for inputs in (floats(1, 5, 16), {"input": floats(1, 5, 16)}):
        check(model, inputs, dtype=dtype, policy="pop", prunes=False)


@pytest.mark.parametrize("policy", ["pop", "threshold"])
@pytest.mark.parametrize("model", [Values, Narrower, Named])
def test_a_tensor_is_passed_as_the_first_argument_of_any_name(model, policy: str) -> None:
    inputs = IDS if model is Named else floats(2, 5, WIDTH)
    check(model(), inputs, policy=policy, scope="sequence", steps=2)
    (name,) = Feed(model(), inputs, None).kwargs
    assert name == ("tokens" if model is Named else "series")


def test_bfloat16_decodes_values() -> None:
    x = floats(2, 5, WIDTH, seed=1).bfloat16()
    check(Values().bfloat16(), x, dtype=None, policy="threshold")


@pytest.mark.parametrize("policy", ["pop", "threshold"])
def test_nested_inputs(policy: str) -> None:
    inputs = nested()
    check(Nested(), inputs, policy=policy, prunes=False)
    assert inputs["pair"][0].dtype is torch.float32  # the caller's own stay what they are
    feed = Feed(Nested(), inputs, torch.float64)
    (_, kwargs) = feed.first(None)
    assert kwargs["tensors"]["more"][0].dtype is torch.float64 and kwargs["how"] == "sum"
    assert kwargs["tensors"]["ids"].dtype is torch.int64 and kwargs["mask"].dtype is torch.bool


@pytest.mark.parametrize("policy", ["pop", "threshold"])
def test_embeddings_are_followed_by_ids(policy: str) -> None:
    """Also padded ones, with positions given, and an option that is no tensor."""
    model = tiny_llama(num_hidden_layers=1)
    values = model.get_input_embeddings()(IDS).detach()
    mask = torch.ones_like(IDS)
    mask[1, :2] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = {"inputs_embeds": values, "attention_mask": mask, "position_ids": positions}
    check(model, {**padded, "return_dict": True}, policy=policy, scope="sequence", steps=2)


def test_masks_of_each_query() -> None:
    """``[B, 1, T, K]`` of what is added to scores; padding counts for nothing."""
    model = tiny_llama(num_hidden_layers=1)
    seen = torch.ones(5, 5, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    seen[1, :, :, :2] = False
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    check(model, {"input_ids": IDS, "attention_mask": added}, policy="pop")
    feed = Feed(model, {"input_ids": IDS, "attention_mask": added}, torch.bfloat16)
    assert feed.kwargs["attention_mask"].isfinite().all()  # though bfloat16 ends earlier
    assert torch.equal(
        Feed(model, {"input_ids": IDS, "attention_mask": seen}, None).valid, feed.valid
    )
    assert torch.equal(feed.valid, torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]).bool())


def test_pictures_beside_ids() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    text = {**sizes, "num_attention_heads": 2, "vocab_size": 40, "eos_token_id": 2}
    vision = {**sizes, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    pictures = {"pixel_values": floats(3, 3, 8, 8), "input_ids": IDS}
    check(model, {"attention_mask": torch.ones_like(IDS), **pictures}, policy="pop", prunes=False)


def test_an_encoder_with_a_cache_that_it_does_not_fill() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = BertModel(BertConfig(**sizes, num_attention_heads=2, vocab_size=40)).eval()
    check(model, {"inputs_embeds": floats(2, 5, 32)})


def test_an_encoder_and_a_decoder() -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    model = T5(T5Config(**sizes, vocab_size=40, decoder_start_token_id=0)).eval()
    check(model, {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]}, policy="pop", steps=1)


def test_a_failure_prints_its_inputs() -> None:
    """The script holds values too, exactly."""
    spec = Transformer(layers=(Layer(block=MLP(channels=12)),))
    mask = torch.tensor([[1.0, 1.0, float("nan")]], dtype=torch.float32)
    said = testing.equivalence._script(spec.make(), {"a": (mask, IDS[:1])}, popc.Config())
    assert "torch.tensor([[1.0, 1.0, nan]], dtype=torch.float32)" in said
    assert "torch.tensor([[3, 5, 7, 2, 9]], dtype=torch.int64)" in said


def test_a_model_that_fails_is_reported() -> None:
    with pytest.raises(popc.errors.ModelError, match="fails on the inputs"):
        testing.assert_equivalent(tiny_llama(), {"input_ids": IDS, "no_such": IDS, "labels": 3})

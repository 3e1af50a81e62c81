"""One token's attention against ``scaled_dot_product_attention`` in float64, heads repeated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.nn.functional import scaled_dot_product_attention

from popc.ops import attend

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# Query heads, heads of keys, keys, width of keys, width of values: of whole vectors, with a rest,
# with more queries to a head than one reading serves, with more keys than are taken at once.
SIZES = [(9, 3, 130, 64, 64), (4, 4, 37, 40, 33), (22, 2, 65, 96, 8), (3, 1, 1, 5, 7)]
MASKS = ["none", "filled", "padded", "heads", "numbers", "biases"]


pytestmark = pytest.mark.usefixtures("kernels_in_threads")


def expected(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    times = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(times, 1) for t in (k, v))
    if mask is not None and mask.dtype is not torch.bool:
        mask = mask.double()
    return scaled_dot_product_attention(q.double(), k, v, mask, scale=scale)


def masked(kind: str, batch: int, heads: int, keys: int, dtype: torch.dtype) -> Tensor | None:
    """A mask that shows the last key to all."""
    seen = {
        "filled": (torch.arange(keys) % 64 < 40)[None],
        "padded": torch.arange(keys) >= torch.arange(batch).view(-1, 1, 1, 1) * 5 % keys,
        "heads": torch.rand(batch, heads, 1, keys) < 0.5,
        "numbers": torch.rand(batch, 1, 1, keys) < 0.5,
    }
    if kind in seen:
        mask = seen[kind]
        mask[..., -1] = True
        if kind != "numbers":
            return mask
        return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)
    return None if kind == "none" else torch.randn(heads, 1, keys).to(dtype)


def close(y: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert (y.shape, y.dtype) == (wanted.shape, dtype) and y.is_contiguous()
    scale = float(wanted.abs().max())
    torch.testing.assert_close(y.double(), wanted, atol=DTYPES[dtype] * scale, rtol=0)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_attention(dtype: torch.dtype, batch: int, kind: str) -> None:
    torch.manual_seed(0)
    for heads, groups, keys, inner, outer in SIZES:
        q = torch.randn(batch, 1, heads, inner).to(dtype).transpose(1, 2)
        # As a cache that has room left, and as tokens come out of a linear.
        k = torch.randn(batch, groups, keys + 9, inner).to(dtype)[:, :, :keys]
        v = torch.randn(batch, keys, groups, outer).to(dtype).transpose(1, 2)
        mask = masked(kind, batch, heads, keys, dtype)
        for scale in (None, 0.3):
            close(attend(q, k, v, mask, scale), expected(q, k, v, mask, scale), dtype)


def test_fake_tensors_and_schema() -> None:
    q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 6)
    opcheck(attend, (q, k, v, None, 0.5), test_utils=("test_schema", "test_faketensor"))


def test_what_is_hidden_is_not_read() -> None:
    q, k, v = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 90, 16), torch.randn(1, 2, 90, 16)
    mask = torch.arange(90)[None, None, None] < 70
    before = attend(q, k, v, mask)
    k[:, :, 70:] = v[:, :, 70:] = torch.nan
    assert torch.equal(attend(q, k, v, mask), before)


@pytest.mark.parametrize("place", [0, 63, 64, 199])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_a_nan_that_is_seen_is_shown(which: str, place: int) -> None:
    q, k, v = torch.randn(1, 2, 1, 64), torch.randn(1, 2, 200, 64), torch.randn(1, 2, 200, 64)
    {"q": q[0, 0, 0], "k": k[0, 0, place], "v": v[0, 0, place]}[which][:] = torch.nan
    y = attend(q, k, v)
    assert y[0, 0].isnan().all() and not y[0, 1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_who_sees_nothing_gets_zeros(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 2, 1, 8), torch.randn(3, 1, 70, 8), torch.randn(3, 1, 70, 8)
    mask = torch.ones(3, 1, 1, 70, dtype=torch.bool)
    mask[1] = False
    if dtype is torch.float32:
        mask = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
    y = attend(q, k, v, mask)
    assert not y[1].any() and y[0].all()
    close(y, expected(q, k, v, mask, None), torch.float32)


def test_large_scores_do_not_overflow() -> None:
    q, k, v = torch.full((1, 1, 1, 8), 30.0), torch.randn(1, 1, 300, 8), torch.randn(1, 1, 300, 8)
    k[0, 0, 250] = 30.0
    torch.testing.assert_close(attend(q, k, v)[0, 0], v[0, 0, 250:251])


def test_the_answer_is_the_same_every_time() -> None:
    q, k, v = torch.randn(2, 6, 1, 64), torch.randn(2, 2, 900, 64), torch.randn(2, 2, 900, 64)
    first = attend(q, k, v)
    assert all(torch.equal(attend(q, k, v), first) for _ in range(20))


@pytest.mark.parametrize("tokens", [0, 5])
def test_other_tokens_than_one_are_left_to_aten(tokens: int) -> None:
    q, k, v = torch.randn(2, 6, tokens, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    torch.testing.assert_close(attend(q, k, v), expected(q, k, v, None, None).float())


def test_what_does_not_fit_raises() -> None:
    q, k, v = torch.randn(2, 6, 1, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    for args in [
        (q, k[..., :7], v),
        (q[:, :5], k, v),
        (q, k.double(), v),
        (q, k, v, torch.ones(1, 1, 1, 8, dtype=torch.bool)),
        (q, k, v, torch.ones(2, 6, 1, 9, dtype=torch.int64)),
    ]:
        with pytest.raises((RuntimeError, ValueError)):
            attend(*args)
    for query in (q, q.double()):  # by the kernel, and by ATen
        with pytest.raises(ValueError, match=r"\[2, 2, 9, 8\] and values \[2, 2, 8, 8\]"):
            attend(query, k, v[:, :, :8])

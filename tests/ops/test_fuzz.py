"""The kernels on whatever fits their signature: as the reference has it, or an error."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from popc import ops
from popc.ops.measure import BINS, SAMPLE, _centers, _measure_inputs, _sum_squares
from tests.helpers.checks import outputs_of
from tests.helpers.profiles import examples
from tests.helpers.triton_cases import part_among

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
SIZES = st.integers(0, 40) | st.sampled_from([63, 64, 65, 257])
reference = torch.ops.popc


pytestmark = pytest.mark.usefixtures("kernels")


@st.composite
def tensors(draw: st.DrawFn, *shape: int, dtype: torch.dtype) -> Tensor:
    """Contiguous, turned, strided or a slice of something larger."""
    made = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    how = draw(st.sampled_from(["plain", "turned", "strided", "slice"]))
    if how == "turned" and len(shape) > 1:
        return torch.randn(*shape[:-2], shape[-1], shape[-2], generator=made).to(dtype).mT
    if how == "strided":
        return torch.randn(*shape[:-1], 2 * shape[-1], generator=made).to(dtype)[..., ::2]
    if how == "slice":
        return torch.randn(*shape[:-1], shape[-1] + 3, generator=made).to(dtype)[..., 1:-2]
    return torch.randn(shape, generator=made).to(dtype)


@st.composite
def lists(draw: st.DrawFn, size: int, lead: int | None) -> Tensor | None:
    """Channels in any order, some of them twice; for each of ``lead``, for all, or none given."""
    if draw(st.booleans()) or not size:
        return None
    count = draw(st.integers(0, 2 * size))
    made = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    shape = (count,) if lead is None or draw(st.booleans()) else (lead, count)
    return torch.randint(size, shape, generator=made)


def close(y: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert (y.shape, y.dtype) == (expected.shape, dtype)
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(y.double(), expected, atol=DTYPES[dtype] * (scale + 1e-6), rtol=0)


def wide(*values: Tensor | None) -> list[Tensor | None]:
    return [None if value is None else value.double() for value in values]


@given(st.data(), st.sampled_from(list(DTYPES)), st.integers(0, 1))
@examples(120, 3000)
def test_gather_linear(data: st.DataObject, dtype: torch.dtype, out_dim: int) -> None:
    outputs, inputs = data.draw(SIZES, "outputs"), data.draw(SIZES, "inputs")
    batch, length = data.draw(st.integers(0, 4), "batch"), data.draw(st.integers(1, 3), "length")
    x = data.draw(tensors(batch, length, inputs, dtype=dtype), "x")
    sizes = (outputs, inputs) if out_dim == 0 else (inputs, outputs)
    weight = data.draw(tensors(*sizes, dtype=dtype), "weight")
    bias = data.draw(st.none() | tensors(outputs, dtype=dtype), "bias")
    rows, columns = (
        data.draw(lists(outputs, batch), "rows"),
        data.draw(lists(inputs, batch), "cols"),
    )
    y = ops.gather_linear(x, weight, bias, rows, columns, out_dim)
    if batch:
        close(
            y,
            reference.gather_linear_reference(*wide(x, weight, bias), rows, columns, out_dim),
            dtype,
        )


@given(st.data(), st.sampled_from(list(DTYPES)), st.integers(0, 1))
@examples(60, 2000)
def test_gather_experts(data: st.DataObject, dtype: torch.dtype, out_dim: int) -> None:
    outputs, inputs = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    stack, rows_in = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    x = data.draw(tensors(rows_in, inputs, dtype=dtype), "x")
    sizes = (outputs, inputs) if out_dim == 0 else (inputs, outputs)
    weight = data.draw(tensors(stack, *sizes, dtype=dtype), "weight")
    made = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    expert = torch.randint(stack, (rows_in,), generator=made)
    full = torch.randint(2, (stack,), generator=made)
    rows, columns = data.draw(lists(outputs, stack)), data.draw(lists(inputs, rows_in))
    rows = rows if rows is None or rows.dim() == 2 else rows.expand(stack, -1)
    columns = columns if columns is None or columns.dim() == 2 else columns.expand(rows_in, -1)
    y = ops.gather_experts(x, weight, expert, full, rows, columns, out_dim)
    expected = ops.gather_experts(*wide(x, weight), expert, full, rows, columns, out_dim)
    close(y, expected, dtype)


def among_others(data: st.DataObject, *tensors: Tensor | None) -> list[Tensor | None]:
    """The last dims as parts of longer ones, with NaN around them."""
    before, after = (data.draw(st.integers(0, 3)) for _ in range(2))
    return [part_among(values, before, after) for values in tensors]


@given(st.data(), st.sampled_from(list(DTYPES)), st.integers(0, 1))
@examples(120, 3000)
def test_threshold_linear(data: st.DataObject, dtype: torch.dtype, out_dim: int) -> None:
    outputs, inputs = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    batch = data.draw(st.integers(1, 9), "batch")
    x = data.draw(tensors(batch, 1, inputs, dtype=dtype), "x")
    sizes = (outputs, inputs) if out_dim == 0 else (inputs, outputs)
    weight = data.draw(tensors(*sizes, dtype=dtype), "weight")
    bias = data.draw(st.none() | tensors(outputs, dtype=dtype), "bias")
    norm = data.draw(tensors(inputs, dtype=torch.float32)).abs()
    limit = data.draw(tensors(data.draw(st.sampled_from([1, batch])), dtype=torch.float32)).abs()
    center = base = None
    moved, added = x, torch.zeros(outputs)
    if data.draw(st.booleans(), "centered"):
        rows = data.draw(st.sampled_from([1, batch]))
        center = data.draw(tensors(rows, inputs, dtype=torch.float32), "center")
        base = added = data.draw(tensors(rows, outputs, dtype=torch.float32), "base")
        moved = (x.float() - center[:, None]).to(dtype)
    kept = (x.float() - (0 if center is None else center[:, None])).abs() * norm
    kept = kept > limit.view(-1, 1, 1)
    norms, centers, bases, limits = among_others(data, norm, center, base, limit)
    y = ops.threshold_linear(x, weight, bias, norms, limits, out_dim, centers, bases)
    weights = weight.double().mT if out_dim == 0 else weight.double()
    expected = (moved.double() * kept) @ weights + added.double().view(-1, 1, outputs)
    close(y, expected + (0 if bias is None else bias.double()), dtype)
    read = kept.flatten(0, 1).any(0).sum()
    assert ops.count_active_channels(x, norms, limits, centers) == read


@given(st.data(), st.sampled_from(list(DTYPES)))
@examples(80, 2000)
def test_threshold_linears(data: st.DataObject, dtype: torch.dtype) -> None:
    """Each as it would be alone."""
    inputs, batch = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 9), "batch")
    out_dims = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=4), "out_dims")
    outputs = [data.draw(st.integers(1, 70)) for _ in out_dims]
    weights, biases = [], []
    for n, out_dim in zip(outputs, out_dims, strict=True):
        sizes = (n, inputs) if out_dim == 0 else (inputs, n)
        weights.append(data.draw(tensors(*sizes, dtype=dtype)))
        biases.append(data.draw(st.none() | tensors(n, dtype=dtype)))
    x = data.draw(tensors(batch, 1, inputs, dtype=dtype), "x")
    norm = data.draw(tensors(inputs, dtype=torch.float32)).abs()
    limit = data.draw(tensors(data.draw(st.sampled_from([1, batch])), dtype=torch.float32)).abs()
    center = base = None
    parts: list[Tensor | None] = [None] * len(outputs)
    if data.draw(st.booleans(), "centered"):
        rows = data.draw(st.sampled_from([1, batch]))
        center = data.draw(tensors(rows, inputs, dtype=torch.float32))
        base = data.draw(tensors(rows, sum(outputs), dtype=torch.float32))
        parts = list(base.split(outputs, -1))
    norms, centers, bases, limits = among_others(data, norm, center, base, limit)
    together = ops.threshold_linears(x, weights, biases, norms, limits, out_dims, centers, bases)
    got = outputs_of(together, x, outputs)
    for y, weight, bias, out_dim, part in zip(got, weights, biases, out_dims, parts, strict=True):
        alone = ops.threshold_linear(x, weight, bias, norm, limit, out_dim, center, part)
        close(y, alone.double(), dtype)


@given(st.data(), st.sampled_from(list(DTYPES)))
@examples(100, 2000)
def test_select_units(data: st.DataObject, dtype: torch.dtype) -> None:
    units, each = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 3))
    batch = data.draw(st.integers(1, 4))
    h = data.draw(tensors(batch, 1, units * each, dtype=dtype), "h")
    active = data.draw(st.integers(1, units))
    retained = data.draw(st.integers(0, active))
    made = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    per_sequence = data.draw(st.booleans())
    shape = (batch, units, each) if per_sequence else (units, each)
    columns = torch.randperm(units * each, generator=made).view(units, each).expand(shape)
    norm = torch.rand(shape[:-1], generator=made)
    args = (h, norm, columns.contiguous(), retained, active)
    got, expected = ops.select_units(*args), reference.select_units_reference(*args)
    # Sums in another order may swap two that are equal but for rounding.
    assert got.shape == expected.shape
    same = (got.sort(-1).values == expected.sort(-1).values).double().mean()
    assert same == 1 or (dtype != torch.float32 and same > 0.5) or float(same) > 0.9


@given(st.data(), st.sampled_from([*DTYPES, torch.float64]))
@examples(80, 2000)
def test_measures(data: st.DataObject, dtype: torch.dtype) -> None:
    batch, width = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 50))
    length = data.draw(st.integers(0, 40) | st.integers(SAMPLE, 6 * SAMPLE))
    x = data.draw(tensors(batch, length, width, dtype=dtype), "x")
    made = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = x + data.draw(st.sampled_from([0, 1])) * torch.randn(width, generator=made).to(dtype)
    valid = data.draw(st.sampled_from([None, torch.rand(batch, length, generator=made) > 0.5]))
    norm = torch.rand(width, generator=made)
    torch.testing.assert_close(ops.sum_squares(x, valid), _sum_squares(x, valid))
    lead = data.draw(st.sampled_from([1, batch]), "sequences measured apart")
    known = torch.zeros(lead, 2 * width + 1, dtype=torch.float64)
    if data.draw(st.booleans(), "tokens before"):
        before = torch.randn(lead, data.draw(st.integers(1, 300)), width, generator=made)
        known, _ = _measure_inputs(before, norm, None, known)
    moments, got = ops.measure_inputs(x, norm, valid, known)
    expected, counted = _measure_inputs(x, norm, valid, known)
    sizes, _ = _measure_inputs(x.abs(), norm, valid, known.abs())
    assert ((moments - expected).abs() <= 1e-6 * (1 + sizes)).all()  # as sums of float32 round
    torch.testing.assert_close(ops.centers(moments), _centers(moments), equal_nan=True)
    assert got[:, :BINS].sum(1).tolist() == counted[:, :BINS].sum(1).tolist()
    # One rounding may put a score into the next bin, and its token may count for several.
    other = (got[:, :BINS].cumsum(1) - counted[:, :BINS].cumsum(1)).abs()
    assert not other.numel() or other.max() <= 2 * max(1, (batch * length + 300) // SAMPLE)
    torch.testing.assert_close(got[:, BINS], counted[:, BINS], rtol=1e-4, atol=1e-3)


@st.composite
def masks(draw: st.DrawFn, *shape: int, dtype: torch.dtype) -> Tensor | None:
    """Of bools or of numbers, some of them -inf; of full size, or the same along some dims."""
    if draw(st.booleans()):
        return None
    sizes = [1 if draw(st.booleans()) else size for size in shape]
    made = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    seen = torch.rand(sizes, generator=made) < draw(st.sampled_from([0.0, 0.1, 0.9, 1.0]))
    if draw(st.booleans()):
        return seen
    return torch.randn(sizes, generator=made).to(dtype).masked_fill(~seen, -torch.inf)


@given(st.data(), st.sampled_from(list(DTYPES)))
@examples(120, 3000)
def test_attend(data: st.DataObject, dtype: torch.dtype) -> None:
    batch, groups = data.draw(st.integers(1, 3), "batch"), data.draw(st.integers(1, 3), "groups")
    heads = groups * data.draw(st.integers(1, 11), "queries")
    keys = data.draw(st.integers(1, 140), "keys")
    inner, outer = (data.draw(st.integers(1, 70), name) for name in ("inner", "outer"))
    q = data.draw(tensors(batch, heads, 1, inner, dtype=dtype), "q")
    k = data.draw(tensors(batch, groups, keys, inner, dtype=dtype), "k")
    v = data.draw(tensors(batch, groups, keys, outer, dtype=dtype), "v")
    mask = data.draw(masks(batch, heads, 1, keys, dtype=dtype), "mask")
    seen = mask if mask is None or mask.dtype is torch.bool else mask.double()
    k64, v64 = (t.double().repeat_interleave(heads // groups, 1) for t in (k, v))
    expected = F.scaled_dot_product_attention(q.double(), k64, v64, seen)
    close(ops.attend(q, k, v, mask), expected, dtype)


@given(st.data())
@examples(60, 2000)
def test_what_is_out_of_bounds_raises(data: st.DataObject) -> None:
    outputs, inputs = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20))
    x, weight = torch.randn(1, 1, inputs), torch.randn(outputs, inputs)
    at = data.draw(st.sampled_from(["rows", "columns"]))
    size = outputs if at == "rows" else inputs
    wrong = data.draw(st.integers(size, 2**40) | st.integers(-(2**40), -1))
    index = torch.tensor([*range(data.draw(st.integers(0, size - 1))), wrong])
    rows, columns = (index, None) if at == "rows" else (None, index)
    with pytest.raises(IndexError):
        ops.gather_linear(x, weight, None, rows, columns, 0)
    units = torch.arange(inputs)[:, None].clone()
    units[data.draw(st.integers(0, inputs - 1))] = inputs + 1
    with pytest.raises(IndexError):
        ops.select_units(x, torch.ones(inputs), units, 0, 1)

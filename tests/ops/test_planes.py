"""The format of quantised weights: where each value is, what is read of it, how far off it is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from popc import ops
from popc.ops import planes as fmt
from tests.helpers.profiles import examples

SIZES = [(32, 64), (40, 70), (1, 5), (33, 1), (3, 40, 70)]


def unpacked(packed: Tensor, sizes: tuple[int, ...], row_dim: int, planes: int, bits: int = 8):
    return fmt.unpack(packed, None, None, sizes, row_dim, planes, torch.float32, bits)


def by_hand(row: bytes, length: int, index: int, planes: int) -> tuple[float, int, int]:
    """The scale and the nibbles of a row's value, as the format is written down."""
    blocks = -(-length // 32)
    block, place = divmod(index, 32)
    high = row[2 * blocks + 16 * block :][:16]
    low = row[18 * blocks + 16 * block :][:16] if planes == 2 else bytes(16)
    raw = int.from_bytes(row[2 * block : 2 * block + 2], "little") << 16
    scale = torch.tensor(raw, dtype=torch.int64).to(torch.int32).view(torch.float32).item()
    j, i = divmod(place, 4)

    def nibble(plane: bytes) -> int:
        return int.from_bytes(plane[4 * i : 4 * i + 4], "little") >> (4 * j) & 15

    return scale, nibble(high), nibble(low)


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("row_dim", [0, 1])
def test_each_value_is_where_the_format_says(row_dim: int, planes: int) -> None:
    torch.manual_seed(0)
    sizes = (40, 70)
    packed = fmt.pack(torch.randn(sizes), row_dim, planes)
    values = unpacked(packed, sizes, row_dim, planes)
    coarse = unpacked(packed, sizes, row_dim, planes, bits=4)
    rows, length = (70, 40) if row_dim == 1 else (40, 70)
    assert packed.shape == (rows, fmt.blocks_of(length) * (34 if planes == 2 else 18))
    for row in range(0, rows, 7):
        for index in range(length):
            held = bytes(packed[row].tolist())
            scale, high, low = by_hand(held, length, index, planes)
            at = (index, row) if row_dim == 1 else (row, index)
            if planes == 2:
                assert values[at] == (16 * high + low - 128) * scale
                assert coarse[at] == (16 * high + 7.5 - 128) * scale
            else:
                assert values[at] == coarse[at] == (high - 7.5) * scale


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("row_dim", [0, 1])
def test_errors(row_dim: int, sizes: tuple[int, ...]) -> None:
    """Half a step of 8 bits; by the high plane alone, 7.5 steps, as 16 of them look alike."""
    torch.manual_seed(0)
    w = torch.randn(sizes) * torch.rand(sizes[-1])
    rows = w.mT if row_dim == 1 else w
    tail = -rows.shape[-1] % 32
    blocks = torch.nn.functional.pad(rows, (0, tail)).unflatten(-1, (-1, 32))
    most = blocks.abs().amax(-1, keepdim=True)
    # A scale is rounded up to bfloat16's 8 bits.
    step = (most / 127 * (1 + 2**-7)).expand_as(blocks).flatten(-2)[..., : rows.shape[-1]]
    step = step.mT if row_dim == 1 else step
    packed = fmt.pack(w, row_dim, 2)
    assert ((unpacked(packed, sizes, row_dim, 2) - w).abs() <= 0.501 * step).all()
    coarse = unpacked(packed, sizes, row_dim, 2, bits=4)
    assert ((coarse - w).abs() <= 8.001 * step).all()


@pytest.mark.parametrize("row_dim", [0, 1])
def test_a_single_plane_is_closer_than_the_high_one_of_two(row_dim: int) -> None:
    torch.manual_seed(0)
    w = torch.randn(64, 96)
    coarse = unpacked(fmt.pack(w, row_dim, 2), (64, 96), row_dim, 2, bits=4)
    one = unpacked(fmt.pack(w, row_dim, 1), (64, 96), row_dim, 1)
    assert (one - w).norm() < 0.985 * (coarse - w).norm()


@pytest.mark.parametrize("planes", [1, 2])
def test_zeros(planes: int) -> None:
    """A block of zeros, and one of a single value: exact at 8 bits."""
    w = torch.zeros(64, 32)
    w[40:, 3] = 2.0
    values = unpacked(fmt.pack(w, 1, planes), (64, 32), 1, planes)
    assert (values[:32] == 0).all()
    if planes == 2:
        assert (values[:40] == 0).all() and ((values[40:, 3] - 2).abs() < 0.01).all()
    assert values.isfinite().all()


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("size", [1e-42, 1e-37, 1e30])
def test_values_of_any_size(size: float, planes: int) -> None:
    torch.manual_seed(0)
    w = torch.randn(64, 40) * size
    values = unpacked(fmt.pack(w, 0, planes), (64, 40), 0, planes)
    assert values.isfinite().all() and (values.abs() <= 1.01 * w.abs().max()).all()
    if size > 1e-38:
        off = (values - w).double().norm() / w.double().norm()
        assert off < {1: 0.1, 2: 0.01}[planes]


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_value_that_is_not_finite_shows(value: float) -> None:
    w = torch.ones(2, 64)
    w[1, 40] = value
    values = unpacked(fmt.pack(w, 0, 2), (2, 64), 0, 2)
    assert not values[1, 40].isfinite() and values[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_quantised_as_float32(dtype: torch.dtype) -> None:
    w = torch.randn(40, 70, dtype=dtype)
    assert torch.equal(fmt.pack(w, 1, 2), fmt.pack(w.float(), 1, 2))


@examples(20, 500)
@given(
    st.tuples(st.integers(1, 70), st.integers(1, 70)),
    st.sampled_from([0, 1]),
    st.sampled_from([1, 2]),
    st.integers(1, 4),
    st.booleans(),
)
def test_integers_are_kept(
    sizes: tuple[int, int], row_dim: int, planes: int, groups: int, has_zero: bool
) -> None:
    """With a scale, and a zero point or none, for each output and group of inputs."""
    groups = min(groups, sizes[1])
    length = -(-sizes[1] // groups)
    groups = -(-sizes[1] // length)
    torch.manual_seed(sizes[0] * sizes[1])
    u = torch.randint(0, 16**planes, sizes)
    packed = fmt.pack_integers(u, row_dim, planes)
    rows = sizes[1] if row_dim == 1 else sizes[0]
    assert packed.shape == (rows, fmt.row_bytes(sizes[1 - row_dim], planes, scales=False))
    scale = torch.rand(groups, sizes[0])
    zero = 8 * torch.rand(groups, sizes[0]) if has_zero else None
    values = fmt.unpack(packed, scale, zero, sizes, row_dim, planes, torch.float32)
    for k in range(sizes[1]):
        offset = zero[k // length] if zero is not None else fmt.GROUP_ZERO[planes]
        assert torch.equal(values[:, k], (u[:, k] - offset) * scale[k // length])


def test_ops_are_the_format() -> None:
    torch.manual_seed(0)
    w = torch.randn(2, 40, 70)
    for row_dim in (0, 1):
        for planes in (1, 2):
            packed = ops.quantize(w, row_dim, planes)
            assert torch.equal(packed, fmt.pack(w, row_dim, planes))
            for bits in (4, 8):
                how = (None, None, w.shape, row_dim, planes, torch.float32, bits)
                assert torch.equal(ops.dequantize(packed, *how), fmt.unpack(packed, *how))


@pytest.mark.parametrize("row_dim", [0, 1])
def test_against_torchao(row_dim: int) -> None:
    """Symmetric int8 in blocks of 32, but for the scales, which are rounded up to bfloat16."""
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    torch.manual_seed(0)
    w = torch.randn(64, 96) * torch.rand(96)
    block = (32, 1) if row_dim == 1 else (1, 32)
    symmetric = primitives.MappingType.SYMMETRIC
    limits = {"quant_min": -127, "quant_max": 127}
    scale, zero_point = primitives.choose_qparams_affine(
        w, symmetric, block, torch.int8, **limits, scale_dtype=torch.float32, eps=1e-30
    )
    assert not zero_point.any()
    packed = fmt.pack(w, row_dim, 2)
    blocks = fmt.blocks_of(w.shape[1 - row_dim])
    own = packed[:, : 2 * blocks].contiguous().view(torch.bfloat16).float()
    own = own.T if row_dim == 1 else own
    theirs = scale.reshape(own.shape)
    assert (own >= theirs).all() and (own < theirs * (1 + 2**-7)).all()
    rounded = torch.nextafter(own.bfloat16(), torch.tensor(0.0, dtype=torch.bfloat16))
    assert (rounded.float() < theirs).all()  # the next smaller one would be too small
    # With these scales torchao's integers are the same, but where it is a toss-up: it multiplies by
    # the scale's inverse.
    given = (own.contiguous(), zero_point, torch.int8)
    q = primitives.quantize_affine(w, block, *given, **limits)
    ours = fmt.unpack(packed, None, None, (64, 96), row_dim, 2, torch.float32)
    steps = own.repeat_interleave(32, 0) if row_dim == 1 else own.repeat_interleave(32, 1)
    integers = (ours / steps).round()
    differ = integers != q
    assert differ.float().mean() < 1e-3 and (integers - q).abs().max() <= 1
    assert ((w / steps)[differ].frac().abs() - 0.5).abs().le(1e-4).all()
    values = primitives.dequantize_affine(
        q, block, own.contiguous(), zero_point, torch.int8, **limits
    )
    assert torch.equal(ours[~differ], values[~differ])

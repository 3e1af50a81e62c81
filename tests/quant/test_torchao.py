"""Weights that torchao has quantised, stored in planes: the same values, or a reason why not."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from popc.ops import planes as fmt
from popc.quant import QuantizedTensor
from popc.quant import torchao as by_torchao

torchao = pytest.importorskip("torchao")
quantization = pytest.importorskip("torchao.quantization")
primitives = pytest.importorskip("torchao.quantization.quant_primitives")
PerAxis, PerGroup = quantization.PerAxis, quantization.PerGroup
MappingType = primitives.MappingType

DTYPES = torch.float32, torch.bfloat16, torch.float16
VERSION = tuple(int(part) for part in torchao.__version__.split(".")[:2])


def weight(config: Any, dtype: torch.dtype = torch.bfloat16, size: tuple = (48, 96)) -> Tensor:
    """What ``quantize_`` makes of a linear's weight, channels and outputs of different sizes."""
    torch.manual_seed(0)
    linear = nn.Linear(size[1], size[0], dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(size) * torch.rand(size[0], 1) * torch.rand(size[1]) + 0.1)
    quantization.quantize_(linear, config)
    assert by_torchao.is_quantized(linear.weight)
    return linear.weight


def converted(weight: Tensor, row_dim: int) -> QuantizedTensor:
    """Of the same values."""
    result = by_torchao.convert(weight, row_dim)
    assert isinstance(result, QuantizedTensor), result
    for name in ("shape", "dtype", "device"):
        assert getattr(result, name) == getattr(weight, name)
    assert result.stride() == weight.stride()
    values = result.dequantize()
    assert type(values) is Tensor and values.dtype == weight.dtype
    assert torch.equal(values, weight.dequantize())
    rows = weight.shape[-1] if row_dim == 1 else weight.shape[-2]
    assert result.packed.shape[-2] == rows and result.stored.row_dim == row_dim
    return result


def intx(bits: int, granularity: Any, mapping: Any, **options: Any) -> Any:
    dtype = getattr(torch, f"int{bits}")
    return quantization.IntxWeightOnlyConfig(
        weight_dtype=dtype, granularity=granularity, mapping_type=mapping, version=2, **options
    )


def int8_configs() -> dict[str, Any]:
    config = quantization.Int8WeightOnlyConfig
    if VERSION < (0, 16):  # version 1 is all there is
        return {"row": config(), "group": config(group_size=32)}
    granularity = pytest.importorskip("torchao.quantization.granularity")
    grains = {
        "row": granularity.PerRow(),
        "group": granularity.PerGroup(32),
        "tensor": granularity.PerTensor(),
    }
    return {name: config(granularity=grain) for name, grain in grains.items()}


@pytest.mark.parametrize("row_dim", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grain", ["row", "group", "tensor"])
def test_int8(grain: str, dtype: torch.dtype, row_dim: int) -> None:
    configs = int8_configs()
    if grain not in configs:
        pytest.skip("this torchao has no such granularity")
    quantised = converted(weight(configs[grain], dtype), row_dim)
    assert quantised.stored.planes == 2 and quantised.zero is None
    assert quantised.scale.dtype == torch.float32
    assert tuple(quantised.scale.shape) == (3 if grain == "group" else 1, 48)


@pytest.mark.parametrize("row_dim", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", [PerAxis(0), PerGroup(32), PerGroup(24)])
@pytest.mark.parametrize("bits", range(1, 9))
def test_intx(bits: int, granularity: Any, dtype: torch.dtype, row_dim: int) -> None:
    for mapping in MappingType:
        if bits == 1 and mapping.name == "SYMMETRIC_NO_CLIPPING_ERR":
            continue  # its scale would be for no positive value: torchao divides by 0
        quantised = converted(weight(intx(bits, granularity, mapping), dtype), row_dim)
        assert quantised.stored.planes == (1 if bits <= 4 else 2)
        if mapping.name == "ASYMMETRIC":
            assert quantised.zero is not None
        elif bits in (2, 3, 4, 7, 8):
            assert quantised.zero is None


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_of_another_dtype(dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    config = intx(8, PerGroup(32), MappingType.ASYMMETRIC, scale_dtype=scale_dtype)
    quantised = weight(config, dtype)
    assert quantised.scale.dtype == scale_dtype
    converted(quantised, 1)


def test_hqq() -> None:
    config = intx(
        4, PerGroup(32), MappingType.SYMMETRIC, intx_choose_qparams_algorithm="hqq_scale_only"
    )
    converted(weight(config), 1)


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_the_high_plane_has_the_upper_bits(bits: int) -> None:
    """Where all 8 are not needed: read at 4 bits, no value is further off than half a step."""
    source = weight(intx(bits, PerAxis(0), MappingType.SYMMETRIC), torch.float32)
    quantised = converted(source, 1)
    stored = quantised.stored
    coarse = fmt.unpack(
        quantised.packed, quantised.scale, quantised.zero, stored.sizes, 1, 2, torch.float32, 4
    )
    step = source.scale * 2 ** (bits - 4)
    assert ((coarse - source.dequantize()).abs() <= 0.5 * step * (1 + 1e-5)).all()


def test_stacks_of_experts() -> None:
    kind = getattr(quantization, "Int8Tensor", None)
    if kind is None:
        pytest.skip("this torchao quantises no stacks")
    torch.manual_seed(0)
    values = torch.randn(3, 40, 64, dtype=torch.bfloat16)
    grains = pytest.importorskip("torchao.quantization.granularity")
    for grain, groups in ((grains.PerRow(), 1), (grains.PerGroup(32), 2)):
        stack = kind.from_hp(values, grain)
        for row_dim in (0, 1):
            quantised = converted(stack, row_dim)
            assert tuple(quantised.scale.shape) == (3, groups, 40)


def test_blocks_of_several_outputs() -> None:
    """Of scales for 4 outputs by 32 inputs, which no configuration makes."""
    kind = quantization.IntxUnpackedToInt8Tensor
    torch.manual_seed(0)
    values = torch.randn(40, 64)
    quantised = kind.from_hp(values, (4, 32), torch.int8, mapping_type=MappingType.ASYMMETRIC)
    for row_dim in (0, 1):
        assert tuple(converted(quantised, row_dim).scale.shape) == (2, 40)


def test_all_integers_and_zero_points() -> None:
    every = torch.arange(-128, 128, dtype=torch.int8)
    q = every.repeat(256, 1)
    scale = torch.rand(256, 1, dtype=torch.bfloat16) + 0.01
    for dtype in DTYPES:
        details = (torch.int8, (1, 256), dtype, None)
        source = quantization.IntxUnpackedToInt8Tensor(q, scale.to(dtype), every[:, None], *details)
        for row_dim in (0, 1):
            converted(source, row_dim)


def replaced(source: Tensor, **changed: Any) -> Tensor:
    names, attributes = source.__tensor_flatten__()
    inner = {name: getattr(source, name) for name in names}
    inner |= {name: value for name, value in changed.items() if name in names}
    attributes = attributes | {n: value for n, value in changed.items() if n in attributes}
    return type(source).__tensor_unflatten__(inner, attributes, None, None)


def reason(source: Any) -> str:
    result = by_torchao.convert(source, 1)
    assert isinstance(result, str) and by_torchao.is_quantized(source)
    kind, _, why = result.partition(": ")
    assert kind == f"its weight is a {type(source).__name__}"
    return why


def test_activations_that_are_quantised_too_are_refused() -> None:
    configs = [
        quantization.Int8DynamicActivationInt8WeightConfig(),
        quantization.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=PerGroup(32), version=2
        ),
    ]
    for config in configs:
        assert "activations" in reason(weight(config))


def test_inputs_that_are_scaled_are_refused() -> None:
    source = weight(int8_configs()["row"])
    if not hasattr(source, "act_pre_scale"):
        pytest.skip("this torchao scales no inputs")
    source.act_pre_scale = torch.ones(96)
    assert "activations" in reason(source)


def test_what_is_no_integer_is_refused() -> None:
    assert reason(weight(quantization.Float8WeightOnlyConfig())) == "its values are no integers"


def test_zero_points_between_integers_are_refused() -> None:
    source = weight(intx(8, PerGroup(32), MappingType.ASYMMETRIC))
    whole = replaced(source, zero_point=source.zero_point.to(torch.bfloat16))
    assert torch.equal(converted(whole, 1).dequantize(), source.dequantize())
    assert "zero points" in reason(replaced(whole, zero_point=whole.zero_point + 0.5))
    assert "zero points" in reason(replaced(whole, zero_point=whole.zero_point + 512))


def test_what_is_malformed_is_refused() -> None:
    source = weight(intx(4, PerGroup(32), MappingType.SYMMETRIC))
    assert "more than 4 bits" in reason(replaced(source, qdata=torch.full_like(source.qdata, 8)))
    cube = quantization.IntxUnpackedToInt8Tensor.from_hp(
        torch.randn(8, 8, 3, 3), (1, 8, 1, 1), torch.int8
    )
    assert "matrices" in reason(cube)
    assert "no values" in reason(replaced(source, qdata=source.qdata.to("meta")))
    # One that a slice has left with another size than its blocks have.
    source.block_size = (1, 36)
    assert "don't divide (48, 96)" in reason(source)


def test_zero_points_that_are_added_are_refused() -> None:
    """The int4 format for CPUs, wherever this torchao has it; no other makes one on a CPU."""
    try:
        from torchao.prototype.quantization.int4 import Int4OpaqueTensor
    except ImportError:
        Int4OpaqueTensor = getattr(quantization, "Int4OpaqueTensor", None)
    if Int4OpaqueTensor is None:
        pytest.skip("this torchao has no int4 format for CPUs")
    opaque = Int4OpaqueTensor.from_hp(torch.randn(64, 64, dtype=torch.bfloat16), [1, 32])
    assert "added after scaling" in reason(opaque)
    plain = torch.zeros(64, 32, dtype=torch.int8), torch.ones(2, 64), torch.zeros(2, 64)
    source = quantization.Int4Tensor(*plain, [1, 32], torch.Size((64, 64)))
    assert "added after scaling" in reason(source)


INT4_ELSEWHERE = "Int4PreshuffledTensor", "Int4PlainInt32Tensor", "Int4TilePackedTo4dTensor"


@pytest.mark.parametrize("name", INT4_ELSEWHERE)
def test_int4_formats_that_no_cpu_makes_are_refused(name: str) -> None:
    """They come from checkpoints; what they hold is not looked at."""
    kind = getattr(quantization, name)
    source = weight(intx(8, PerAxis(0), MappingType.SYMMETRIC))
    source.__class__ = kind
    assert reason(source) == by_torchao._READERS[name]


class Doubled(getattr(quantization, "IntxUnpackedToInt8Tensor")):  # noqa: B009
    """A format of one's own, with other values."""

    def dequantize(self) -> Tensor:
        return 2 * super().dequantize()


def test_a_type_derived_from_a_known_one_is_refused() -> None:
    source = weight(intx(8, PerAxis(0), MappingType.SYMMETRIC))
    source.__class__ = Doubled
    assert reason(source) == "popc doesn't know its format"


def test_other_tensors_are_none_of_torchao() -> None:
    plain = torch.randn(4, 8)
    assert not by_torchao.is_quantized(plain)
    assert not by_torchao.is_quantized(nn.Parameter(plain))
    assert not by_torchao.is_quantized(QuantizedTensor.of(plain, 1, 2))


def test_torchao_is_not_imported() -> None:
    code = "import sys, popc, popc.quant.torchao; assert 'torchao' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

"""QuantizedTensor: what a model, a checkpoint and torch.compile may do with a quantised weight."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from popc.ops import planes as fmt
from popc.quant import QuantizedTensor, Stored

REFUSED = "can't be changed in place"
DTYPES = torch.float32, torch.bfloat16, torch.float16
FORMATS = [(row_dim, planes, apart) for row_dim in (0, 1) for planes in (1, 2) for apart in (0, 1)]


def quantised(
    row_dim: int = 1,
    planes: int = 2,
    apart: bool = False,
    dtype: torch.dtype = torch.float32,
    sizes: tuple[int, ...] = (40, 70),
) -> QuantizedTensor:
    """Random values; ``apart``: with scales and zero points of their own, as torchao has them."""
    torch.manual_seed(0)
    if not apart:
        return QuantizedTensor.of(torch.randn(sizes, dtype=dtype), row_dim, planes)
    u = torch.randint(0, 16**planes, sizes)
    scale, zero = torch.rand(2, *sizes[:-2], 2, sizes[-2]).unbind()
    strides = torch.empty(sizes).stride()
    stored = Stored(sizes, row_dim, planes, dtype, strides)
    return QuantizedTensor(fmt.pack_integers(u, row_dim, planes), scale, 8 * zero, stored)


def same(weight: Any, values: Tensor) -> bool:
    """Whether ``weight`` is quantised and has these values."""
    return isinstance(weight, QuantizedTensor) and torch.equal(weight.dequantize(), values)


class Linear(nn.Module):
    """A linear of a quantised weight."""

    def __init__(self, *format: Any, **how: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(quantised(*format, **how), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def saved(value: Any, weights_only: bool = True) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda weight: pickle.loads(pickle.dumps(weight)),
    "saved": saved,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("format", FORMATS)
def test_copies(format: tuple, how: str) -> None:
    for weight in (quantised(*format), nn.Parameter(quantised(*format), requires_grad=False)):
        result = COPIES[how](weight)
        assert same(result, weight.dequantize()) and result.stored == weight.stored
        assert isinstance(result, nn.Parameter) == isinstance(weight, nn.Parameter)
        assert not result.requires_grad and result.stride() == weight.stride()
        if how != "copy":
            assert result.packed.data_ptr() != weight.packed.data_ptr()


@pytest.mark.parametrize("format", FORMATS)
def test_state_dicts(format: tuple) -> None:
    model, other = Linear(*format), Linear(*format)
    other.weight.packed.fill_(0)
    state = saved(model.state_dict())
    assert same(state["weight"], model.weight.dequantize())
    for assign in (False, True):
        loaded = copy.deepcopy(other)
        packed = loaded.weight.packed
        loaded.load_state_dict(state, assign=assign)
        assert isinstance(loaded.weight, nn.Parameter)
        assert same(loaded.weight, model.weight.dequantize())
        assert (loaded.weight.packed is packed) != assign


def test_a_whole_module_is_saved() -> None:
    model = Linear()
    loaded = saved(model, weights_only=False)
    x = torch.randn(3, 70)
    assert isinstance(loaded.weight, nn.Parameter) and torch.equal(loaded(x), model(x))


def test_plain_weights_are_not_loaded() -> None:
    model = Linear()
    values = model.weight.dequantize()
    with pytest.raises(RuntimeError, match=f"not quantised alike.*{REFUSED}"):
        model.load_state_dict({"weight": torch.randn(40, 70)})
    for other in ((0, 2), (1, 1), (1, 2, True)):
        with pytest.raises(RuntimeError, match=REFUSED):
            model.load_state_dict({"weight": quantised(*other)})
    assert same(model.weight, values)
    plain = nn.Linear(70, 40, bias=False)
    plain.load_state_dict(model.state_dict())
    assert type(plain.weight) is nn.Parameter and torch.equal(plain.weight, values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_casts_read_the_same_integers(format: tuple, dtype: torch.dtype) -> None:
    """In the new dtype, rounded once; the scales stay as they are."""
    exact = quantised(*format).dequantize()
    for cast in (
        quantised(*format).to(dtype),
        quantised(*format, dtype=torch.bfloat16).to(dtype),
        copy.deepcopy(Linear(*format)).to(dtype).weight,
    ):
        assert cast.dtype == cast.dequantize().dtype == dtype
        if format[2]:  # else the bfloat16 model's own scales are of other values
            assert same(cast, exact.to(dtype))
        assert cast.packed.dtype == torch.uint8
    assert torch.equal(quantised(*format).dequantize(output_dtype=dtype), exact.to(dtype))
    assert same(quantised(*format).to(dtype), exact.to(dtype))
    assert quantised().to(torch.float32, copy=True).packed is not None


def test_casts_to_integers_are_of_values() -> None:
    weight = quantised()
    assert torch.equal(weight.to(torch.int32), weight.dequantize().to(torch.int32))


def test_devices() -> None:
    weight = quantised(apart=True)
    meta = weight.to("meta")
    assert isinstance(meta, QuantizedTensor)
    assert {value.device.type for value in (meta, meta.packed, meta.scale, meta.zero)} == {"meta"}
    assert weight.to("cpu") is weight
    model = Linear().to("meta")
    assert isinstance(model.weight, nn.Parameter) and model.weight.packed.is_meta
    assert F.linear(torch.empty(2, 70, device="meta"), model.weight).shape == (2, 40)


def test_memory_that_processes_share() -> None:
    model = Linear(apart=True)
    values = model.weight.dequantize()
    assert not model.weight.is_shared()
    model.share_memory()
    assert model.weight.is_shared() and model.weight.scale.is_shared()
    assert same(model.weight, values)


def test_data() -> None:
    """The idiom by which models are moved and cast."""
    weight = nn.Parameter(quantised(), requires_grad=False)
    exact = weight.dequantize()
    weight.data = weight.data.to(torch.bfloat16)
    assert isinstance(weight, nn.Parameter) and same(weight, exact.bfloat16())
    with pytest.raises(RuntimeError, match=f"plain values are assigned.*{REFUSED}"):
        weight.data = torch.zeros(40, 70, dtype=torch.bfloat16)
    assert same(weight, exact.bfloat16())


def assign(weight: Tensor, index: Any) -> None:
    weight[index] = 0.0


def augment(weight: Tensor) -> None:
    weight += 1


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "add_": lambda weight: weight.add_(1),
    "augmented": augment,
    "data": lambda weight: weight.data.mul_(2),
    "transposed": lambda weight: weight.t().zero_(),
    "fill": lambda weight: weight.fill_(0),
    "copy": lambda weight: weight.copy_(torch.zeros(40, 70)),
    "row": lambda weight: assign(weight, 0),
    "mask": lambda weight: assign(weight, weight > 0),
    "slice": lambda weight: assign(weight.data, slice(1, 3)),
    "init": nn.init.xavier_uniform_,
    "out": lambda weight: torch.add(torch.ones(40, 70), 1, out=weight),
    "many": lambda weight: torch._foreach_mul_([torch.ones(3), weight], 2.0),
    "index": lambda weight: weight.index_fill_(0, torch.tensor([1]), 0),
    "resize": lambda weight: weight.resize_(4, 4),
    "transpose": lambda weight: weight.t_(),
}


@pytest.mark.parametrize("how", WRITES)
def test_writes_are_refused(how: str) -> None:
    weight = quantised()
    values, shape = weight.dequantize(), weight.shape
    with pytest.raises(RuntimeError, match=REFUSED):
        WRITES[how](weight)
    assert same(weight, values) and weight.shape == shape


def test_it_is_read_by_what_writes_elsewhere() -> None:
    weight = quantised()
    assert torch.equal(torch.zeros(40, 70).add_(weight), weight.dequantize())
    assert torch.equal(torch.empty(40, 70).copy_(weight), weight.dequantize())


READS: dict[str, Callable[[Tensor], Tensor]] = {
    "row": lambda w: w[3],
    "slice": lambda w: w[2:5],
    "columns": lambda w: w[:, 5:],
    "rows": lambda w: w[torch.tensor([1, 5])],
    "T": lambda w: w.T,
    "mT": lambda w: w.mT,
    "t": lambda w: w.t(),
    "permute": lambda w: w.permute(1, 0),
    "view": lambda w: w.view(70, 40),
    "reshape": lambda w: w.t().reshape(40, 70),
    "flatten": lambda w: w.flatten(),
    "contiguous": lambda w: w.t().contiguous().view(40, 70),
    "clone": lambda w: w.t().clone(memory_format=torch.contiguous_format).view(-1),
    "chunk": lambda w: w.chunk(2)[1],
    "split": lambda w: w.split(7, 1)[2],
    "unbind": lambda w: w.unbind()[4],
    "expand": lambda w: w.expand(2, 40, 70),
    "cat": lambda w: torch.cat([w, w]),
    "product": lambda w: torch.ones(3, 40) @ w,
    "linear": lambda w: F.linear(torch.ones(2, 70), w),
    "embedding": lambda w: F.embedding(torch.tensor([[3, 1]]), w),
    "norm": lambda w: w.norm(dim=0),
    "where": lambda w: torch.where(w > 0, w, 0.0),
    "zeros": torch.zeros_like,
}


@pytest.mark.parametrize("how", READS)
@pytest.mark.parametrize("format", FORMATS)
def test_whatever_reads_it_has_the_values(format: tuple, how: str) -> None:
    weight = quantised(*format)
    plain = weight.dequantize().contiguous()
    got, expected = READS[how](weight), READS[how](plain)
    assert got.shape == expected.shape and got.dtype == expected.dtype
    values = got.dequantize() if isinstance(got, QuantizedTensor) else got
    if how in ("product", "linear", "norm"):
        torch.testing.assert_close(values, expected)
    else:
        assert torch.equal(values, expected)
    kept = isinstance(got, QuantizedTensor)
    assert kept == (how in ("mT", "t"))


def test_it_is_contiguous_as_it_says() -> None:
    weight = quantised()
    assert weight.is_contiguous() and not weight.t().is_contiguous()
    assert weight.t().contiguous().is_contiguous()
    of_transposed = QuantizedTensor.of(torch.randn(70, 40), 1, 2, transposed=True)
    assert of_transposed.shape == (70, 40) and of_transposed.stored.sizes == (40, 70)
    assert of_transposed.view(-1).shape == (2800,)


def test_gradients_of_inputs() -> None:
    weight = quantised()
    x = torch.randn(3, 70, requires_grad=True)
    F.linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(3, 70))


def test_what_it_says_of_itself() -> None:
    weight = quantised(planes=1, dtype=torch.bfloat16)
    text = "QuantizedTensor(shape=(40, 70), 4 bits, torch.bfloat16, device=cpu)"
    assert repr(weight) == text == f"{nn.Parameter(weight, requires_grad=False)}"


COMPILED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": F.linear,
    "transposed": lambda x, w: x @ w.T,
    "slice": lambda x, w: x @ w[:10].t(),
    "view": lambda x, w: x @ w.view(2, 20, 70).flatten(0, 1).t(),
    "data": lambda x, w: F.linear(x, w.data),
    "cast": lambda x, w: F.linear(x.bfloat16(), w.to(torch.bfloat16)).float(),
}


class Applied(Linear):
    """Something else of the weight."""

    def __init__(self, how: str, *format: Any) -> None:
        super().__init__(*format)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return COMPILED[self.how](x, self.weight)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("how", COMPILED)
def test_plain_torch_compile(how: str, recwarn: pytest.WarningsRecorder) -> None:
    """By Inductor, for scales in rows and apart; the graph is whole, and guards on the format."""
    x = torch.randn(3, 70)
    for format in ((1, 2, False), (0, 1, True)):
        model = Applied(how, *format)
        compiled = torch.compile(model, fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))
            other = nn.Parameter(quantised(*format), requires_grad=False)
            other.packed.copy_(other.packed.flip(0))
            model.weight = other
            torch.testing.assert_close(compiled(x), model(x))
    assert not [each for each in recwarn if "QuantizedTensor" in str(each.message)]

"""What the Triton kernels on quantised weights are tried on, as :mod:`tests.helpers.triton_cases`.

``python -m tests.helpers.triton_plane_cases`` with ``TRITON_INTERPRET=1`` prints a JSON object: for
each case what is wrong, or an empty string. Where there is a GPU, the same without the variable
tries the compiled kernels.

Scales are NaN in rows that no token may read, and around the weight; low nibbles that none may read
are others than the reference has. In the interpreter it is also seen which bytes are loaded.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn.functional import pad

from popc.ops import dequantize, graded_linears, quantize, quantized_linear
from popc.ops import planes as fmt
from tests.helpers.triton_cases import (
    DTYPES,
    EPS,
    INTERPRETED,
    _Launched,
    _mend_interpreter,
    part_among,
)


@dataclass(frozen=True)
class Case:
    """One call of an op: of the linear by grade where it has thresholds, else of the dense one.

    ``groups``: of inputs that share scales which stand apart, 0 where they stand in rows. So many
    bytes as ``before`` says stand before each row.
    """

    lead: tuple[int, ...]
    outputs: int = 53
    inputs: int = 37
    planes: int = 2
    row_dim: int = 1
    thresholds: int = 0
    centered: bool = False
    groups: int = 0
    zero: bool = False
    bias: bool = False
    before: int = 16
    dtype: str = "float32"

    def __str__(self) -> str:
        sizes = f"{'x'.join(map(str, self.lead))} {self.outputs}x{self.inputs}"
        weight = f"planes={self.planes} row_dim={self.row_dim} before={self.before}"
        groups = f" groups={self.groups}{' zero' if self.zero else ''}" if self.groups else ""
        limits = f" thresholds={self.thresholds}" if self.thresholds else ""
        limits += " centered" if self.centered else ""
        return f"{sizes} {weight}{groups}{' bias' if self.bias else ''} {self.dtype}{limits}"


# Rows of an odd number of blocks, of an even one, of a multiple of 8, without a tail; one value.
SIZES = ((53, 37), (70, 45), (256, 256), (250, 61), (64, 300), (1, 1))
GROUPS = ((0, False), (1, False), (2, True))


def _graded() -> Iterator[Case]:
    turn = itertools.count()
    for lead, planes, (groups, zero) in itertools.product(((1, 1), (3, 1), (2, 4)), (2, 1), GROUPS):
        for _ in range(2):
            i = next(turn)
            outputs, inputs = SIZES[i % 5]
            yield Case(
                lead,
                outputs,
                inputs,
                planes,
                thresholds=lead[0] if i % 2 else 1,
                centered=i % 4 > 1,
                groups=groups,
                zero=zero,
                bias=i % 3 == 0,
                before=(16, 2, 6)[i % 3],
                dtype=DTYPES[(i + i // 6) % 3],
            )
    for dtype in DTYPES:
        # In 4 parts, and in 2.
        yield Case((1, 1), 70, 550, thresholds=1, centered=True, bias=True, dtype=dtype)
        yield Case((2, 1), 70, 2100, thresholds=2, centered=True, bias=True, dtype=dtype)
    # No batch dim; more tokens than a tile has; one value; nothing at all.
    yield Case((), thresholds=1, centered=True)
    yield Case((), planes=1, thresholds=1)
    yield Case((20, 1), thresholds=20, centered=True)
    yield Case((3, 7), thresholds=3, centered=True, dtype="bfloat16")
    yield Case((1, 1), *SIZES[-1], thresholds=1)
    yield Case((0, 1), thresholds=1, centered=True)


def _dense() -> Iterator[Case]:
    turn = itertools.count()
    # 20 tokens are too many: the weight's values are written.
    for lead, planes, row_dim, (groups, zero) in itertools.product(
        ((1, 1), (8, 1), (20, 1)), (2, 1), (0, 1), GROUPS
    ):
        i = next(turn)
        outputs, inputs = SIZES[i % 5]
        yield Case(
            lead,
            outputs,
            inputs,
            planes,
            row_dim,
            groups=groups,
            zero=zero,
            bias=i % 2 == 0,
            before=(16, 2, 6)[i % 3],
            dtype=DTYPES[(i + i // 6) % 3],
        )
    for row_dim in (0, 1):
        yield Case((1, 1), 70, 550, row_dim=row_dim, dtype="bfloat16")
        yield Case((4, 1), 70, 2100, row_dim=row_dim, bias=True, dtype="bfloat16")
        # Groups that blocks of inputs keep to.
        yield Case((1, 1), 70, 1024, row_dim=row_dim, groups=1, zero=True)
        yield Case((2, 1), 70, 1024, planes=1, row_dim=row_dim, groups=2, dtype="float16")
        yield Case((), row_dim=row_dim)
        yield Case((1, 1), *SIZES[-1], row_dim=row_dim)
        yield Case((0, 1), row_dim=row_dim)


CASES = list(dict.fromkeys([*_graded(), *_dense()]))

Weight = tuple[Tensor, Tensor | None, Tensor | None]


def _weight(case: Case) -> Weight:
    if case.groups == 0:
        return (
            quantize(torch.randn(case.outputs, case.inputs), case.row_dim, case.planes),
            None,
            None,
        )
    most = 16**case.planes
    u = torch.randint(most, (case.outputs, case.inputs))
    scale = (torch.rand(case.groups, case.outputs) + 0.5) * 4 / most
    zero = most / 2 + torch.randint(-2, 3, (case.groups, case.outputs)) if case.zero else None
    return fmt.pack_integers(u, case.row_dim, case.planes), scale, zero


def _stored(packed: Tensor, case: Case) -> Tensor:
    """Rows with bytes between them that are NaN as scales."""
    sides = case.before, 16 + case.before % 4, 1, 1
    around = pad(packed, sides, value=255)
    return around[1:-1, case.before : case.before + packed.shape[1]]


def _spoiled(packed: Tensor, case: Case, high: Tensor, low: Tensor) -> Tensor:
    """Channel-major rows, of which it shows or does not matter that what is not to be read is."""
    blocks = fmt.blocks_of(case.outputs)
    packed = packed.clone()
    if case.groups == 0:
        packed[~high, : 2 * blocks] = 255
    if case.planes == 2:
        packed[~low, -16 * blocks :] ^= 255
    return packed


def _parts(case: Case) -> dict[str, Any]:
    """Norms, thresholds, centers and bases as parts of what a graph holds."""
    center = base = None
    if case.centered:
        center = torch.randn(case.thresholds, case.inputs) / 2
        base = torch.randn(case.thresholds, case.outputs)
    limits = torch.rand(case.thresholds) + 0.3
    return {
        "norm": part_among(torch.rand(case.inputs) + 0.7, 3),
        "low_norm": part_among(torch.rand(case.inputs) * 0.6 + 0.1, 3),
        "threshold": part_among(limits, 1),
        "center": part_among(center, 3),
        "base": part_among(base, 5),
    }


def _reads(x: Tensor, parts: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """What counts of x ``[T, K]``, and of which channels a plane, and the low one, is read."""
    batch = x.shape[0] if x.dim() > 1 else 1
    rows = (
        x.double().reshape(batch, -1, x.shape[-1])
        if x.numel()
        else x.double().view(0, 1, x.shape[-1])
    )
    if parts["center"] is not None:
        rows = rows - parts["center"].double()[:, None]
    limit = parts["threshold"].view(-1, 1, 1)
    high, low = (rows.float().abs() * parts[name] > limit for name in ("norm", "low_norm"))
    rows = rows * high
    return rows.flatten(0, 1), high.flatten(0, 1).any(0), (high & low).flatten(0, 1).any(0)


def check(case: Case, graded: Callable[..., Tensor], dense: Callable[..., Tensor]) -> str:
    """What is wrong with the answer to ``case``; nothing: an empty string."""
    torch.manual_seed(len(str(case)))
    x = torch.randn(*case.lead, case.inputs).to(getattr(torch, case.dtype))
    bias = torch.randn(case.outputs).to(x.dtype) if case.bias else None
    packed, scale, zero = _weight(case)
    values = dequantize(
        packed, scale, zero, (case.outputs, case.inputs), case.row_dim, case.planes, torch.float64
    )
    if case.thresholds == 0:
        rest = bias, case.outputs, case.row_dim, case.planes
        expected = quantized_linear(x.double(), packed, scale, zero, *rest)
        size = x.double().abs() @ values.abs().T
        op = lambda x, packed: dense(x, packed, scale, zero, *rest)  # noqa: E731
        seen = packed
    else:
        parts = _parts(case)
        listed = [scale], [zero], [case.outputs], [case.planes], [bias]
        expected = graded_linears(x.double(), [packed], *listed, **parts)
        expected = expected.view(*case.lead, case.outputs)
        rows, high, low = _reads(x, parts)
        if rows.shape[0] > 0 and case.inputs > 1 and not (high.any() and (~low).any()):
            return "a case in which all is read, or nothing"
        size = (rows.abs() @ values.abs().T).view(expected.shape)
        size += 0 if parts["base"] is None else parts["base"].abs().max()
        rest = case.outputs, case.planes, bias
        op = lambda x, packed: graded(x, packed, scale, zero, *rest, *parts.values())  # noqa: E731
        seen = _spoiled(packed, case, high, low)
    stored = _stored(seen, case)
    with _Loads() if INTERPRETED else nullcontext() as loads:
        y = op(x, stored)
    if loads is not None:
        loaded = loads.of(stored)
        if case.thresholds and x.numel() and (wrong := _excess(loaded, case, high, low)):
            return wrong
    if y.shape != (*case.lead, case.outputs) or y.dtype != x.dtype:
        return f"{y.dtype} {tuple(y.shape)}"
    if y.isnan().any():
        return f"{int(y.isnan().sum())} NaN of {y.numel()}"
    # Weights, and what is left of x, are rounded where there are several tokens.
    rounded = 1e-5 + (0 if y.numel() == case.outputs else EPS[case.dtype])
    error = (y.double() - expected).abs() - EPS[case.dtype] * expected.abs() - rounded * size
    if (error > 0).any():
        return f"off by {float(error.max()):.2e}"
    return _hides_nan(op, x, _stored(packed, case)) if x.numel() else ""


class _Loads:
    """While it is open, which bytes kernels load, as the interpreter has them do it."""

    def __init__(self) -> None:
        self.addresses: list[numpy.ndarray] = []

    def __enter__(self) -> _Loads:
        from triton.runtime.interpreter import InterpreterBuilder

        self.load = load = InterpreterBuilder.create_masked_load

        def create_masked_load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            first = pointers.data[mask.data].astype(numpy.int64)
            size = pointers.get_element_ty().primitive_bitwidth // 8
            self.addresses.append((first[:, None] + numpy.arange(size)).ravel())
            return load(builder, pointers, mask, *rest)

        InterpreterBuilder.create_masked_load = create_masked_load
        return self

    def __exit__(self, *raised: object) -> None:
        from triton.runtime.interpreter import InterpreterBuilder

        InterpreterBuilder.create_masked_load = self.load

    def of(self, rows: Tensor) -> Tensor:
        """Bool, like ``rows``, uint8: what of them was loaded; around them nothing may have been.

        Raises:
            ValueError: bytes between rows were, or others of the same storage.
        """
        storage = rows.untyped_storage()
        at = numpy.concatenate([*self.addresses, numpy.zeros(0, numpy.int64)]) - storage.data_ptr()
        loaded = torch.zeros(storage.nbytes(), dtype=torch.bool)
        loaded[torch.from_numpy(at[(at >= 0) & (at < storage.nbytes())])] = True
        view = loaded.as_strided(rows.shape, rows.stride(), rows.storage_offset())
        if view.sum() != loaded.sum():
            raise ValueError("bytes around rows are loaded")
        return view


def _excess(loaded: Tensor, case: Case, high: Tensor, low: Tensor) -> str:
    """What of the rows was loaded and should not have been, or should and was not."""
    blocks = fmt.blocks_of(case.outputs)
    size = fmt.PLANE_BYTES * blocks
    head = loaded.shape[1] - case.planes * size
    parts = [(loaded[:, :head], high), (loaded[:, head : head + size], high)]
    parts += [(loaded[:, head + size :], low)] if case.planes == 2 else []
    for part, read in parts:
        if not torch.equal(part, read[:, None].expand_as(part)):
            return f"loaded {int(part.sum())} bytes for {int(read.sum())} channels"
    return ""


def _hides_nan(op: Callable[[Tensor, Tensor], Tensor], x: Tensor, packed: Tensor) -> str:
    x = x.clone()
    x.view(-1, x.shape[-1])[0, 0] = float("nan")
    y = op(x, packed)
    y = y.reshape(-1, y.shape[-1])
    shows = y[0].isnan().all() and y[1:].isfinite().all()
    return "" if shows else "a NaN is hidden, or met another token"


def _run(launch: Callable[..., Tensor], kernels: tuple[Any, ...], args: Any) -> Tensor:
    if not INTERPRETED:
        args = [a.cuda() if isinstance(a, Tensor) else a for a in args]
    return launch(*kernels, *args).cpu()


def main() -> None:
    from popc.ops import triton_planes
    from popc.ops.triton_plane_kernels import by_input, by_output, values_kernel

    if INTERPRETED:
        _mend_interpreter()
    wrong = {}
    for turn, case in enumerate(CASES):
        rows, columns = _Launched(by_input, turn), _Launched(by_output, turn)
        try:
            wrong[str(case)] = check(
                case,
                lambda *args, k=(rows,): _run(triton_planes.launch_graded, k, args),
                lambda *args, k=(rows, columns, values_kernel): _run(
                    triton_planes.launch_quantized, k, args
                ),
            )
        except Exception as error:
            wrong[str(case)] = f"{type(error).__name__}: {error}"
    json.dump(wrong, sys.stdout)


if __name__ == "__main__":
    main()

"""What the Triton kernels are tried on, and their trial in Triton's interpreter, on the CPU.

``python -m tests.helpers.triton_cases`` with ``TRITON_INTERPRET=1``, which must be set before a
kernel is defined, prints a JSON object: for each case what is wrong, or an empty string. Where
there is a GPU, the same without the variable tries the compiled kernels.

What no list names holds NaN wherever nothing may read it, and so does the memory around a weight:
one value read in excess would show in the answer.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn.functional import pad

# How far the dtype rounds, and half of it for the answer; float32 sums stay below 1e-5.
EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}
DTYPES = tuple(EPS)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Case:
    """One call of an op; the counts of rows and columns listed are None for all."""

    lead: tuple[int, ...]
    outputs: int = 53
    inputs: int = 37
    rows: int | None = None
    columns: int | None = None
    per_token: bool = False
    out_dim: int = 0
    along_k: bool = True
    bias: bool = False
    dtype: str = "float32"
    # Experts: how many, and which of them are used in full.
    experts: int = 0
    full: tuple[int, ...] = ()
    flags: str = "int64"
    # Thresholds: how many, one or one for each sequence; 0 for the other ops.
    thresholds: int = 0
    centered: bool = False

    def __str__(self) -> str:
        lists = f"rows={self.rows} columns={self.columns}{' token' if self.per_token else ''}"
        sizes = f"{'x'.join(map(str, self.lead))} {self.outputs}x{self.inputs}"
        weight = f"out_dim={self.out_dim} along {'K' if self.along_k else 'N'}"
        experts = f" experts={self.experts} full={self.full} {self.flags}" if self.experts else ""
        bias = " bias" if self.bias else ""
        limits = f" thresholds={self.thresholds}" if self.thresholds else ""
        limits += " centered" if self.centered else ""
        return f"{sizes} {lists} {weight}{bias} {self.dtype}{experts}{limits}"


LISTS = ((None, None), (7, None), (None, 5), (7, 5))


def _linears() -> Iterator[Case]:
    # Each dtype and a bias meet every list form, layout and batch in turn, not all at once.
    turn = itertools.count()
    for batch, (rows, columns), (out_dim, along_k), per_token in itertools.product(
        (1, 3, 16, 20), LISTS, ((0, True), (0, False), (1, True), (1, False)), (False, True)
    ):
        both = rows is not None and columns is not None
        if per_token and ((rows is None and columns is None) or (batch > 3 and not both)):
            continue
        i = next(turn)
        yield Case(
            (batch, 1),
            rows=rows,
            columns=columns,
            per_token=per_token,
            out_dim=out_dim,
            along_k=along_k,
            bias=i % 2 == 0,
            dtype=DTYPES[i % 3],
        )
    for dtype in DTYPES:
        # Long enough for the contraction to be split, in 4 parts, in 2, and with rows as well.
        yield Case((1, 1), 70, 600, columns=300, along_k=False, bias=True, dtype=dtype)
        yield Case((3, 1), 70, 1100, columns=1030, along_k=False, bias=True, dtype=dtype)
        yield Case((2, 1), 70, 300, columns=200, per_token=True, along_k=False, dtype=dtype)
        yield Case((1,), 70, 300, rows=20, columns=200, along_k=False, bias=True, dtype=dtype)
        yield Case((1, 1), 70, 1100, rows=65, dtype=dtype)
    # No batch dim; several tokens of a sequence; one channel, or none; the smallest weight.
    yield Case((), rows=7)
    yield Case((2, 3), rows=7, columns=5, per_token=True, bias=True)
    yield Case((2, 9, 2), columns=5, per_token=True, along_k=False)
    yield Case((3, 1), rows=1, columns=1, bias=True)
    yield Case((3, 1), rows=1, along_k=False)
    yield Case((3, 1), rows=0, bias=True)
    yield Case((3, 1), columns=0, bias=True)
    yield Case((3, 1), columns=0, bias=True, along_k=False)
    yield Case((3, 1), 1, 1)
    yield Case((0, 1), rows=7)
    yield Case((0, 1), rows=7, per_token=True)


def _experts() -> Iterator[Case]:
    turn = itertools.count()
    for (rows, columns), (out_dim, along_k, full) in itertools.product(
        LISTS,
        (
            (0, True, (1,)),
            (0, False, (1,)),
            (1, True, (0, 2)),
            (1, False, ()),
            (0, False, (0, 1, 2, 3)),
        ),
    ):
        i = next(turn)
        yield Case(
            (4,),
            rows=rows,
            columns=columns,
            out_dim=out_dim,
            along_k=along_k,
            dtype=DTYPES[i % 3],
            experts=4,
            full=full,
            flags="bool" if i % 2 else "int64",
        )
    yield Case((5,), 70, 300, columns=200, along_k=False, experts=4, full=(2,))
    yield Case((5,), 70, 300, rows=20, columns=200, along_k=False, experts=4, full=(2,))
    yield Case((1,), rows=0, experts=2, full=(1,))
    yield Case((0,), rows=7, columns=5, experts=4)


def _thresholds() -> Iterator[Case]:
    turn = itertools.count()
    layouts = ((0, True), (0, False), (1, True), (1, False))
    for lead, (out_dim, along_k), per_token in itertools.product(
        ((1, 1), (3, 1), (20, 1), (2, 3)), layouts, (False, True)
    ):
        i = next(turn)
        yield Case(
            lead,
            out_dim=out_dim,
            along_k=along_k,
            bias=i % 2 == 0,
            dtype=DTYPES[i % 3],
            thresholds=lead[0] if per_token else 1,
            centered=i % 4 > 1,
        )
    for dtype in DTYPES:
        yield Case((1, 1), 70, 600, along_k=False, bias=True, dtype=dtype, thresholds=1)
        yield Case((3, 1), 70, 1100, along_k=False, dtype=dtype, thresholds=3, centered=True)
        yield Case((1, 1), 70, 600, along_k=False, dtype=dtype, thresholds=1, centered=True)
    yield Case((), thresholds=1)
    yield Case((), thresholds=1, centered=True)
    yield Case((0, 1), thresholds=1, centered=True)


# The last case of two repeats the first where a batch of one has one threshold either way.
CASES = list(dict.fromkeys([*_linears(), *_experts(), *_thresholds()]))


def _lists(count: int | None, size: int, many: int | None) -> Tensor | None:
    """``count`` of ``size`` channels, in no order: one list, or ``many``."""
    if count is None:
        return None
    lists = [torch.randperm(size)[:count] for _ in range(1 if many is None else many)]
    if many is None:
        return lists[0]
    return torch.stack(lists) if lists else torch.zeros((0, count), dtype=torch.int64)


def _kept(index: Tensor | None, size: int, many: int) -> Tensor:
    """True for each listed channel, ``[many, size]``."""
    if index is None:
        return torch.ones(many, size, dtype=torch.bool)
    kept = torch.zeros(many, size, dtype=torch.bool)
    return kept.scatter_(1, index.expand(many, index.shape[-1]), True)


def _stored(weight: Tensor, case: Case) -> Tensor:
    """``weight [..., N, K]`` with ``case``'s strides, in the midst of NaN."""
    stored = weight if case.along_k else weight.mT
    around = stored.new_full((*stored.shape[:-2], stored.shape[-2] + 2, stored.shape[-1] + 3), 0)
    around.fill_(float("nan"))
    inner = around[..., 1:-1, 1:-2]
    inner.copy_(stored)
    inner = inner if case.along_k else inner.mT
    return inner if case.out_dim == 0 else inner.mT


def check(case: Case, linear: Callable[..., Tensor], experts: Callable[..., Tensor]) -> str:
    """What is wrong with the answer to ``case``; nothing: an empty string."""
    torch.manual_seed(len(str(case)))
    dtype = getattr(torch, case.dtype)
    count = case.lead[0] if case.lead else 1
    x = torch.randn(*case.lead, case.inputs).to(dtype)
    weight = torch.randn(max(1, case.experts), case.outputs, case.inputs).to(dtype)
    bias = torch.randn(case.outputs).to(dtype) if case.bias else None
    per_row = case.experts or (count if case.per_token else None)
    rows = _lists(case.rows, case.outputs, per_row)
    columns = _lists(case.columns, case.inputs, count if case.experts or case.per_token else None)
    whole = torch.tensor([e in case.full for e in range(case.experts)], dtype=torch.bool)
    expert = torch.randint(case.experts, (count,)) if case.experts else torch.zeros(count).long()

    # Of each group of tokens: its expert, what is listed; then the same in dense algebra.
    keep_rows = _kept(rows, case.outputs, case.experts or count)
    keep_columns = _kept(columns, case.inputs, count)
    if case.experts:
        keep_rows = (keep_rows | whole[:, None])[expert]
        keep_columns = keep_columns | whole[expert][:, None]
    tokens = x.reshape(count, -1, case.inputs) if x.numel() else x.new_empty(0, 1, case.inputs)
    read = torch.zeros(max(1, case.experts), case.outputs, case.inputs, dtype=torch.bool)
    expected = torch.zeros(count, tokens.shape[1], case.outputs, dtype=torch.float64)
    size = torch.zeros_like(expected)
    for s, e in enumerate(expert.tolist()):
        mask = keep_rows[s][:, None] & keep_columns[s][None, :]
        read[e] |= mask
        used = weight[e].double() * mask
        expected[s] = tokens[s].double() @ used.T
        size[s] = tokens[s].double().abs() @ used.T.abs()
        if bias is not None:
            expected[s] += bias.double() * keep_rows[s]
            size[s] += bias.double().abs() * keep_rows[s]

    nan = float("nan")
    stored = _stored(weight.masked_fill(~read, nan), case)
    unread = ~keep_columns[:, None, :].expand_as(tokens)
    x = tokens.masked_fill(unread, nan).reshape(x.shape)
    if bias is not None:
        bias = bias.masked_fill(~keep_rows.any(0), nan)
    if case.experts:
        flags = whole.to(getattr(torch, case.flags))
        y = experts(x, stored, expert, flags, rows, columns, case.out_dim)
    else:
        y = linear(x, stored[0], bias, rows, columns, case.out_dim)

    if y.shape != (*case.lead, case.outputs) or y.dtype != dtype:
        return f"{y.dtype} {tuple(y.shape)}"
    y = y.reshape(expected.shape).double()
    if y.isnan().any():
        return f"{int(y.isnan().sum())} NaN of {y.numel()}"
    silent = ~keep_rows[:, None, :].expand_as(y)
    if y[silent].count_nonzero():
        return "an output that is not listed is not 0"
    error = (y - expected).abs() - EPS[case.dtype] * expected.abs() - 1e-5 * size
    return f"off by {float(error.max()):.2e}" if (error > 0).any() else ""


def part_among(values: Tensor | None, before: int, after: int = 2) -> Tensor | None:
    """``values`` as parts of longer rows, from ``before`` on; NaN stand around."""
    if values is None:
        return None
    longer = pad(values, (before, after), value=float("nan"))
    return longer.narrow(-1, before, values.shape[-1])


def check_threshold(case: Case, op: Callable[..., Tensor]) -> str:
    """As :func:`check`, where values of x say what is read; one row of x holds a NaN."""
    torch.manual_seed(len(str(case)))
    dtype = getattr(torch, case.dtype)
    x = torch.randn(*case.lead, case.inputs).to(dtype)
    weight = torch.randn(case.outputs, case.inputs).to(dtype)
    bias = torch.randn(case.outputs).to(dtype) if case.bias else None
    norm = torch.rand(case.inputs) + 0.5
    limits = torch.rand(case.thresholds) + 0.3
    center = base = None
    moved, added = x.float(), torch.zeros(case.outputs)
    if case.centered:
        center = torch.randn(case.thresholds, case.inputs) / 2
        base = torch.randn(case.thresholds, case.outputs)
        moved, added = moved - _spread(center, x), _spread(base, x)
    if bias is not None:
        added = added + bias.float()
    scores = moved.abs() * norm
    kept = scores > limits.view(-1, *([1] * (x.dim() - 1))) if x.dim() > 1 else scores > limits
    tokens = (moved.double() * kept).reshape(-1, case.inputs)
    added = added.expand(*case.lead, case.outputs).reshape(-1, case.outputs).double()
    expected = tokens @ weight.double().T + added
    size = tokens.abs() @ weight.double().abs().T + added.abs()
    # What is left of x when its center is taken from it may be rounded.
    rounded = 1e-5 + (EPS[case.dtype] if case.centered else 0)
    unread = ~kept.reshape(-1, case.inputs).any(0)
    if tokens.shape[0] > 0 and unread.all():
        return "a case in which nothing is read"
    stored = _stored(weight.masked_fill(unread, float("nan")), case)
    # As parts of what a graph holds.
    norm, center, base = part_among(norm, 3), part_among(center, 3), part_among(base, 5)
    rest = bias, norm, part_among(limits, 1), case.out_dim, center, base
    y = op(x, stored, *rest)
    if y.shape != (*case.lead, case.outputs) or y.dtype != dtype:
        return f"{y.dtype} {tuple(y.shape)}"
    y = y.reshape(expected.shape).double()
    if y.isnan().any():
        return f"{int(y.isnan().sum())} NaN of {y.numel()}"
    error = (y - expected).abs() - EPS[case.dtype] * expected.abs() - rounded * size
    if (error > 0).any():
        return f"off by {float(error.max()):.2e}"
    if x.numel() == 0:
        return ""
    spoiled = x.clone()
    spoiled.view(-1, case.inputs)[0, 0] = float("nan")
    stored = _stored(weight, case)
    again = op(spoiled, stored, *rest)
    again = again.reshape(expected.shape)
    shows = again[0].isnan().all() and again[1:].isfinite().all()
    return "" if shows else "a NaN is hidden, or met another token"


def _spread(values: Tensor, x: Tensor) -> Tensor:
    """``values [S, K]`` as they go with ``x [B, ..., K]``, or with a single token."""
    return values.view(-1, *([1] * (x.dim() - 2)), values.shape[-1]) if x.dim() > 1 else values[0]


class _Launched:
    """A kernel with one of its configs, untuned: so all of them get their turn."""

    def __init__(self, tuned: Any, turn: int) -> None:
        self.kernel = tuned.fn
        self.blocks = tuned.configs[turn % len(tuned.configs)].all_kwargs()

    def __getitem__(self, grid: Callable[[dict[str, Any]], tuple[int, ...]]) -> Callable[..., None]:
        return lambda *args, **kwargs: self.kernel[grid](*args, **kwargs, **self.blocks)


def _run(launch: Callable[..., Tensor], kernels: Sequence[_Launched], args: Any) -> Tensor:
    """The answer, computed on the GPU if this is not the interpreter."""
    if not INTERPRETED:
        args = [a.cuda() if isinstance(a, Tensor) else a for a in args]
    return launch(*kernels, *args).cpu()


def _mend_interpreter() -> None:
    """The interpreter's dot multiplies the bits of bfloat16 as integers: widen them before."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        bits = operand.data.astype(numpy.uint32) << 16
        return TensorHandle(bits.view(numpy.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    InterpreterBuilder.create_dot = create_dot


def main() -> None:
    from popc.ops import triton_gather
    from popc.ops.triton_kernels import gather_columns, gather_rows

    if INTERPRETED:
        _mend_interpreter()
    wrong = {}
    for turn, case in enumerate(CASES):
        kernels = (_Launched(gather_rows, turn), _Launched(gather_columns, turn))
        try:
            if case.thresholds:
                wrong[str(case)] = check_threshold(
                    case, lambda *args, k=kernels: _run(triton_gather.launch_threshold, k, args)
                )
                continue
            wrong[str(case)] = check(
                case,
                lambda *args, k=kernels: _run(triton_gather.launch_linear, k, args),
                lambda *args, k=kernels: _run(triton_gather.launch_experts, k, args),
            )
        except Exception as error:
            wrong[str(case)] = f"{type(error).__name__}: {error}"
    json.dump(wrong, sys.stdout)


if __name__ == "__main__":
    main()

"""The Triton kernel of both gather ops, under the two tilings that weights call for.

A program owns BLOCK_N outputs of one group of tokens, takes every SPLITS-th block of BLOCK_K inputs
and accumulates in float32. The tile of W is always ``[BLOCK_K, BLOCK_N]``; which of its sides
is contiguous in memory follows from the strides, so one body serves both layouts, and what differs
are the block sizes worth trying:

- ``gather_rows``: a weight contiguous along K. Few outputs, long runs of inputs.
- ``gather_columns``: a weight contiguous along N. Wide runs of outputs, few inputs, split over K.

Inductor copies a kernel's source into its own files, where annotations are evaluated: so none but
``tl.constexpr``, and no ``from __future__ import annotations``.
"""

# mypy: allow-untyped-defs

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]


@triton.jit
def gather_kernel(
    x,
    weight,
    bias,
    rows,
    columns,
    expert,
    full,
    norm,
    threshold,
    center,
    base,
    y,
    tokens,
    outputs,  # N and K, and how many of them are listed
    inputs,
    listed_rows,
    listed_columns,
    x_group,  # strides, in elements; those of y for its last dim, and of lists, are 1
    x_token,
    x_input,
    weight_expert,
    weight_output,
    weight_input,
    rows_list,
    columns_list,
    threshold_group,
    center_group,
    base_group,
    y_split,
    y_group,
    y_token,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of y, or of its split's part of it; what is None is compiled out."""
    group = tl.program_id(2).to(tl.int64)
    split = tl.program_id(1) % SPLITS
    token = tl.program_id(1) // SPLITS * BLOCK_M + tl.arange(0, BLOCK_M)
    at_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = listed_rows
    k = listed_columns
    rows_of = group
    if expert is not None:
        rows_of = tl.load(expert + group).to(tl.int64)
        whole = tl.load(full + rows_of) != 0
        n = tl.where(whole, outputs, n)
        k = tl.where(whole, inputs, k)
        weight += rows_of * weight_expert
    # int64 from here on: a stack of experts has more than 2^31 elements.
    in_n = at_n < n
    output = at_n.to(tl.int64)
    if rows is not None:
        named = tl.load(rows + rows_of * rows_list + at_n, mask=at_n < listed_rows, other=0)
        if expert is not None:
            named = tl.where(whole, output, named)
        output = named
    in_m = token < tokens
    x += group * x_group
    if norm is not None:
        limit = tl.load(threshold + group * threshold_group)
    if BLOCK_M == 1:
        # Summed along K once, after the loop: a sum in it would cross threads each time.
        total = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        x_rows = x + token.to(tl.int64)[:, None] * x_token
    # Past n the loop is empty: an early return would hide from Inductor what is written.
    stop = tl.where(tl.program_id(0) * BLOCK_N < n, k, 0)
    for start in range(split * BLOCK_K, stop, SPLITS * BLOCK_K):
        at_k = start + tl.arange(0, BLOCK_K)
        in_k = at_k < k
        input_ = at_k.to(tl.int64)
        if columns is not None:
            named_k = tl.load(
                columns + group * columns_list + at_k, mask=at_k < listed_columns, other=0
            )
            if expert is not None:
                named_k = tl.where(whole, input_, named_k)
            input_ = named_k
        if BLOCK_M == 1:
            v = tl.load(x + input_ * x_input, mask=in_k, other=0.0)
        else:
            v = tl.load(
                x_rows + input_[None, :] * x_input, mask=in_m[:, None] & in_k[None, :], other=0.0
            )
        if center is not None:
            middle = tl.load(center + group * center_group + input_, mask=in_k, other=0.0)
            if BLOCK_M == 1:
                v = v.to(tl.float32) - middle
            else:
                # Rows past the last token stay 0, lest they ask for channels.
                v = tl.where(in_m[:, None], v.to(tl.float32) - middle[None, :], 0.0)
        if norm is not None:
            scale = tl.load(norm + input_, mask=in_k, other=0.0)
            # Not "above": a NaN counts, and shows in y.
            if BLOCK_M == 1:
                below = tl.abs(v.to(tl.float32)) * scale <= limit
                in_k = in_k & (below == 0)
            else:
                below = tl.abs(v.to(tl.float32)) * scale[None, :] <= limit
                in_k = in_k & (tl.min(below.to(tl.int32), 0) == 0)
            v = tl.where(below, 0.0, v)
        w = tl.load(
            weight + input_[:, None] * weight_input + output[None, :] * weight_output,
            mask=in_k[:, None] & in_n[None, :],
            other=0.0,
        )
        if BLOCK_M == 1:
            total += v.to(tl.float32)[:, None] * w.to(tl.float32)
        else:
            total = tl.dot(v.to(w.dtype), w, total, input_precision="ieee")
    if BLOCK_M == 1:
        total = tl.sum(total, 0)[None, :]
    if bias is not None:
        b = tl.load(bias + output, mask=in_n, other=0.0).to(tl.float32)
        total += tl.where(split == 0, b, 0.0)[None, :]
    if base is not None:
        b = tl.load(base + group * base_group + output, mask=in_n, other=0.0)
        total += tl.where(split == 0, b, 0.0)[None, :]
    y += split.to(tl.int64) * y_split + group * y_group
    tl.store(
        y + token.to(tl.int64)[:, None] * y_token + output[None, :],
        total.to(y.dtype.element_ty),
        mask=in_m[:, None] & in_n[None, :],
    )


def _configs(blocks):
    return [
        triton.Config({"BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
        for n, k, warps, stages in blocks
    ]


# What a tiling is chosen by; dtypes count by themselves.
_KEY = ["listed_rows", "listed_columns", "SPLITS", "BLOCK_M"]

gather_rows = triton.autotune(
    _configs(
        [
            (16, 128, 4, 4),
            (16, 256, 4, 3),
            (16, 512, 8, 2),
            (32, 64, 4, 4),
            (32, 128, 4, 3),
            (32, 256, 8, 2),
            (64, 64, 4, 3),
        ]
    ),
    key=_KEY,
)(gather_kernel)

gather_columns = triton.autotune(
    _configs(
        [
            (64, 32, 4, 4),
            (64, 64, 4, 3),
            (128, 16, 4, 4),
            (128, 32, 4, 3),
            (128, 64, 8, 2),
            (256, 16, 4, 3),
            (256, 32, 8, 3),
        ]
    ),
    key=_KEY,
)(gather_kernel)

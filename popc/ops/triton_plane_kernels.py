"""The Triton kernels on quantised weights; popc.ops.planes says how these are stored.

A program loads words of 4 or 2 bytes from rows of a weight and takes them apart into nibbles,
``[rows, words, nibbles of a word]``. A tile keeps the order in which they come; ``_value_of`` says
which value of a row each is, for what goes with it. What is the same along a dim has size 1 there.

- ``by_input``: a row is an input channel. A program owns BLOCK_N outputs of BLOCK_M tokens, takes
  every SPLITS-th block of BLOCK_K channels, and loads of each plane what at least one of its tokens
  reads: all where no norm is given.
- ``by_output``: a row is an output channel, and all of it is read.
- ``values``: no product, but the values themselves.

Sums are in float32. For a single token factors are too; for more, tensor cores take them in the
dtype of x. On annotations see :mod:`popc.ops.triton_kernels`, which has the kernels of other ops.
"""

# mypy: allow-untyped-defs

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

from popc.ops import planes

MIDPOINT = tl.constexpr(planes.MIDPOINT)


@triton.jit
def _value_of(position, WORD: tl.constexpr):
    """Which value of a row a nibble is, by its position: a block has 16 bytes, 4 dwords."""
    byte = position // (2 * WORD) * WORD
    nibble = byte % 4 * 2 + position % (2 * WORD)
    return byte // 16 * 32 + nibble * 4 + byte % 16 // 4


@triton.jit
def _nibbles(words, mask, WORD: tl.constexpr):
    """float32 ``[R, W, 2·WORD]`` of words ``[R, W]``; 0 where they are masked."""
    word = tl.load(words, mask=mask, other=0).to(tl.int32)
    shift = 4 * tl.arange(0, 2 * WORD)
    nibble = (tl.reshape(word, (word.shape[0], word.shape[1], 1)) >> shift[None, None, :]) & 15
    # The float 2^23 + n ends in n's bits: integers are converted at a fraction of this rate.
    return (nibble | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _group_values(values, group, output, inputs, outputs, GROUP: tl.constexpr, WORD: tl.constexpr):
    """``values[group, output]``, ``[R, V]``, as ``[R, W, 2·WORD]``; ``[R, 1]`` as ``[R, 1, 1]``."""
    known = (group * GROUP < inputs) & (output < outputs)
    loaded = tl.load(values + group * outputs + output, mask=known, other=0.0)
    if loaded.shape[1] == 1:
        return loaded[:, :, None]
    else:
        return tl.reshape(loaded, (loaded.shape[0], loaded.shape[1] // (2 * WORD), 2 * WORD))


@triton.jit
def _tile(weight, where, form, GRADED: tl.constexpr):
    """Steps and values of a tile of a weight, and graded what the low plane adds to the high one's.

    Args:
        where: rows ``[R, 1]``; words ``[1, W]``; groups and outputs, which together are ``[R, V]``
            or less; of which rows ``[R]`` the high and the low plane are read.
    """
    packed, scale, zero, inputs, outputs, length, row_units = weight
    row, at, group, output, high, low = where
    GROUP: tl.constexpr = form[0]
    UNIT: tl.constexpr = form[3]
    WORD: tl.constexpr = min(UNIT, 4)
    blocks = (length + 31) // 32
    in_row = at < blocks * (16 // WORD)
    # Written so that the compiler sees what UNIT divides.
    words = packed.to(tl.pointer_type(tl.int32 if WORD == 4 else tl.int16))
    words += row.to(tl.int64) * (row_units * (UNIT // WORD)) + at
    if scale is None:
        words += 2 * blocks // UNIT * (UNIT // WORD)
        steps = packed.to(tl.pointer_type(tl.bfloat16))
        steps += row.to(tl.int64) * (row_units * (UNIT // 2)) + at // (16 // WORD)
        step = tl.load(steps, mask=high[:, None] & in_row, other=0.0).to(tl.float32)
        step = tl.reshape(step, (step.shape[0], step.shape[1], 1))
    else:
        step = _group_values(scale, group, output, inputs, outputs, GROUP, WORD)
    offset = form[2]
    if zero is not None:
        offset = _group_values(zero, group, output, inputs, outputs, GROUP, WORD)
    value = _nibbles(words, high[:, None] & in_row, WORD)
    if form[1] == 1:
        return step, value - offset, value
    else:
        more = _nibbles(words + blocks * (16 // WORD), low[:, None] & in_row, WORD)
        if GRADED:
            return step, 16 * value + (MIDPOINT - offset), more - MIDPOINT
        else:
            return step, 16 * value + (more - offset), more


@triton.jit
def _limit(threshold, at, mask):
    """The threshold of each token, ``[M, 1]``."""
    if threshold is None:
        return 0.0
    else:
        return tl.load(threshold + at, mask=mask, other=0.0)


@triton.jit
def _any(flags):
    """In which columns of ``[M, K]`` a flag is set."""
    if flags.shape[0] == 1:
        return tl.reshape(flags, (flags.shape[1],))
    else:
        return tl.max(flags.to(tl.int32), 0) > 0


@triton.jit
def _graded(x, norm, low_norm, limit, center, channel, mask):
    """x of channels ``[1, K]``, ``[M, K]``, and the same for low planes: 0 where none is read.

    Then of which channels ``[K]`` a plane is read, and of which the low one too.
    """
    known = _any(mask)
    v = tl.load(x + channel, mask=mask, other=0.0).to(tl.float32)
    if norm is None:
        return v, v, known, known
    else:
        if center is not None:
            v = tl.where(mask, v - tl.load(center + channel, mask=mask, other=0.0), 0.0)
        size = tl.abs(v)
        # Not "above": a NaN is read, and shows in y.
        unread = size * tl.load(norm + channel, mask=known[None, :], other=0.0) <= limit
        v = tl.where(unread, 0.0, v)
        unread = size * tl.load(low_norm + channel, mask=known[None, :], other=0.0) <= limit
        low_v = tl.where(unread, 0.0, v)
        return v, low_v, _any(v != 0), _any(low_v != 0)


@triton.jit
def _zeros(BLOCK_M: tl.constexpr, R: tl.constexpr, W: tl.constexpr, NIBBLES: tl.constexpr, V):
    """What products are added to: for several tokens ``[M, V]``.

    For one it is like the tile of a weight, and summed once, in the end: a sum at each step would
    cross threads.
    """
    if BLOCK_M == 1:
        return tl.zeros((R, W, NIBBLES), tl.float32)
    else:
        return tl.zeros((BLOCK_M, V), tl.float32)


@triton.jit
def _accumulate(total, v, step, value, DTYPE: tl.constexpr):
    """``total`` plus ``v [M, R]`` times a tile."""
    R: tl.constexpr = value.shape[0]
    if v.shape[0] == 1:
        return total + (tl.reshape(v, (R,))[:, None, None] * step) * value
    else:
        tile = tl.reshape(step * value, (R, value.shape[1] * value.shape[2]))
        return tl.dot(v.to(DTYPE), tile.to(DTYPE), total, input_precision="ieee")


@triton.jit
def _store(y, total, bias, base, token, output, split, tokens, outputs):
    """A tile of y ``[SPLITS, tokens, outputs]``; the first split adds bias and base."""
    in_n = (output < outputs)[None, :]
    mask = (token < tokens)[:, None] & in_n
    if bias is not None:
        b = tl.load(bias + output[None, :], mask=in_n, other=0.0).to(tl.float32)
        total += tl.where(split == 0, b, 0.0)
    if base is not None:
        total += tl.where(split == 0, tl.load(base + output[None, :], mask=mask, other=0.0), 0.0)
    row = (tl.cast(split, tl.int64) * tokens + token)[:, None] * outputs
    tl.store(y + row + output[None, :], total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def by_input_kernel(
    x,  # [tokens, inputs], strides (x_token, 1)
    packed,
    scale,  # contiguous, as zero
    zero,
    bias,
    norm,
    low_norm,
    threshold,
    center,
    base,
    y,  # [SPLITS, tokens, outputs], contiguous
    tokens,
    inputs,
    outputs,
    per_sequence,  # tokens of each sequence
    x_token,
    row_units,  # the stride of rows, in units of UNIT bytes
    threshold_sequence,  # strides: 0 where sequences share
    center_sequence,
    base_sequence,
    GROUP: tl.constexpr,  # inputs that share scales
    PLANES: tl.constexpr,
    ZERO: tl.constexpr,
    UNIT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of y, or of its split's part of it; what is None is compiled out."""
    WORD: tl.constexpr = min(UNIT, 4)
    W: tl.constexpr = BLOCK_N // (2 * WORD)
    split = tl.program_id(1) % SPLITS
    token = tl.program_id(1) // SPLITS * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = (token < tokens)[:, None]
    sequence = (token // per_sequence).to(tl.int64)[:, None]
    x += token.to(tl.int64)[:, None] * x_token
    if center is not None:
        center += sequence * center_sequence
    limit = _limit(threshold, sequence * threshold_sequence, in_m)
    at = (tl.program_id(0) * W + tl.arange(0, W))[None, :]
    output = tl.program_id(0) * BLOCK_N + _value_of(tl.arange(0, BLOCK_N), WORD)
    weight = packed, scale, zero, inputs, outputs, outputs, row_units
    total = _zeros(BLOCK_M, BLOCK_K, W, 2 * WORD, BLOCK_N)
    for start in range(split * BLOCK_K, inputs, SPLITS * BLOCK_K):
        channel = start + tl.arange(0, BLOCK_K)
        mask = in_m & (channel < inputs)[None, :]
        v, low_v, high, low = _graded(x, norm, low_norm, limit, center, channel[None, :], mask)
        grouped = channel[:, None] if GROUP % BLOCK_K else start + tl.zeros((1, 1), tl.int32)
        where = channel[:, None], at, grouped // GROUP, output[None, :], high, low
        step, value, more = _tile(weight, where, (GROUP, PLANES, ZERO, UNIT), norm is not None)
        total = _accumulate(total, v, step, value, x.dtype.element_ty)
        if PLANES == 2 and norm is not None:
            total = _accumulate(total, low_v, step, more, x.dtype.element_ty)
    if BLOCK_M == 1:
        total = tl.reshape(tl.sum(total, 0), (1, BLOCK_N))
    if base is not None:
        base += sequence * base_sequence
    _store(y, total, bias, base, token, output, split, tokens, outputs)


@triton.jit
def by_output_kernel(
    x,  # as above, and what follows
    packed,
    scale,
    zero,
    bias,
    y,
    tokens,
    inputs,
    outputs,
    x_token,
    row_units,
    GROUP: tl.constexpr,
    PLANES: tl.constexpr,
    ZERO: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of y ``[tokens, outputs]``."""
    WORD: tl.constexpr = min(UNIT, 4)
    W: tl.constexpr = BLOCK_K // (2 * WORD)
    token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    x += token.to(tl.int64)[:, None] * x_token
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = output < outputs
    weight = packed, scale, zero, inputs, outputs, inputs, row_units
    total = _zeros(BLOCK_M, BLOCK_N, W, 2 * WORD, BLOCK_N)
    for start in range(0, inputs, BLOCK_K):
        input_ = start + _value_of(tl.arange(0, BLOCK_K), WORD)
        mask = (token < tokens)[:, None] & (input_ < inputs)[None, :]
        v = tl.load(x + input_[None, :], mask=mask, other=0.0)
        at = (start // (2 * WORD) + tl.arange(0, W))[None, :]
        grouped = input_[None, :] if GROUP % BLOCK_K else start + tl.zeros((1, 1), tl.int32)
        where = output[:, None], at, grouped // GROUP, output[:, None], in_n, in_n
        step, value, _ = _tile(weight, where, (GROUP, PLANES, ZERO, UNIT), False)
        if BLOCK_M == 1:
            total += (tl.reshape(v.to(tl.float32), (1, W, 2 * WORD)) * step) * value
        else:
            w = tl.trans(tl.reshape(step * value, (BLOCK_N, BLOCK_K))).to(v.dtype)
            total = tl.dot(v, w, total, input_precision="ieee")
    if BLOCK_M == 1:
        total = tl.sum(tl.sum(total, 2), 1)[None, :]
    _store(y, total, bias, None, token, output, 0, tokens, outputs)


@triton.jit
def values_kernel(
    packed,
    scale,
    zero,
    y,  # [rows, length], contiguous
    rows,
    inputs,
    outputs,
    row_units,
    GROUP: tl.constexpr,
    BY_INPUT: tl.constexpr,  # whether rows are input channels
    PLANES: tl.constexpr,
    ZERO: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """BLOCK_V values of BLOCK_R rows."""
    WORD: tl.constexpr = min(UNIT, 4)
    W: tl.constexpr = BLOCK_V // (2 * WORD)
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    value_at = tl.program_id(1) * BLOCK_V + _value_of(tl.arange(0, BLOCK_V), WORD)
    at = (tl.program_id(1) * W + tl.arange(0, W))[None, :]
    length = outputs if BY_INPUT else inputs
    known = row < rows
    group = (row // GROUP)[:, None] if BY_INPUT else (value_at // GROUP)[None, :]
    output = value_at[None, :] if BY_INPUT else row[:, None]
    where = row[:, None], at, group, output, known, known
    weight = packed, scale, zero, inputs, outputs, length, row_units
    step, value, _ = _tile(weight, where, (GROUP, PLANES, ZERO, UNIT), False)
    made = tl.reshape(step * value, (BLOCK_R, BLOCK_V)).to(y.dtype.element_ty)
    mask = known[:, None] & (value_at < length)[None, :]
    tl.store(y + row[:, None] * length + value_at[None, :], made, mask=mask)


def _configs(blocks):
    return [
        triton.Config({"BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
        for n, k, warps, stages in blocks
    ]


# What a tiling is chosen by; dtypes count by themselves, and so do constants of the format.
_KEY = ["inputs", "outputs", "BLOCK_M", "PLANES", "UNIT"]

by_input = triton.autotune(
    _configs(
        [
            (256, 32, 4, 3),
            (128, 32, 4, 3),
            (128, 64, 4, 3),
            (256, 16, 4, 4),
            (256, 64, 8, 2),
            (512, 16, 4, 3),
            (512, 32, 8, 2),
        ]
    ),
    key=[*_KEY, "SPLITS"],
)(by_input_kernel)

by_output = triton.autotune(
    _configs(
        [
            (16, 256, 4, 3),
            (16, 512, 4, 2),
            (16, 1024, 8, 2),
            (32, 128, 4, 3),
            (32, 256, 4, 2),
            (64, 128, 4, 2),
        ]
    ),
    key=_KEY,
)(by_output_kernel)

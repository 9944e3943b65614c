"""Device helpers that read a compressed weight: both of its encodings, eight neighbouring columns at a time.

They come in two steps, so that a loop can fetch for its next turn before it uses what it has: ``fetch``
loads what is found without looking at the weight, ``columns`` makes of it eight tensors (ROWS, GROUPS),
the columns 8 g, 8 g + 1, ... of every row.
"""

import triton
import triton.language as tl

from ._bitmap_ptx import EIGHT


@triton.jit
def as_pointer(ptr, DTYPE: tl.constexpr):
    """The address ``ptr`` as one of numbers of another type."""
    return ptr.to(tl.pointer_type(DTYPE), bitcast=True)


@triton.jit
def half_word(word, shift: tl.constexpr, DTYPE: tl.constexpr):
    """The 16 bits of an integer from bit ``shift`` on, as a number of DTYPE."""
    return (word >> shift).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def _popcount(bits):
    """How many bits of an int32 are set; compilers know the pattern, and have an instruction for it."""
    bits = bits.to(tl.uint32, bitcast=True)
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return ((bits * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _unknown_one():
    """1, in a way that keeps the compiler from laying tensors out for loads along the wrong dimension."""
    return 1 + (tl.program_id(0) >> 31)


@triton.jit
def _bitmap_fetch(
    mask_ptr, offset_ptr, start_ptr, origin, tiles_k, row, k, ROWS: tl.constexpr, GROUPS: tl.constexpr
):
    """The 64 bits of a row of a tile, and where its values start after ``origin``."""
    group = tl.arange(0, GROUPS)
    tile_k = k // 64 + group // 8
    tile = (row // 64) * tiles_k + tile_k
    inside = tile_k < tiles_k
    line = tile[None, :] * 64 + (row % 64 + tl.arange(0, ROWS) * _unknown_one())[:, None]
    bits = tl.load(as_pointer(mask_ptr, tl.int64) + line, mask=inside[None, :], other=0)
    offset = tl.load(offset_ptr + line, mask=inside[None, :], other=0)
    start = (tl.load(start_ptr + tile, mask=inside, other=0) - origin).to(tl.int32)
    return bits, start[None, :] + offset


@triton.jit
def _bitmap_eights(bits, at, GROUPS: tl.constexpr):
    """The bits of every eight columns, and where the first of their values is."""
    lane = tl.arange(0, GROUPS) % 8
    below = (1 << (lane % 4 * 8)) - 1
    low, high = bits.to(tl.int32), (bits >> 32).to(tl.int32)
    at += _popcount(low & tl.where(lane < 4, below, -1)[None, :])
    at += _popcount(high & tl.where(lane < 4, 0, below)[None, :])
    return tl.where((lane < 4)[None, :], low, high) >> (lane % 4 * 8)[None, :], at


@triton.jit
def _bitmap_columns(values_ptr, bits, at, PTX: tl.constexpr, DTYPE: tl.constexpr, GROUPS: tl.constexpr):
    eight, at = _bitmap_eights(bits, at, GROUPS)
    if PTX:
        w0, w1, w2, w3, w4, w5, w6, w7 = tl.inline_asm_elementwise(
            EIGHT,
            "=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,r,r,l",
            [at * 2, eight, values_ptr.to(tl.int64)],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True,
            pack=1,
        )
        w0, w1 = w0.to(DTYPE, bitcast=True), w1.to(DTYPE, bitcast=True)
        w2, w3 = w2.to(DTYPE, bitcast=True), w3.to(DTYPE, bitcast=True)
        w4, w5 = w4.to(DTYPE, bitcast=True), w5.to(DTYPE, bitcast=True)
        w6, w7 = w6.to(DTYPE, bitcast=True), w7.to(DTYPE, bitcast=True)
        return w0, w1, w2, w3, w4, w5, w6, w7
    w0 = tl.load(values_ptr + at, mask=(eight & 1) != 0, other=0.0)
    at += eight & 1
    w1 = tl.load(values_ptr + at, mask=(eight & 2) != 0, other=0.0)
    at += (eight >> 1) & 1
    w2 = tl.load(values_ptr + at, mask=(eight & 4) != 0, other=0.0)
    at += (eight >> 2) & 1
    w3 = tl.load(values_ptr + at, mask=(eight & 8) != 0, other=0.0)
    at += (eight >> 3) & 1
    w4 = tl.load(values_ptr + at, mask=(eight & 16) != 0, other=0.0)
    at += (eight >> 4) & 1
    w5 = tl.load(values_ptr + at, mask=(eight & 32) != 0, other=0.0)
    at += (eight >> 5) & 1
    w6 = tl.load(values_ptr + at, mask=(eight & 64) != 0, other=0.0)
    at += (eight >> 6) & 1
    w7 = tl.load(values_ptr + at, mask=(eight & 128) != 0, other=0.0)
    return w0, w1, w2, w3, w4, w5, w6, w7


@triton.jit
def _two_four_fetch(
    values_ptr, index_ptr, N, groups, row, k,
    PAIRED: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The four values of eight columns if they make 64 bits, else where they are; and their places."""
    offs_row = row + tl.arange(0, ROWS)
    group = (k // 8 + tl.arange(0, GROUPS)) * _unknown_one()
    inside = (offs_row < N)[:, None] & (group < groups)[None, :]
    at = offs_row[:, None].to(tl.int64) * groups + group[None, :]
    code = tl.load(as_pointer(index_ptr, tl.int8) + at, mask=inside, other=0).to(tl.int32)
    if PAIRED:
        four = tl.load(as_pointer(values_ptr, tl.int64) + at, mask=inside, other=0)
    else:
        four = tl.where(inside, at * 4, -1)
    return four, code


@triton.jit
def _spread(v0, v1, code):
    """Four columns of two values, of which the lowest bits of ``code`` give the places."""
    first, second, zero = code & 3, (code >> 2) & 3, tl.zeros_like(v0)
    w0 = tl.where(first == 0, v0, zero)
    w1 = tl.where(first == 1, v0, tl.where(second == 1, v1, zero))
    w2 = tl.where(first == 2, v0, tl.where(second == 2, v1, zero))
    return w0, w1, w2, tl.where(second == 3, v1, zero)


@triton.jit
def _two_four_columns(values_ptr, four, code, PAIRED: tl.constexpr, DTYPE: tl.constexpr):
    if PAIRED:
        v0, v1 = half_word(four, 0, DTYPE), half_word(four, 16, DTYPE)
        v2, v3 = half_word(four, 32, DTYPE), half_word(four, 48, DTYPE)
    else:
        v0 = tl.load(values_ptr + four, mask=four >= 0, other=0.0)
        v1 = tl.load(values_ptr + four + 1, mask=four >= 0, other=0.0)
        v2 = tl.load(values_ptr + four + 2, mask=four >= 0, other=0.0)
        v3 = tl.load(values_ptr + four + 3, mask=four >= 0, other=0.0)
    w0, w1, w2, w3 = _spread(v0, v1, code)
    w4, w5, w6, w7 = _spread(v2, v3, code >> 4)
    return w0, w1, w2, w3, w4, w5, w6, w7


@triton.jit
def first_value(start_ptr, across, row, TWO_FOUR: tl.constexpr):
    """Where the values of a row of tiles start, so that 32 bits say where any of them is; for ``fetch``."""
    if TWO_FOUR:
        return tl.full((), 0, tl.int64)
    return tl.load(start_ptr + (row // 64) * across).to(tl.int64)


@triton.jit
def fetch(
    values_ptr, bits_ptr, offset_ptr, start_ptr, origin, N, across, row, k,
    TWO_FOUR: tl.constexpr, PAIRED: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """What ``columns`` wants of rows ``row`` on and columns ``k`` on, GROUPS eights of them.

    ``across``: tiles along K, or of a 2:4 weight eights of columns. ROWS divides 64 and ``row``; GROUPS is a
    multiple of 8, and 64 divides ``k``. What lies outside of the weight comes out as zeros. PAIRED says that
    the values of a 2:4 weight have 16 bits.
    """
    if TWO_FOUR:
        first, second = _two_four_fetch(values_ptr, bits_ptr, N, across, row, k, PAIRED, ROWS, GROUPS)
    else:
        first, second = _bitmap_fetch(bits_ptr, offset_ptr, start_ptr, origin, across, row, k, ROWS, GROUPS)
    return first, second


@triton.jit
def columns(
    values_ptr, first, second,
    TWO_FOUR: tl.constexpr, PAIRED: tl.constexpr, PTX: tl.constexpr, DTYPE: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Eight tensors (ROWS, GROUPS) of what ``fetch`` returned."""
    if TWO_FOUR:
        w0, w1, w2, w3, w4, w5, w6, w7 = _two_four_columns(values_ptr, first, second, PAIRED, DTYPE)
    else:
        w0, w1, w2, w3, w4, w5, w6, w7 = _bitmap_columns(values_ptr, first, second, PTX, DTYPE, GROUPS)
    return w0, w1, w2, w3, w4, w5, w6, w7


@triton.jit
def add_products(
    acc, values_ptr, first, second, x0, x1, x2, x3, x4, x5, x6, x7,
    TWO_FOUR: tl.constexpr, PAIRED: tl.constexpr, PTX: tl.constexpr, DTYPE: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """``acc``, (ROWS, GROUPS), plus the products of the eight columns with ``x0``, ..., each (GROUPS,)."""
    TYPE: tl.constexpr = acc.dtype
    x0, x1, x2, x3 = x0.to(TYPE)[None, :], x1.to(TYPE)[None, :], x2.to(TYPE)[None, :], x3.to(TYPE)[None, :]
    x4, x5, x6, x7 = x4.to(TYPE)[None, :], x5.to(TYPE)[None, :], x6.to(TYPE)[None, :], x7.to(TYPE)[None, :]
    w0, w1, w2, w3, w4, w5, w6, w7 = columns(values_ptr, first, second, TWO_FOUR, PAIRED, PTX, DTYPE, GROUPS)
    acc += w0.to(TYPE) * x0
    acc += w1.to(TYPE) * x1
    acc += w2.to(TYPE) * x2
    acc += w3.to(TYPE) * x3
    acc += w4.to(TYPE) * x4
    acc += w5.to(TYPE) * x5
    acc += w6.to(TYPE) * x6
    acc += w7.to(TYPE) * x7
    return acc


@triton.jit
def columns_tile(
    values_ptr, first, second,
    TWO_FOUR: tl.constexpr, PAIRED: tl.constexpr, PTX: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The same as one tile, (ROWS, 8 GROUPS)."""
    w0, w1, w2, w3, w4, w5, w6, w7 = columns(values_ptr, first, second, TWO_FOUR, PAIRED, PTX, DTYPE, GROUPS)
    # the last join is the fastest index, and takes the odd columns second
    even = tl.join(tl.join(w0, w4), tl.join(w2, w6))
    odd = tl.join(tl.join(w1, w5), tl.join(w3, w7))
    return tl.reshape(tl.join(even, odd), (ROWS, 8 * GROUPS))

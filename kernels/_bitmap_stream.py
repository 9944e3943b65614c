"""Few tokens through a 16-bit weight kept as a bitmap: sixteen neighbouring columns a lane, read ahead."""

from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from ._bitmap_step_ptx import PLACE_SIXTEEN, PLACE_TYPES, WORDS_INSIDE, WORDS_OF_EIGHT, WORDS_TYPES
from ._gluon import gl, gluon
from ._stream_kernel import _along, _finish, _operand

__all__ = ["bitmap_stream_kernel"]


@gluon.jit
def _popcount(bits):
    return gl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [bits], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _quarter(like):
    """Which of the four lanes of a row this is; not as the layout tells it, for its registers to end here."""
    code: gl.constexpr = "mov.u32 $0, %laneid; and.b32 $0, $0, 3;"
    return gl.inline_asm_elementwise(code, "=r,r", [like], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _fetch(pointers, tile, across, LANES: gl.constexpr, WARPS: gl.constexpr):
    """A row's two words, the index of its values in a tile and that of the tile's; (WARPS, ROWS, 4)."""
    bits_ptrs, offset_ptrs, start_ptrs = pointers
    there = _along(0, WARPS, LANES) + tile < across
    inside = there & (_along(1, bits_ptrs.shape[1], LANES) >= 0) & (_along(2, 4, LANES) >= 0)
    bits = gl.load(bits_ptrs + tile * 64, mask=inside, other=0)
    offset = gl.load(offset_ptrs + tile * 64, mask=inside, other=0)
    return bits, offset, gl.load(start_ptrs + tile, mask=there, other=0)


@gluon.jit
def _values(
    fetched, quarter, tile, across, size, base, origin, limit,
    INSIDE: gl.constexpr, LANES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """A lane's word and, around the middles of its two eights, six words and where that middle is, less 4."""
    bits, offset, start = fetched
    there = _along(0, WARPS, LANES) + tile < across
    # past the last tile this is past every value
    start = gl.where(there, (start - origin).to(gl.int32), 1 << 30)
    low, high = bits.to(gl.int32), (bits >> 32).to(gl.int32)
    second = quarter >= 2
    word, at = gl.where(second, high, low), start + offset + _popcount(gl.where(second, low, 0))
    CODE: gl.constexpr = WORDS_INSIDE if INSIDE else WORDS_OF_EIGHT
    guard = there.to(gl.int32) if INSIDE else limit
    below = (1 << (16 * (quarter % 2) + 4)) - 1
    e = gl.inline_asm_elementwise(
        CODE, WORDS_TYPES, [word, below, at, size, guard, base],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32), is_pure=False, pack=1,
    )  # fmt: skip
    f = gl.inline_asm_elementwise(
        CODE, WORDS_TYPES, [word, below * 256 + 255, at, size, guard, base],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32), is_pure=False, pack=1,
    )  # fmt: skip
    return word, e, f


@gluon.jit
def _issued(ones):
    """Return ``ones``; what the source loads before this stays before it, far ahead of its use."""
    return gl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; mov.b32 $0, $1;", "=r,r", [ones], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _multiply(values, quarter, x, acc, ones, DTYPE: gl.constexpr):
    """Add the product of a tile, once its values are in their places."""
    word, e, f = values
    p0, p1, p2, p3, q0, q1, q2, q3 = gl.inline_asm_elementwise(
        PLACE_SIXTEEN, PLACE_TYPES,
        [
            word, 16 * (quarter % 2), ones, e[0], e[1], e[2], e[3], e[4], e[5], e[6],
            f[0], f[1], f[2], f[3], f[4], f[5], f[6],
        ],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=True, pack=1,
    )  # fmt: skip
    w = _operand(p0, p1, p2, p3, q0, q1, q2, q3, DTYPE, gl.DotOperandLayout(0, acc.type.layout, 8))
    return mma_v2(w, x, acc)


@gluon.jit
def _products(
    x_ptr, bits_ptr, offset_ptr, start_ptr, base, origin, limit, M, K, across, row, stride_xm, stride_xk,
    size, ones, INSIDE: gl.constexpr, AHEAD: gl.constexpr, DTYPE: gl.constexpr, BLOCK_M: gl.constexpr,
    ROWS: gl.constexpr, LANES: gl.constexpr, MMA: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Each warp's sum over its blocks of 64 columns, (WARPS, ROWS, BLOCK_M)."""
    X_LAYOUT: gl.constexpr = gl.DotOperandLayout(1, MMA, 8)
    number = (row // 64).to(gl.int64) * across + _along(0, WARPS, LANES)
    line = number * 64 + row % 64 + _along(1, ROWS, LANES).to(gl.int64) + 0 * _along(2, 4, LANES)
    quarter = _quarter(line.to(gl.int32))
    bits_ptrs = bits_ptr.to(gl.pointer_type(gl.int64), bitcast=True) + line
    pointers = (bits_ptrs, offset_ptr + line, start_ptr + number)
    m, kk = _along(2, BLOCK_M, X_LAYOUT), _along(1, 64, X_LAYOUT)
    # a lane's sixteen neighbours are eight columns of either half of the product
    kk = kk // 8 % 4 * 16 + kk // 32 * 8 + kk % 8 + 64 * _along(0, WARPS, X_LAYOUT)
    # past the last token its numbers come once more: what they make is not stored
    x_ptrs = x_ptr + gl.minimum(m, M - 1).to(gl.int64) * stride_xm + kk.to(gl.int64) * stride_xk
    kk += 0 * m
    acc = gl.zeros((WARPS, ROWS, BLOCK_M), gl.float32, MMA)
    fetched = _fetch(pointers, 0, across, LANES, WARPS)
    if AHEAD:
        # two blocks a turn, so that no register which is still being loaded has to be copied
        even = _values(fetched, quarter, 0, across, size, base, origin, limit, INSIDE, LANES, WARPS)
        fetched = _fetch(pointers, WARPS, across, LANES, WARPS)
        for tile in range(0, across, 2 * WARPS):
            odd = _values(
                fetched, quarter, tile + WARPS, across, size, base, origin, limit, INSIDE, LANES, WARPS
            )
            ones = _issued(ones)
            fetched = _fetch(pointers, tile + 2 * WARPS, across, LANES, WARPS)
            x = gl.load(x_ptrs, mask=kk < K - tile * 64, other=0.0)
            acc = _multiply(even, quarter, x, acc, ones, DTYPE)
            even = _values(
                fetched, quarter, tile + 2 * WARPS, across, size, base, origin, limit, INSIDE, LANES, WARPS
            )
            ones = _issued(ones)
            fetched = _fetch(pointers, tile + 3 * WARPS, across, LANES, WARPS)
            x_ptrs += 64 * WARPS * stride_xk
            x = gl.load(x_ptrs, mask=kk < K - (tile + WARPS) * 64, other=0.0)
            x_ptrs += 64 * WARPS * stride_xk
            acc = _multiply(odd, quarter, x, acc, ones, DTYPE)
    else:
        for tile in range(0, across, WARPS):
            values = _values(fetched, quarter, tile, across, size, base, origin, limit, INSIDE, LANES, WARPS)
            fetched = _fetch(pointers, tile + WARPS, across, LANES, WARPS)
            x = gl.load(x_ptrs, mask=kk < K - tile * 64, other=0.0)
            x_ptrs += 64 * WARPS * stride_xk
            acc = _multiply(values, quarter, x, acc, ones, DTYPE)
    return acc


@gluon.jit
def bitmap_stream_kernel(
    x_ptr, values_ptr, bits_ptr, offset_ptr, start_ptr, h_ptr, b_ptr, bias_ptr, y_ptr,
    M, N, K, R, across, stride_xm, stride_xk, stride_hm, stride_hr, stride_bn, stride_br, stride_bias,
    size, ones, AHEAD: gl.constexpr, OVERLAP: gl.constexpr, DTYPE: gl.constexpr,
    HAS_UPDATE: gl.constexpr, HAS_BIAS: gl.constexpr,
    BLOCK_M: gl.constexpr, ROWS: gl.constexpr, LANES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """y[m, n] = sum_k x[m, k] w[n, k]  +  sum_r h[m, r] b[n, r]  +  bias[n], at most BLOCK_M tokens

    Tensors   x (M, K)  w packed, of 16 bits  h (M, R)  b (N, R)  bias (N,); y (M, N) contiguous.
    Program   as ``two_four_stream_kernel``'s. AHEAD: a block's values are on their way while the block before
              is decoded, its bits one block earlier.
    Numerics  products as the tensor cores', sums in float32, one rounding, at the store.
    Traffic   the compressed weight once, x once per block of features (from L2).
    Requires  ROWS a multiple of 16 that divides 64; BLOCK_M a multiple of 8; size 2, the bytes of a value;
              ones two of them in float16.
    """
    WARPS: gl.constexpr = num_warps
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    row = gl.program_id(0) * ROWS
    # loads are of whole 8 bytes; the index of a value counts from the 8 bytes before the first of these rows,
    # if there are any, so that none is loaded where an index is below zero
    values = values_ptr.to(gl.int64)
    origin = gl.load(start_ptr + (row // 64) * across).to(gl.int64)
    base = gl.maximum((values + 2 * origin) // 8 * 8 - 8, values // 8 * 8)
    # past the values of these rows and far enough from both ends nothing needs to be looked at
    after = gl.load(start_ptr + (row // 64 + 1) * across).to(gl.int64)
    end = gl.load(start_ptr + gl.cdiv(N, 64) * across).to(gl.int64)
    inside = (origin >= 8) & (after + 8 <= end)
    origin = (base - values) // 2
    limit = gl.minimum(end - origin, 1 << 29).to(gl.int32)
    # the middle's index less 4 is that of the first value which may be needed
    origin = (origin + 4).to(start_ptr.dtype.element_ty)
    if inside:
        acc = _products(
            x_ptr, bits_ptr, offset_ptr, start_ptr, base, origin, limit, M, K, across, row, stride_xm,
            stride_xk, size, ones, True, AHEAD, DTYPE, BLOCK_M, ROWS, LANES, MMA, WARPS,
        )  # fmt: skip
    else:
        acc = _products(
            x_ptr, bits_ptr, offset_ptr, start_ptr, base, origin, limit, M, K, across, row, stride_xm,
            stride_xk, size, ones, False, AHEAD, DTYPE, BLOCK_M, ROWS, LANES, MMA, WARPS,
        )  # fmt: skip
    _finish(
        acc, h_ptr, b_ptr, bias_ptr, y_ptr, M, N, R, row,
        stride_hm, stride_hr, stride_bn, stride_br, stride_bias,
        DTYPE, HAS_UPDATE, HAS_BIAS, BLOCK_M, ROWS, MMA, WARPS, OVERLAP,
    )  # fmt: skip

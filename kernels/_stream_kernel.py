"""Few tokens through a 2:4 weight of 16 bits: decoded in the registers that tensor cores read it from."""

from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_wait

from ._gluon import gl, gluon
from ._stream_ptx import LOAD_FOUR, TWO_FOUR_PAIRS, TWO_FOUR_TYPES

__all__ = ["two_four_stream_kernel"]


@gluon.jit
def _along(axis: gl.constexpr, SIZE: gl.constexpr, LAYOUT: gl.constexpr):
    """0, 1, ... along an axis of a tensor of three."""
    if axis == 0:
        return gl.arange(0, SIZE, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    elif axis == 1:
        return gl.arange(0, SIZE, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    else:
        return gl.arange(0, SIZE, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]


@gluon.jit
def _two_four_fetch(
    values_ptr, bits_ptr, N, across, row, tile, ROWS: gl.constexpr, LANES: gl.constexpr, WARPS: gl.constexpr
):
    """The codes of sixteen columns and their eight values in four words; (WARPS, ROWS, 4)."""
    number = (tile + _along(0, WARPS, LANES)) * 4 + _along(2, 4, LANES)
    offs = row + _along(1, ROWS, LANES)
    inside = (offs < N) & (number * 2 < across)
    at = offs.to(gl.int64) * (across // 2) + number
    code = gl.load(bits_ptr + at, mask=inside, other=0).to(gl.int32)
    v0, v1, v2, v3 = gl.inline_asm_elementwise(
        LOAD_FOUR, "=&r,=&r,=&r,=&r,l,r", [values_ptr.to(gl.int64) + at * 16, inside.to(gl.int32)],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    return code, v0, v1, v2, v3


@gluon.jit
def _operand(p0, p1, p2, p3, q0, q1, q2, q3, DTYPE: gl.constexpr, W_LAYOUT: gl.constexpr):
    """The pairs of eight columns a lane and of eight more as (WARPS, ROWS, 64); nothing moves."""
    even = gl.join(gl.join(p0, q0), gl.join(p2, q2))
    odd = gl.join(gl.join(p1, q1), gl.join(p3, q3))
    pairs = gl.join(even, odd)
    low = pairs.to(gl.int16).to(DTYPE, bitcast=True)
    high = (pairs >> 16).to(gl.int16).to(DTYPE, bitcast=True)
    both = gl.permute(gl.join(low, high), (0, 1, 3, 2, 4, 5, 6))
    w = gl.reshape(both, (p0.shape[0], p0.shape[1], 64))
    return gl.convert_layout(w, W_LAYOUT, assert_trivial=True)


@gluon.jit
def _finish(
    acc, h_ptr, b_ptr, bias_ptr, y_ptr, M, N, R, row,
    stride_hm, stride_hr, stride_bn, stride_br, stride_bias,
    DTYPE: gl.constexpr, HAS_UPDATE: gl.constexpr, HAS_BIAS: gl.constexpr,
    BLOCK_M: gl.constexpr, ROWS: gl.constexpr, MMA: gl.constexpr, WARPS: gl.constexpr,
    OVERLAP: gl.constexpr = False,
):  # fmt: skip
    """Add the update and the bias to the warps' sums, (WARPS, ROWS, BLOCK_M), and store their total.

    OVERLAP: the launch before this one, which makes h, may still run.
    """
    W_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, MMA, 8)
    X_LAYOUT: gl.constexpr = gl.DotOperandLayout(1, MMA, 8)
    m = _along(2, BLOCK_M, X_LAYOUT)
    if HAS_UPDATE:
        if OVERLAP:
            gdc_wait()
        n, w_rank = row + _along(1, ROWS, W_LAYOUT), _along(2, 64, W_LAYOUT) + 64 * _along(0, WARPS, W_LAYOUT)
        x_rank = _along(1, 64, X_LAYOUT) + 64 * _along(0, WARPS, X_LAYOUT)
        for r in range(0, R, 64 * WARPS):
            b_ptrs = b_ptr + n.to(gl.int64) * stride_bn + (r + w_rank).to(gl.int64) * stride_br
            h_ptrs = h_ptr + m.to(gl.int64) * stride_hm + (r + x_rank) * stride_hr
            b = gl.load(b_ptrs, mask=(n < N) & (r + w_rank < R), other=0.0).to(DTYPE)
            h = gl.load(h_ptrs, mask=(m < M) & (r + x_rank < R), other=0.0).to(DTYPE)
            acc = mma_v2(b, h, acc)
    y = gl.sum(acc, 0)
    OUT: gl.constexpr = gl.SliceLayout(0, MMA)
    offs_n = row + gl.arange(0, ROWS, gl.SliceLayout(1, OUT))[:, None]
    offs_m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, OUT))[None, :]
    if HAS_BIAS:
        y += gl.load(bias_ptr + offs_n * stride_bias, mask=offs_n < N, other=0.0).to(gl.float32)
    ptrs = y_ptr + offs_m.to(gl.int64) * N + offs_n
    gl.store(ptrs, y.to(DTYPE), mask=(offs_n < N) & (offs_m < M))


@gluon.jit
def two_four_stream_kernel(
    x_ptr, values_ptr, bits_ptr, h_ptr, b_ptr, bias_ptr, y_ptr,
    M, N, K, R, across, stride_xm, stride_xk, stride_hm, stride_hr, stride_bn, stride_br, stride_bias,
    DTYPE: gl.constexpr, HAS_UPDATE: gl.constexpr, HAS_BIAS: gl.constexpr,
    BLOCK_M: gl.constexpr, ROWS: gl.constexpr, LANES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """y[m, n] = sum_k x[m, k] w[n, k]  +  sum_r h[m, r] b[n, r]  +  bias[n], at most BLOCK_M tokens

    Tensors   x (M, K)  w packed, of 16 bits, its values at 16-byte boundaries  h (M, R)  b (N, R)
              bias (N,); y (M, N) contiguous.
    Program   ROWS features of all tokens. Warps take turns on blocks of 64 columns; their sums meet at the
              end. Four lanes hold a row's block as the product's left operand wants it with sixteen columns
              each, so that a lane decodes what it multiplies; features are that side because it is wide.
    Numerics  products as the tensor cores', sums in float32, one rounding, at the store.
    Traffic   the compressed weight once, x once per block of features (from L2).
    Requires  ROWS a multiple of 16 that divides 64; BLOCK_M a multiple of 8.
    """
    WARPS: gl.constexpr = num_warps
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    W_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, MMA, 8)
    X_LAYOUT: gl.constexpr = gl.DotOperandLayout(1, MMA, 8)
    row = gl.program_id(0) * ROWS
    m, kk = _along(2, BLOCK_M, X_LAYOUT), _along(1, 64, X_LAYOUT)
    # a lane's sixteen neighbours are eight columns of either half of the product
    kk = kk // 8 % 4 * 16 + kk // 32 * 8 + kk % 8
    code, v0, v1, v2, v3 = _two_four_fetch(values_ptr, bits_ptr, N, across, row, 0, ROWS, LANES, WARPS)
    x_ptrs = (
        x_ptr + m.to(gl.int64) * stride_xm + (kk + 64 * _along(0, WARPS, X_LAYOUT)).to(gl.int64) * stride_xk
    )
    kk += 64 * _along(0, WARPS, X_LAYOUT)
    acc = gl.zeros((WARPS, ROWS, BLOCK_M), gl.float32, MMA)
    for tile in range(0, gl.cdiv(K, 64), WARPS):
        x = gl.load(x_ptrs, mask=(m < M) & (kk < K - tile * 64), other=0.0)
        x_ptrs += 64 * WARPS * stride_xk
        p0, p1, p2, p3, q0, q1, q2, q3 = gl.inline_asm_elementwise(
            TWO_FOUR_PAIRS, TWO_FOUR_TYPES, [code, v0, v1, v2, v3],
            dtype=(gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32),
            is_pure=True, pack=1,
        )  # fmt: skip
        code, v0, v1, v2, v3 = _two_four_fetch(
            values_ptr, bits_ptr, N, across, row, tile + WARPS, ROWS, LANES, WARPS
        )
        acc = mma_v2(_operand(p0, p1, p2, p3, q0, q1, q2, q3, DTYPE, W_LAYOUT), x, acc)
    _finish(
        acc, h_ptr, b_ptr, bias_ptr, y_ptr, M, N, R, row,
        stride_hm, stride_hr, stride_bn, stride_br, stride_bias,
        DTYPE, HAS_UPDATE, HAS_BIAS, BLOCK_M, ROWS, MMA, WARPS,
    )  # fmt: skip

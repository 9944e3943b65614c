"""Device helpers that every kernel shares: tile order, products, and the dropout mask.

Sizes are named by what they are to the helper (rows, cols, depth), because a helper serves passes over
M, N and K alike.
"""

import triton
import triton.language as tl


@triton.jit
def wide(value):
    """``value`` as int64, so that its product with a stride cannot wrap."""
    return tl.full((), value, tl.int64)


@triton.jit
def grouped_tile(tile, tiles_row, tiles_col, GROUP_ROWS: tl.constexpr):
    """Tile coordinates, GROUP_ROWS rows of tiles at a time, so that neighbours share operands in L2."""
    per_group = GROUP_ROWS * tiles_col
    first = (tile // per_group) * GROUP_ROWS
    height = min(tiles_row - first, GROUP_ROWS)
    return first + tile % per_group % height, tile % per_group // height


@triton.jit
def add(acc, rest, part):
    """acc + part, and rest plus the rounding error of that sum (Neumaier 1974)."""
    total = acc + part
    error = tl.where(tl.abs(acc) >= tl.abs(part), (acc - total) + part, (part - total) + acc)
    return total, rest + error


@triton.jit
def total(acc, rest):
    """acc + rest of a sum made by add; the error of a sum that is not finite says nothing."""
    return acc + tl.where(tl.abs(acc) < float("inf"), rest, 0.0)


@triton.jit
def dot(left, right, acc, rest, PRECISION: tl.constexpr):
    """(acc, rest) + left right, with the products as exact as the operands deserve; the sum is acc + rest.

    native  16-bit operands of one type on the tensor cores; rest stays zero.
    split   bfloat16 left, float32 right: right is cut into three bfloat16 parts that add up to it, so
            every product is exact to float32 while left stays as it is in memory.
    float   any other pair with a float32 side: in float32 on the ordinary units.
    double  float64, which only the interpreter runs; rest stays zero.

    Where a result is float32, blocks are summed one by one and added with their rounding errors kept:
    tensor cores truncate, and a chain over a whole row would lose more than PyTorch's trees do.
    """
    if PRECISION == "native":
        acc = tl.dot(left, right, acc)
    elif PRECISION == "split":
        high = right.to(left.dtype)
        remainder = right - high.to(tl.float32)
        middle = remainder.to(left.dtype)
        low = (remainder - middle.to(tl.float32)).to(left.dtype)
        # smallest parts first
        part = tl.dot(left, low)
        part = tl.dot(left, middle, part)
        acc, rest = add(acc, rest, tl.dot(left, high, part))
    elif PRECISION == "float":
        # a zero that the compiler cannot see through, or it would start the block's sum at acc
        zero = tl.zeros_like(acc) + (tl.program_id(0) >> 31).to(tl.float32)
        part = tl.dot(left.to(tl.float32), right.to(tl.float32), zero, input_precision="ieee")
        acc, rest = add(acc, rest, part)
    else:
        acc = tl.dot(left, right, acc, input_precision="ieee", out_dtype=acc.dtype)
    return acc, rest


@triton.jit
def keep_tile(seed, row, col, threshold, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """The dropout mask of one tile, (BLOCK_ROWS, BLOCK_COLS), True where an element is kept.

    One call of Philox serves eight elements, 16 bits each: those of a row that one thread holds in a
    tensor-core tile, so that no bit has to cross threads; see reference.dropout_keep for the order. ``col``
    and BLOCK_COLS must be multiples of 32.
    """
    GROUPS: tl.constexpr = BLOCK_COLS // 8
    group = (col // 8 + tl.arange(0, GROUPS))[None, :].to(tl.int32)
    line = (row + tl.arange(0, BLOCK_ROWS))[:, None].to(tl.int32)
    zero = tl.zeros((BLOCK_ROWS, GROUPS), tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, zero + group, zero + line, zero, zero, n_rounds=7)
    # the last join is the fastest index: (0, 2), (1, 3) come out in the order 0, 1, 2, 3
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (BLOCK_ROWS, GROUPS, 2, 2)
    halves = tl.join(words & 0xFFFF, words >> 16).to(tl.int32)
    halves = tl.permute(tl.reshape(halves, (BLOCK_ROWS, GROUPS // 4, 4, 4, 2)), (0, 1, 3, 2, 4))
    return tl.reshape(halves, (BLOCK_ROWS, BLOCK_COLS)) >= threshold


@triton.jit
def rank_product(
    acc, rest, h_ptr, b_ptr, row, col, rows, cols, R,
    stride_hrow, stride_hr, stride_bcol, stride_br,
    PRECISION: tl.constexpr, DOT_TYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """(acc, rest)[row, col] += sum_r h[row, r] b[col, r], with h and b rounded to DOT_TYPE once."""
    offs_row = row + tl.arange(0, BLOCK_ROWS)
    offs_col = col + tl.arange(0, BLOCK_COLS)
    offs_r = tl.arange(0, BLOCK_R)
    h_ptrs = h_ptr + offs_row[:, None].to(tl.int64) * stride_hrow + offs_r[None, :] * stride_hr
    b_ptrs = b_ptr + offs_col[None, :].to(tl.int64) * stride_bcol + offs_r[:, None].to(tl.int64) * stride_br
    # short: nothing to pipeline, and buffers of its own would push out those of the loop over depth
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        h = tl.load(h_ptrs, mask=(offs_row[:, None] < rows) & (offs_r[None, :] < R - r), other=0.0)
        b = tl.load(b_ptrs, mask=(offs_col[None, :] < cols) & (offs_r[:, None] < R - r), other=0.0)
        acc, rest = dot(h.to(DOT_TYPE), b.to(DOT_TYPE), acc, rest, PRECISION)
        h_ptrs += wide(BLOCK_R) * stride_hr
        b_ptrs += wide(BLOCK_R) * stride_br
    return acc, rest


@triton.jit
def base_product(
    acc, rest, left_ref, right_ref, row, col, rows, cols, depth,
    stride_lrow, stride_ldepth, stride_rcol, stride_rdepth,
    USE_DESC: tl.constexpr, DEPTH_FIRST: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """(acc, rest)[row, col] += sum_d left[row, d] right[col, d].

    left_ref and right_ref are pointers with free strides, or with USE_DESC tensor descriptors: left of
    (rows, depth), right of (cols, depth) or, DEPTH_FIRST, of (depth, cols). EVEN says that the blocks
    divide all three sizes; descriptors fill what lies outside with zeros by themselves.
    """
    if USE_DESC:
        for d in range(0, depth, BLOCK_DEPTH):
            left = left_ref.load([row, d])
            if DEPTH_FIRST:
                right = right_ref.load([d, col])
            else:
                right = right_ref.load([col, d]).T
            acc, rest = dot(left, right, acc, rest, PRECISION)
    else:
        offs_row = row + tl.arange(0, BLOCK_ROWS)
        offs_col = col + tl.arange(0, BLOCK_COLS)
        offs_d = tl.arange(0, BLOCK_DEPTH).to(tl.int64)
        left_ptrs = left_ref + offs_row[:, None].to(tl.int64) * stride_lrow + offs_d[None, :] * stride_ldepth
        right_ptrs = (
            right_ref + offs_col[None, :].to(tl.int64) * stride_rcol + offs_d[:, None] * stride_rdepth
        )
        for d in range(0, depth, BLOCK_DEPTH):
            if EVEN:
                left, right = tl.load(left_ptrs), tl.load(right_ptrs)
            else:
                mask_d = offs_d < depth - d
                left = tl.load(left_ptrs, mask=(offs_row[:, None] < rows) & mask_d[None, :], other=0.0)
                right = tl.load(right_ptrs, mask=(offs_col[None, :] < cols) & mask_d[:, None], other=0.0)
            acc, rest = dot(left, right, acc, rest, PRECISION)
            left_ptrs += wide(BLOCK_DEPTH) * stride_ldepth
            right_ptrs += wide(BLOCK_DEPTH) * stride_rdepth
    return acc, rest

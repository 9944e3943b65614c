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
def _philox(seed, c0, c1):
    """Philox-4x32-7 at counter (c0, c1, 0, 0), as tl.philox, with both halves of a product at once."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    c0 = c0.to(tl.uint32)
    c1 = c1.to(tl.uint32)
    c2 = tl.zeros_like(c0)
    c3 = c2
    for _ in tl.static_range(7):
        left = c0.to(tl.uint64) * 0xD2511F53
        right = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (right >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = right.to(tl.uint32)
        c2 = (left >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = left.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def keep_words(seed, row, word, threshold):
    """Words of the dropout mask, uint32: bit c says whether column 32 word + c of a row is kept.

    ``row`` and ``word`` are tensors of one shape. See reference.dropout_keep for what is compared.
    """
    row, word = row.to(tl.uint32), word.to(tl.uint32)
    key = (seed ^ (seed >> 32)).to(tl.uint32)
    shared = word * 0x9E3779B9 + (row * 0xBB67AE85 + key * 0xD2511F53)
    # the top byte is at least the threshold's low byte where the word is at least that byte and zeros
    keep = tl.where(shared >= tl.full((), threshold, tl.uint32) << 24, 0xFFFFFFFF, 0).to(tl.uint32)
    for i in tl.static_range(2):
        planes = _philox(seed, 2 * word + i, row)
        for q in tl.static_range(4):
            # the majority of three bits, one instruction: kept where above the threshold, or equal and kept
            clear = (tl.full((), threshold, tl.uint32) >> 8 + 4 * i + q & 1) - 1
            keep = (planes[q] & keep) | (clear & (planes[q] | keep))
    return keep


@triton.jit
def keep_tile(seed, row, col, threshold, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """The dropout mask of one tile, (BLOCK_ROWS, BLOCK_COLS), True where an element is kept.

    A word of 32 columns is drawn once, by one thread, and goes to the threads that hold its elements as a
    word. ``col`` and BLOCK_COLS must be multiples of 32.
    """
    WORDS: tl.constexpr = BLOCK_COLS // 32
    index = tl.arange(0, BLOCK_ROWS * WORDS)[:, None]
    words = keep_words(seed, row + index // WORDS, col // 32 + index % WORDS, threshold)
    return keep_of(words, BLOCK_ROWS, BLOCK_COLS)


@triton.jit
def keep_of(words, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """The mask of a tile from its words, (BLOCK_ROWS * BLOCK_COLS // 32, 1), row by row; see keep_tile."""
    WORDS: tl.constexpr = BLOCK_COLS // 32
    # the sum of one number is that number; but no layout is propagated backward through a scan, or every
    # thread of a tensor-core tile would draw all words of which it holds a bit, each word four times
    words = tl.reshape(tl.cumsum(words, 1), (BLOCK_ROWS, WORDS, 1, 1))
    # by bytes: some compilers pack 32 comparisons with bits of one word into masks, and take those apart
    words >>= 8 * tl.arange(0, 4).to(tl.uint32)[None, None, :, None]
    bits = (tl.full((8,), 1, tl.uint32) << tl.arange(0, 8).to(tl.uint32))[None, None, None, :]
    return tl.reshape((words & bits) != 0, (BLOCK_ROWS, BLOCK_COLS))


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

"""Hopper: dropout masks drawn where their elements lie, as operands of the tensor cores."""

from ._gluon import gl, gluon


@gluon.jit
def _product(left, factor: gl.constexpr):
    """All 64 bits of a product of 32-bit numbers by one instruction, of which LLVM at times makes two."""
    asm: gl.constexpr = "mul.wide.u32 $0, $1, " + factor + ";"
    return gl.inline_asm_elementwise(asm, "=l,r", [left], dtype=gl.uint64, is_pure=True, pack=1)


@gluon.jit
def _philox(seed, c0, c1):
    """Philox-4x32-7 at counter (c0, c1, 0, 0), as in dropout_mask."""
    k0 = seed.to(gl.uint32)
    k1 = (seed >> 32).to(gl.uint32)
    c0 = c0.to(gl.uint32)
    c1 = c1.to(gl.uint32)
    c2 = c0 * 0
    c3 = c2
    for _ in gl.static_range(7):
        left = _product(c0, "0xD2511F53")
        right = _product(c2, "0xCD9E8D57")
        c0 = (right >> 32).to(gl.uint32) ^ c1 ^ k0
        c1 = right.to(gl.uint32)
        c2 = (left >> 32).to(gl.uint32) ^ c3 ^ k1
        c3 = left.to(gl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@gluon.jit
def _halves(word, threshold, FEW: gl.constexpr):
    """Ones in each half of an int32 where that half of ``word`` is at least the threshold.

    With FEW, a threshold of at most 0x7C00, the lesser of the two is compared with it as a float16: patterns
    up to infinity are equal where they are the same.
    """
    if FEW:
        return gl.inline_asm_elementwise(
            "{ .reg .b32 least; min.u16x2 least, $1, $2; set.eq.u32.f16x2 $0, least, $2; }", "=r,r,r",
            [word, threshold * 0x10001], dtype=gl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    least = threshold.to(gl.uint32) << 16
    low = gl.where((word << 16) >= least, 0xFFFF, 0)
    high = gl.where(word >= least, -65536, 0)
    return low | high


@gluon.jit
def _bytes(left, right, chosen: gl.constexpr):
    """Four of the eight bytes of ``left`` and ``right``, by number."""
    asm: gl.constexpr = "prmt.b32 $0, $1, $2, " + chosen + ";"
    return gl.inline_asm_elementwise(asm, "=r,r,r", [left, right], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _merge(v0, v1, v2, v3, t):
    """Lane t of four gets what all of them have in the t-th of four words."""
    return gl.inline_asm_elementwise(
        """{
        .reg .pred odd, high;
        .reg .b32 bit, sent, sent1, kept, kept1;
        and.b32 bit, $5, 1;
        setp.ne.b32 odd, bit, 0;
        setp.gt.s32 high, $5, 1;
        selp.b32 sent, $1, $2, odd;
        selp.b32 kept, $2, $1, odd;
        selp.b32 sent1, $3, $4, odd;
        selp.b32 kept1, $4, $3, odd;
        shfl.sync.bfly.b32 sent, sent, 1, 31, -1;
        shfl.sync.bfly.b32 sent1, sent1, 1, 31, -1;
        or.b32 kept, kept, sent;
        or.b32 kept1, kept1, sent1;
        selp.b32 sent, kept, kept1, high;
        selp.b32 kept, kept1, kept, high;
        shfl.sync.bfly.b32 sent, sent, 2, 31, -1;
        or.b32 $0, kept, sent;
        }""",
        "=r,r,r,r,r,r",
        [v0, v1, v2, v3, t],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _four(parts):
    """Split (ROWS, WORDS, 4) into the four that a thread holds: two words of rows r and r + 8, or four."""
    ROWS: gl.constexpr = parts.shape[0]
    if parts.shape[1] == 2:
        parts = parts.reshape([ROWS // 16, 2, 8, 2, 4]).permute((0, 2, 4, 3, 1))
    else:
        parts = parts.reshape([ROWS, 2, 2, 4]).permute((0, 3, 1, 2))
    even, odd = parts.split()
    v0, v2 = even.split()
    v1, v3 = odd.split()
    return v0, v1, v2, v3


@gluon.jit
def _store_parts(bits, r, w, t, words_ptr, pitch, rows):
    """Write words (ROWS, WORDS) of which each of four lanes has a part; each lane writes one of four."""
    if bits.shape[1] == 2:
        row, word = (r & -9) | ((t & 1) << 3), (w & -2) | (t >> 1)
    else:
        row, word = r, (w & -4) | t
    zero = bits * 0
    row, _, _, _ = _four(zero + row)
    word, _, _, _ = _four(zero + word)
    lane, _, _, _ = _four(zero + t)
    v0, v1, v2, v3 = _four(bits)
    merged = _merge(v0, v1, v2, v3, lane)
    gl.store(words_ptr + row.to(gl.int64) * pitch + word, merged, mask=(row < rows) & (word < pitch))


@gluon.jit
def draw_pairs(
    ROWS: gl.constexpr, PAIRS: gl.constexpr, layout: gl.constexpr, FEW: gl.constexpr,
    seed, threshold, row, word, rows, words_ptr, pitch,
):  # fmt: skip
    """Masks of pairs (ROWS, PAIRS), elements 2i and 2i + 1 of a row; their bits are stored.

    A thread of a tensor-core tile holds columns {2t, 2t + 1} + 8j of 32, which are the eight half-words of
    one call: see _tiles.keep_tile. PAIRS is 32 or 64.
    """
    WORDS: gl.constexpr = PAIRS // 16
    SPLIT: gl.constexpr = gl.zeros((ROWS, PAIRS), gl.int32, layout).reshape([ROWS, WORDS, 4, 4]).type.layout
    CALLS: gl.constexpr = gl.SliceLayout(2, SPLIT)
    FLAT: gl.constexpr = gl.SliceLayout(2, CALLS)
    r = (row + gl.arange(0, ROWS, gl.SliceLayout(1, FLAT))[:, None]).expand_dims(2)
    w = (word + gl.arange(0, WORDS, gl.SliceLayout(0, FLAT))[None, :]).expand_dims(2)
    t = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, CALLS)))[None, None, :]
    zero = gl.zeros((ROWS, WORDS, 4), gl.int32, CALLS)
    w0, w1, w2, w3 = _philox(seed, zero + w * 4 + t, zero + r)
    m0 = _halves(w0, threshold, FEW)
    m1 = _halves(w1, threshold, FEW)
    m2 = _halves(w2, threshold, FEW)
    m3 = _halves(w3, threshold, FEW)
    # byte j of low and of high: all ones or none, for columns 2t + 8j and 2t + 1 + 8j
    first = (m0 & 0x00FF00FF) | (m1 & ~0x00FF00FF)
    second = (m2 & 0x00FF00FF) | (m3 & ~0x00FF00FF)
    low = _bytes(first, second, "0x5410")
    high = _bytes(first, second, "0x7632")
    bits = ((low & 0x55555555) | (high & ~0x55555555)) & (0x03030303 << (2 * t))
    _store_parts(bits, r, w, t, words_ptr, pitch, rows)
    # the last join is the fastest index: (0, 2), (1, 3) come out in the order 0, 1, 2, 3
    masks = gl.join(gl.join(m0, m2), gl.join(m1, m3)).reshape([ROWS, WORDS, 4, 4]).permute((0, 1, 3, 2))
    return gl.convert_layout(masks.reshape([ROWS, PAIRS]), layout)

"""Hopper: dropout masks drawn where their elements lie, as operands of the tensor cores.

A thread of a tensor-core tile holds columns {2t, 2t + 1} + 8j of a row, t its place in a group of four lanes:
all four need a row's words. Each draws one word of four, stores it, and hands it to the others.
"""

from ._gluon import gl, gluon
from ._hopper_masks import spread, times


@gluon.jit
def _product(left, factor: gl.constexpr):
    """All 64 bits of a product of 32-bit numbers by one instruction, of which LLVM at times makes two."""
    asm: gl.constexpr = "mul.wide.u32 $0, $1, " + factor + ";"
    return gl.inline_asm_elementwise(asm, "=l,r", [left], dtype=gl.uint64, is_pure=True, pack=1)


@gluon.jit
def _low(product):
    return product.to(gl.uint32)


@gluon.jit
def _high(product):
    return (product >> 32).to(gl.uint32)


@gluon.jit
def rows_begun(seed, row):
    """What the words of a row share: of Philox's second round, and the phase of what a word's bits share."""
    k0 = seed.to(gl.uint32)
    k1 = (seed >> 32).to(gl.uint32)
    row = row.to(gl.uint32)
    left = _product(row ^ k0, "0xD2511F53")
    phase = row * 0xBB67AE85 + (k0 ^ k1) * 0xD2511F53
    return _high(left) ^ (k1 + 0xBB67AE85), _low(left), phase


@gluon.jit
def _philox(seed, counter, begun):
    """Philox-4x32-7 at (counter, row, 0, 0), from what is begun of the row: products by zero are left out."""
    k0 = seed.to(gl.uint32)
    k1 = (seed >> 32).to(gl.uint32)
    left = _product(counter, "0xD2511F53")
    right = _product(_high(left) ^ k1, "0xCD9E8D57")
    c0 = _high(right) ^ (k0 + 0x9E3779B9)
    c1 = _low(right)
    c2 = begun[0] ^ _low(left)
    c3 = begun[1]
    k0 += 0x9E3779B9
    k1 += 0xBB67AE85
    for _ in gl.static_range(5):
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
        left = _product(c0, "0xD2511F53")
        right = _product(c2, "0xCD9E8D57")
        c0 = _high(right) ^ c1 ^ k0
        c1 = _low(right)
        c2 = _high(left) ^ c3 ^ k1
        c3 = _low(left)
    return c0, c1, c2, c3


@gluon.jit
def _majority(left, right, third):
    return gl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xE8;", "=r,r,r,r", [left, right, third],
        dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def keep_words(seed, threshold, word, begun):
    """Words of the mask, as reference.dropout_keep has them: ones where an element is kept."""
    threshold = gl.to_tensor(threshold)
    word = word.to(gl.uint32)
    shared = begun[2] + word * 0x9E3779B9
    keep = gl.where(shared >= (threshold.to(gl.uint32) << 24), -1, 0)
    high = threshold >> 8
    p0, p1, p2, p3 = _philox(seed, word * 2, begun)
    p4, p5, p6, p7 = _philox(seed, word * 2 + 1, begun)
    # from the lowest bit up: kept where a bit is above the threshold's, or equal and kept so far
    keep = _majority(p0, keep, (high & 1) - 1)
    keep = _majority(p1, keep, (high >> 1 & 1) - 1)
    keep = _majority(p2, keep, (high >> 2 & 1) - 1)
    keep = _majority(p3, keep, (high >> 3 & 1) - 1)
    keep = _majority(p4, keep, (high >> 4 & 1) - 1)
    keep = _majority(p5, keep, (high >> 5 & 1) - 1)
    keep = _majority(p6, keep, (high >> 6 & 1) - 1)
    return _majority(p7, keep, (high >> 7 & 1) - 1)


@gluon.jit
def _one_of_four(words):
    """Of (ROWS, WORDS, 4), the four words of each group of four lanes apart: rows r and r + 8, or one row."""
    ROWS: gl.constexpr = words.shape[0]
    if words.shape[1] == 2:
        words = words.reshape([ROWS // 16, 2, 8, 2, 4]).permute((0, 2, 4, 3, 1))
    else:
        words = words.reshape([ROWS, 2, 2, 4]).permute((0, 3, 1, 2))
    even, odd = words.split()
    v0, _ = even.split()
    return v0


@gluon.jit
def begin(ROWS: gl.constexpr, PAIRS: gl.constexpr, layout: gl.constexpr, seed, row):
    """Rows, words and what is begun of them, for draw_words, of pairs (ROWS, PAIRS); PAIRS is 32 or 64."""
    WORDS: gl.constexpr = PAIRS // 16
    SPLIT: gl.constexpr = gl.zeros((ROWS, PAIRS), gl.int32, layout).reshape([ROWS, WORDS, 4, 4]).type.layout
    ALL: gl.constexpr = gl.zeros((ROWS, WORDS, 4), gl.int32, gl.SliceLayout(2, SPLIT)).type.layout
    OWN: gl.constexpr = _one_of_four(gl.zeros((ROWS, WORDS, 4), gl.int32, ALL)).type.layout
    if WORDS == 2:
        FLAT: gl.constexpr = gl.SliceLayout(2, OWN)
        block = gl.arange(0, ROWS // 16, gl.SliceLayout(1, FLAT))[:, None] * 16
        r = (block + gl.arange(0, 8, gl.SliceLayout(0, FLAT))[None, :]).expand_dims(2)
        t = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, OWN)))[None, None, :]
        r, w = row + (r + ((t & 1) << 3)), t >> 1
    else:
        r = row + gl.arange(0, ROWS, gl.SliceLayout(1, OWN))[:, None]
        w = gl.arange(0, 4, gl.SliceLayout(0, OWN))[None, :]
    return r, w, rows_begun(seed, r)


@gluon.jit
def draw_words(seed, threshold, begun, word, rows, words_ptr, pitch):
    """The words from ``word`` on, one of four a lane, and store them."""
    r, w, of_rows = begun
    w += word
    words = keep_words(seed, threshold, w, of_rows)
    gl.store(words_ptr + r.to(gl.int64) * pitch + w, words, mask=(r < rows) & (w < pitch))
    return words


@gluon.jit
def _hand_round(words):
    """What each of four lanes has, to all of them."""
    return gl.inline_asm_elementwise(
        """
        shfl.sync.idx.b32 $0, $4, 0, 0x1c1f, -1;
        shfl.sync.idx.b32 $1, $4, 1, 0x1c1f, -1;
        shfl.sync.idx.b32 $2, $4, 2, 0x1c1f, -1;
        shfl.sync.idx.b32 $3, $4, 3, 0x1c1f, -1;
        """,
        "=&r,=&r,=&r,=&r,r",
        [words],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=False,
        pack=1,
    )


@gluon.jit
def byte_tops(words, ROWS: gl.constexpr, WORDS: gl.constexpr):
    """Of words that were drawn, bits of a lane's even and of its odd columns, at the tops of their bytes.

    Both (ROWS, WORDS, 4): every lane's own of each word.
    """
    v0, v1, v2, v3 = _hand_round(words)
    # the last join is the fastest index: (0, 2), (1, 3) come out in the order 0, 1, 2, 3
    parts = gl.join(gl.join(v0, v2), gl.join(v1, v3))
    if WORDS == 2:
        parts = parts.permute((0, 4, 1, 3, 2)).reshape([ROWS, WORDS, 4])
    else:
        parts = parts.permute((0, 2, 3, 1)).reshape([ROWS, WORDS, 4])
    LAYOUT: gl.constexpr = parts.type.layout
    t = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    return times(parts, 128 >> 2 * t), times(parts, 64 >> 2 * t)


@gluon.jit
def spread_words(words, ROWS: gl.constexpr, PAIRS: gl.constexpr, layout: gl.constexpr):
    """Masks of pairs (ROWS, PAIRS), elements 2i and 2i + 1 of a row, of words that were drawn."""
    even, odd = byte_tops(words, ROWS, PAIRS // 16)
    # the last join is the fastest index: (0, 2), (1, 3) come out in the order 0, 1, 2, 3
    first = gl.join(spread(even, odd, 0), spread(even, odd, 2))
    second = gl.join(spread(even, odd, 1), spread(even, odd, 3))
    masks = gl.join(first, second).reshape([ROWS, PAIRS // 16, 4, 4]).permute((0, 1, 3, 2))
    return gl.convert_layout(masks.reshape([ROWS, PAIRS]), layout)

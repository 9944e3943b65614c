"""Hopper: the bits of a dropout mask on tensor-core tiles, two 16-bit elements to an int32."""

from ._gluon import gl, gluon


@gluon.jit
def spread(even, odd, byte):
    """An int32 whose halves are all ones where the top bit of a byte is set, of ``even`` and of ``odd``."""
    chosen = 0xCC88 + 0x1111 * byte
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [even, odd, chosen], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def times(words, factor):
    """A shift by a factor that is a power of two: multiplication has units of its own."""
    return gl.inline_asm_elementwise(
        "mul.lo.u32 $0, $1, $2;", "=r,r,r", [words, factor], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def load_words(pairs, words_ptr, pitch, row, rows, word):
    """The mask's words beside ``pairs`` (ROWS, COLS / 2), each of two elements: (ROWS, COLS / 32, 1)."""
    ROWS: gl.constexpr = pairs.shape[0]
    WORDS: gl.constexpr = pairs.shape[1] // 16
    LAYOUT: gl.constexpr = pairs.reshape([ROWS, WORDS, 16]).type.layout
    r = row + gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None]
    c = word + gl.arange(0, WORDS, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :]
    found = gl.load(words_ptr + r.to(gl.int64) * pitch + c, mask=(r < rows) & (c < pitch), other=0)
    return found.expand_dims(2)


@gluon.jit
def pair_masks(pairs, words):
    """Masks of ``pairs``, which are elements of a row.

    A thread of a tensor-core tile holds columns {2t, 2t + 1} + 8j of 32. Shifted by t, a word has the bits
    of its even columns at the tops of its bytes, and one byte permutation spreads two of them over a pair.
    """
    ROWS: gl.constexpr = pairs.shape[0]
    PAIRS: gl.constexpr = pairs.shape[1]
    LAYOUT: gl.constexpr = pairs.reshape([ROWS, PAIRS // 16, 16]).type.layout
    pair = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    masks = spread(times(words, 128 >> 2 * (pair & 3)), times(words, 64 >> 2 * (pair & 3)), pair >> 2)
    return gl.convert_layout(masks.reshape([ROWS, PAIRS]), pairs.type.layout)


@gluon.jit
def round_to_pairs(acc, dtype: gl.constexpr):
    """Elements 2i and 2i + 1 of each row of a float32 tile, rounded to a 16-bit type, as one int32."""
    low, high = acc.reshape([acc.shape[0], acc.shape[1] // 2, 2]).split()
    if dtype == gl.bfloat16:
        asm: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;"
    else:
        asm: gl.constexpr = "cvt.rn.f16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(asm, "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def unpack(pairs, dtype: gl.constexpr, layout: gl.constexpr):
    """The 16-bit tile that ``pairs`` was made of."""
    low = pairs.to(gl.int16).to(dtype, bitcast=True)
    high = (pairs >> 16).to(gl.int16).to(dtype, bitcast=True)
    return gl.convert_layout(gl.join(low, high).reshape([pairs.shape[0], 2 * pairs.shape[1]]), layout)

"""Decoding of a compressed weight into pairs of 16-bit columns, in PTX: byte permutes place the values.

The bitmap's step handles eight columns of a row, the 2:4 one sixteen. Both look selectors of ``prmt`` up in
tables that are themselves registers, by ``prmt``.
"""

import triton.language as tl

__all__ = ["BITMAP_PAIRS", "BITMAP_TYPES", "LOAD_FOUR", "TWO_FOUR_PAIRS", "TWO_FOUR_TYPES"]


def _bitmap_pairs() -> str:
    """Return PTX of: word, index of the word's first value, shift, mask of the bits below it, address.

    The address is one of 8 bytes, and what the index counts from.
    """
    address = (
        "and.b32 t, $4, $7; popc.b32 n, t; add.s32 n, n, $5; shl.b32 low, n, 1; and.b32 t, low, -8;"
        " cvt.u64.u32 place, t; add.s64 place, place, $8;"
    )
    # two bits a nibble, in the order 0, 2, 1, 3, and by them 16 bits a value, to be skipped
    nibbles = (
        "shr.u32 x, $4, $6; and.b32 t, x, 0x33; and.b32 x, x, 0xCC; mad.lo.u32 x, x, 64, t;"
        " prmt.b32 skip, 0x20101000, 0, x; mul.lo.u32 end, skip, 0x01010101;"
    )
    # the top byte of end is the bit after the last value, counted from the first or from the aligned word
    loads = (
        "setp.ge.u32 p, end, 0x01000000; and.b32 t, low, 6; shl.b32 t, t, 27; add.u32 end, end, t;"
        " setp.ge.u32 q, end, 0x41000000; setp.ge.u32 r, end, 0x81000000;"
        " @p ld.global.v2.b32 {e0, e1}, [place]; @q ld.global.v2.b32 {e2, e3}, [place+8];"
        " @r ld.global.v2.b32 {e4, e5}, [place+16];"
    )
    align = "and.b32 t, low, 4; setp.ne.u32 z, t, 0; shl.b32 low, low, 3;"
    align += "".join(f" selp.b32 e{i}, e{i + 1}, e{i}, z;" for i in range(5))
    align += "".join(f" shf.r.wrap.b32 e{i}, e{i}, e{i + 1}, low;" for i in range(4))
    select = " prmt.b32 first, 0x10441044, 0, x; prmt.b32 second, 0x32104444, 0, x;"
    pairs = ""
    for pair, byte in enumerate((0, 2, 1, 3)):
        pairs += f" prmt.b32 t, first, second, {0x40 + 0x11 * byte}; prmt.b32 ${pair}, e0, 0, t;"
        if pair < 3:
            pairs += f" bfe.u32 t, skip, {8 * byte}, 8;"
        pairs += "".join(f" shf.r.clamp.b32 e{i}, e{i}, e{i + 1}, t;" for i in range(3 - pair))
    registers = (
        ".reg .pred p, q, r, z; .reg .b64 place; .reg .b32 t, n, x, low, skip, end, first, second;"
        " .reg .b32 e0, e1, e2, e3, e4, e5;"
    )
    return f"{{ {registers} {address} {nibbles} {loads} {align}{select}{pairs} }}"


def _two_four_pairs() -> str:
    """Return PTX of: four groups' codes in 16 bits, then the groups' values."""
    # Gray's code tells the six codes apart by three bits: 6, 4, 2 for 0-1, 0-2, 0-3, then 5, 3, 1
    text = "shr.u32 x, $8, 1; xor.b32 x, x, $8; and.b32 x, x, 0x7777;"
    absent, low, high = 0x44, 0x10, 0x32
    tables = (
        {6: low, 4: low, 2: low},
        {6: high, 5: low, 3: low},
        {4: high, 5: high, 1: low},
        {2: high, 3: high, 1: high},
    )
    for column, table in enumerate(tables):
        entries = [table.get(i, absent) for i in range(8)]
        words = [int.from_bytes(bytes(entries[i : i + 4]), "little") for i in (0, 4)]
        text += f" mov.b32 t, {words[0]}; prmt.b32 c{column}, t, {words[1]}, x;"
    for group in range(4):
        for pair in range(2):
            text += f" prmt.b32 t, c{2 * pair}, c{2 * pair + 1}, {0x40 + 0x11 * group};"
            text += f" prmt.b32 ${2 * group + pair}, ${9 + group}, 0, t;"
    return f"{{ .reg .b32 t, x, c0, c1, c2, c3; {text} }}"


BITMAP_PAIRS = tl.constexpr(_bitmap_pairs())
BITMAP_TYPES = tl.constexpr("=&r,=&r,=&r,=&r,r,r,r,r,l")
TWO_FOUR_PAIRS = tl.constexpr(_two_four_pairs())
TWO_FOUR_TYPES = tl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r")
# 16 bytes at an address, or zeros
LOAD_FOUR = tl.constexpr(
    "{ .reg .pred p; setp.ne.u32 p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;"
    " @p ld.global.v4.b32 {$0, $1, $2, $3}, [$4]; }"
)

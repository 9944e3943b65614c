"""Decoding of a 2:4 weight into pairs of 16-bit columns, in PTX: byte permutes place the values.

A step handles sixteen columns of a row. Selectors of ``prmt`` are looked up in tables that are themselves
registers, by ``prmt``.
"""

import triton.language as tl

__all__ = ["LOAD_FOUR", "TWO_FOUR_PAIRS", "TWO_FOUR_TYPES"]


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


TWO_FOUR_PAIRS = tl.constexpr(_two_four_pairs())
TWO_FOUR_TYPES = tl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r")
# 16 bytes at an address, or zeros
LOAD_FOUR = tl.constexpr(
    "{ .reg .pred p; setp.ne.u32 p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;"
    " @p ld.global.v4.b32 {$0, $1, $2, $3}, [$4]; }"
)

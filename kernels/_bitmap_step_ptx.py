"""Decoding sixteen columns of a bitmap's row in PTX: the words that hold the values, then their places.

Eight columns at a time, from their middle outwards: once the stream of values is aligned to the value that
follows the fourth column, the two inner pairs of columns lie in one word each, and the outer pairs in two.
So few words move: 4 of the stream's 6, and 2 for the outer pairs.

Integer instructions bound the kernel, and multiplications run beside them: so addresses are sums of products,
and upper halves come from a product of float16 by one; both factors are arguments, for compilers to keep.
"""

import triton.language as tl

__all__ = ["PLACE_SIXTEEN", "PLACE_TYPES", "WORDS_INSIDE", "WORDS_OF_EIGHT", "WORDS_TYPES"]

# selectors of ``prmt`` by the two bits of a pair: of its word, aligned to the value that precedes the pair's
# end or to its first one, and of the word in which an outer pair's values are by the inner pair's bits
_ENDS_AT = (0x4444, 0x4432, 0x3244, 0x3210)
_STARTS_AT = (0x4444, 0x4410, 0x1044, 0x3210)
_BEFORE = (0x7654, 0x5432, 0x5432, 0x3210)
_AFTER = (0x3210, 0x5432, 0x5432, 0x7654)


def _words_of_eight(inside: bool) -> str:
    """Return PTX of: the bits, those below the middle, first value's index less 4, size, limit, address.

    It makes six words, of 8 bytes each two, and the index. The address is one of 8 bytes and what the index
    counts from; the limit is the number of values from there on, or, ``inside``, whether to load.
    """
    loads = "setp.ne.s32 p, $11, 0;"
    if not inside:
        loads = (
            "add.s32 u, $11, -4; add.s32 v, $11, -8;"
            " setp.lt.u32 p, t, $11; setp.lt.s32 q, t, u; setp.lt.s32 r, t, v;"
        )
    guards = "ppp" if inside else "pqr"
    for i, guard in enumerate(guards):
        loads += f" @{guard} ld.global.v2.b32 {{${2 * i}, ${2 * i + 1}}}, [place+{8 * i}];"
    return (
        "{ .reg .pred p, q, r; .reg .b64 place; .reg .b32 t, u, v;"
        " and.b32 t, $7, $8; popc.b32 t, t; add.s32 $6, t, $9; and.b32 t, $6, -4;"
        f" mad.wide.s32 place, t, $10, $12; {loads} }}"
    )


def _lookup(name: str, table: tuple[int, ...], by: str) -> str:
    low, high = (table[i] | table[i + 1] << 16 for i in (0, 2))
    return f" prmt.b32 {name}, {low}, {high}, {by};"


def _place_sixteen() -> str:
    """Return PTX of: the bits, their shift, ones, and what the first step made of either eight columns."""
    text = "shr.u32 x, $8, $9;"
    # byte by byte, a pair's bits p become the nibbles 2 p and 2 p + 1
    for pair in range(4):
        bits = f"shr.u32 t, x, {2 * pair}; and.b32 t, t, 0x0303;" if pair else "and.b32 t, x, 0x0303;"
        text += f" {bits} mad.lo.u32 t, t, 0x22, 0x1010;"
        text += _lookup(f"s{pair}", _ENDS_AT if pair < 2 else _STARTS_AT, "t")
        if pair in (1, 2):
            text += _lookup(f"f{pair}", _BEFORE if pair == 1 else _AFTER, "t")
    for eight in range(2):
        if eight:
            for name in ("s0", "s1", "s2", "s3", "f1", "f2"):
                text += f" mov.b32 {{lo, hi}}, {name}; mov.b32 t, {{hi, hi}};"
                text += f" mul.rn.f16x2 {name}, t, $10;"
        first = 11 + 7 * eight
        text += f" and.b32 t, ${first + 6}, 2; setp.ne.u32 z, t, 0; shl.b32 t, ${first + 6}, 4;"
        text += "".join(f" selp.b32 e{i}, ${first + i + 1}, ${first + i}, z;" for i in range(5))
        text += "".join(f" shf.r.wrap.b32 e{i}, e{i}, e{i + 1}, t;" for i in range(4))
        text += " prmt.b32 e0, e0, e1, f1; prmt.b32 e3, e2, e3, f2;"
        text += "".join(f" prmt.b32 ${4 * eight + i}, e{i}, 0, s{i};" for i in range(4))
    registers = ".reg .pred z; .reg .b16 lo, hi; .reg .b32 t, x, s0, s1, s2, s3, f1, f2, e0, e1, e2, e3, e4;"
    return f"{{ {registers} {text} }}"


WORDS_OF_EIGHT = tl.constexpr(_words_of_eight(inside=False))
WORDS_INSIDE = tl.constexpr(_words_of_eight(inside=True))
WORDS_TYPES = tl.constexpr(",".join(["=&r"] * 7 + ["r"] * 5 + ["l"]))
PLACE_SIXTEEN = tl.constexpr(_place_sixteen())
PLACE_TYPES = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 17))

"""The bitmap's inner step in PTX: compilers make half as many instructions again of it themselves."""

import triton.language as tl

__all__ = ["EIGHT"]


def _column(j: int) -> str:
    """Return PTX: operand ``j`` is the next value if bit ``j`` is set, and zero if not."""
    return (
        f"and.b32 bit, $9, {1 << j}; setp.ne.u32 p, bit, 0; cvt.u64.u32 place, at; add.u64 place, place, $10;"
        f" mov.b16 ${j}, 0; @p ld.global.b16 ${j}, [place];"
    )


# eight 16-bit columns, of: the offset of the first value in bytes, eight bits, the address it counts from
EIGHT = tl.constexpr(
    "{ .reg .pred p; .reg .b32 at, bit; .reg .b64 place; mov.b32 at, $8; "
    + " @p add.u32 at, at, 2; ".join(_column(j) for j in range(8))
    + " }"
)

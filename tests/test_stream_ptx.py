"""The PTX that decodes compressed weights, run on paper: every byte, alignment and lane; every code."""

import random
import re
import struct

import pytest

pytest.importorskip("triton")

from lowrank_ops import reference  # noqa: E402
from lowrank_ops.kernels import _bitmap_step_ptx as step_ptx  # noqa: E402
from lowrank_ops.kernels import _stream_ptx as ptx  # noqa: E402

WORD = 2**32 - 1


def prmt(a: int, b: int, selector: int) -> int:
    source = (a | b << 32).to_bytes(8, "little")
    chosen = [selector >> 4 * i & 15 for i in range(4)]
    assert max(chosen) < 8  # no sign is replicated
    return int.from_bytes(bytes(source[i] for i in chosen), "little")


def half_product(a: int, b: int) -> int:
    floats = [struct.unpack("<2e", struct.pack("<I", word)) for word in (a, b)]
    return struct.unpack("<I", struct.pack("<2e", *(x * y for x, y in zip(*floats, strict=True))))[0]


def signed(a: int) -> int:
    return (a & WORD ^ 1 << 31) - (1 << 31)


def funnel(a: int, b: int, n: int) -> int:
    return ((a | b << 32) >> n) & WORD


COMPUTE = {
    "mov": lambda a: a,
    "and": lambda a, b: a & b,
    "xor": lambda a, b: a ^ b,
    "shl": lambda a, n: a << n & WORD,
    "shr": lambda a, n: a >> n,
    "add": lambda a, b: a + b & WORD,
    "mul.rn.f16x2": half_product,
    "mul.lo": lambda a, b: a * b & WORD,
    "mad.lo": lambda a, b, c: a * b + c & WORD,
    "mad.wide": lambda a, b, c: signed(a) * b + c,
    "cvt": lambda a: a & WORD,
    "popc": lambda a: a.bit_count(),
    "prmt": prmt,
    "bfe": lambda a, at, count: a >> at & (1 << count) - 1,
    "selp": lambda a, b, p: a if p else b,
    "setp.ge": lambda a, b: a >= b,
    "setp.lt.u": lambda a, b: a < b,
    "setp.lt.s": lambda a, b: signed(a) < signed(b),
    "setp.ne": lambda a, b: a != b,
    "shf.r.wrap": lambda a, b, n: funnel(a, b, n & 31),
    "shf.r.clamp": lambda a, b, n: funnel(a, b, min(n, 32)),
}


def run(text: str, inputs: dict[str, int], memory: bytes) -> dict[str, int]:
    """Execute straight-line PTX; registers that nothing was written to hold noise."""
    noise = random.Random(len(memory))
    state = {**{f"e{i}": noise.getrandbits(32) for i in range(6)}, **inputs}
    value = lambda name: state[name] if name in state else int(name, 0) & WORD  # noqa: E731
    for line in text.strip("{} ").split(";"):
        predicate, opcode, rest = re.fullmatch(r"\s*(?:@(\w) )?(\S*)\s*(.*)", line).groups()
        if opcode in ("", ".reg") or (predicate and not state[predicate]):
            continue
        names = re.findall(r"[$\w-]+", rest)
        if opcode.startswith("ld."):
            at = value(names[2]) + int(names[3] if len(names) > 3 else 0)
            assert at % 8 == 0
            assert 0 <= at < len(memory)
            for i in range(2):
                state[names[i]] = int.from_bytes(memory[at + 4 * i : at + 4 * i + 4], "little")
            continue
        if opcode == "mov.b32" and "{" in rest:
            if rest.startswith("{"):
                state[names[0]], state[names[1]] = state[names[2]] & 0xFFFF, state[names[2]] >> 16
            else:
                state[names[0]] = state[names[1]] | state[names[2]] << 16
            continue
        name = max((name for name in COMPUTE if opcode.startswith(name)), key=len)
        state[names[0]] = COMPUTE[name](*(value(name) for name in names[1:]))
    return state


def halves(words: list[int]) -> list[int]:
    return [word >> shift & 0xFFFF for word in words for shift in (0, 16)]


@pytest.mark.parametrize("inside", [False, True])
def test_sixteen_columns_of_a_bitmap_find_their_values(inside):
    noise = random.Random(inside)
    for trial in range(320):
        odd, first = trial % 2, trial // 2 % 4
        # both halves of a lane's columns take every value, and some both none and all
        half = (trial * 5 & 255) | (255 if trial % 7 == 0 else noise.getrandbits(8)) << 8
        word = noise.getrandbits(32) & ~(0xFFFF << 16 * odd) | half << 16 * odd
        before = first + (word & (1 << 16 * odd) - 1).bit_count()
        count = before + half.bit_count()
        # of what is inside there is more at both ends; else not a whole 8 bytes without a value may be read
        lead, tail = (4, 8) if inside else (0, -count % 4)
        memory = b"".join((1000 + i - lead).to_bytes(2, "little") for i in range(lead + count + tail))
        state = {"$8": word, "$9": 16 * odd, "$10": 0x3C003C00}
        for eight in range(2):
            below = (1 << 16 * odd + 8 * eight + 4) - 1
            limit = 1 if inside else lead + count
            given = {"$7": word, "$8": below, "$9": lead + first - 4 & WORD, "$10": 2, "$11": limit, "$12": 0}
            code = step_ptx.WORDS_INSIDE if inside else step_ptx.WORDS_OF_EIGHT
            made = run(code.value, {**{f"${i}": noise.getrandbits(32) for i in range(6)}, **given}, memory)
            state |= {f"${11 + 7 * eight + i}": made[f"${i}"] for i in range(7)}
        state = run(step_ptx.PLACE_SIXTEEN.value, state, b"")
        values = iter(range(1000 + before, 1000 + count))
        assert halves([state[f"${j}"] for j in range(8)]) == [
            next(values) if half >> column & 1 else 0 for column in range(16)
        ]


def test_a_two_four_step_places_every_value():
    pairs = sorted(set(reference.pruned._PAIRS))
    for i in range(36):
        codes = [pairs[i % 6], pairs[i // 6], pairs[(i + 1) % 6], pairs[(i // 6 + 2) % 6]]
        given = {"$8": sum(code << 4 * i for i, code in enumerate(codes))}
        given |= {f"${9 + i}": (200 + i) << 16 | (100 + i) for i in range(4)}
        state = run(ptx.TWO_FOUR_PAIRS.value, given, b"")
        expected = [0] * 16
        for i, code in enumerate(codes):
            expected[4 * i + (code & 3)], expected[4 * i + (code >> 2)] = 100 + i, 200 + i
        assert halves([state[f"${j}"] for j in range(8)]) == expected

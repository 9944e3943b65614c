"""The PTX that decodes compressed weights, run on paper: every byte, alignment and lane; every code."""

import random
import re

import pytest

pytest.importorskip("triton")

from lowrank_ops import reference  # noqa: E402
from lowrank_ops.kernels import _stream_ptx as ptx  # noqa: E402

WORD = 2**32 - 1


def prmt(a: int, b: int, selector: int) -> int:
    source = (a | b << 32).to_bytes(8, "little")
    chosen = [selector >> 4 * i & 15 for i in range(4)]
    assert max(chosen) < 8  # no sign is replicated
    return int.from_bytes(bytes(source[i] for i in chosen), "little")


def funnel(a: int, b: int, n: int) -> int:
    return ((a | b << 32) >> n) & WORD


COMPUTE = {
    "mov": lambda a: a,
    "and": lambda a, b: a & b,
    "xor": lambda a, b: a ^ b,
    "shl": lambda a, n: a << n & WORD,
    "shr": lambda a, n: a >> n,
    "add": lambda a, b: a + b & WORD,
    "mul.lo": lambda a, b: a * b & WORD,
    "mad.lo": lambda a, b, c: a * b + c & WORD,
    "mad.wide": lambda a, b, c: a * b + c,
    "cvt": lambda a: a & WORD,
    "popc": lambda a: a.bit_count(),
    "prmt": prmt,
    "bfe": lambda a, at, count: a >> at & (1 << count) - 1,
    "selp": lambda a, b, p: a if p else b,
    "setp.ge": lambda a, b: a >= b,
    "setp.ne": lambda a, b: a != b,
    "shf.r.wrap": lambda a, b, n: funnel(a, b, n & 31),
    "shf.r.clamp": lambda a, b, n: funnel(a, b, min(n, 32)),
}


def run(text: str, inputs: dict[str, int], memory: bytes) -> dict[str, int]:
    """Execute straight-line PTX; registers that nothing was written to hold noise."""
    noise = random.Random(len(memory))
    state = {**{f"e{i}": noise.getrandbits(32) for i in range(6)}, **inputs}
    value = lambda name: state[name] if name in state else int(name, 0)  # noqa: E731
    for line in text.strip("{} ").split(";"):
        predicate, opcode, rest = re.fullmatch(r"\s*(?:@(\w) )?(\S*)\s*(.*)", line).groups()
        if opcode in ("", ".reg") or (predicate and not state[predicate]):
            continue
        names = re.findall(r"[$\w-]+", rest)
        if opcode.startswith("ld."):
            at = value(names[2]) + int(names[3] if len(names) > 3 else 0)
            assert at % 8 == 0
            for i in range(2):
                state[names[i]] = int.from_bytes(memory[at + 4 * i : at + 4 * i + 4], "little")
            continue
        name = max((name for name in COMPUTE if opcode.startswith(name)), key=len)
        state[names[0]] = COMPUTE[name](*(value(name) for name in names[1:]))
    return state


def halves(words: list[int]) -> list[int]:
    return [word >> shift & 0xFFFF for word in words for shift in (0, 16)]


def test_a_bitmap_step_places_every_value():
    for byte in range(256):
        for first in range(4):
            lane, before = byte % 4, random.Random(byte).getrandbits(32)
            word = before & ~(255 << 8 * lane) | byte << 8 * lane
            below = (1 << 8 * lane) - 1
            start = first + (word & below).bit_count()
            count = byte.bit_count()
            # only whole words that hold a value may be read
            size = -(-(start + count) // 4) * 8 if count else 0
            memory = b"".join((1000 + i).to_bytes(2, "little") for i in range(size // 2))
            given = {"$4": word, "$5": first, "$6": 8 * lane, "$7": below, "$8": 0}
            state = run(ptx.BITMAP_PAIRS.value, given, memory)
            values = iter(range(1000 + start, 1000 + start + count))
            assert halves([state[f"${j}"] for j in range(4)]) == [
                next(values) if byte >> column & 1 else 0 for column in range(8)
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

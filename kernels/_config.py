"""Tile sizes as data: a frozen record, and the pure function that picks one. Nothing here measures."""

import json
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from ._costs import few_tiles, loses, split_in_rounds, triton_time

__all__ = [
    "OPS",
    "TABLES",
    "DeviceFacts",
    "TileConfig",
    "aligned",
    "block_rank",
    "device_facts",
    "dot_precision",
    "interpreted",
    "measured_rows",
    "pick",
    "pick_for",
    "product_of",
    "small_tiles",
    "table_names",
    "tl_type",
]

OPS = ("lora_hidden", "lora_forward", "lora_backward_hidden_b", "lora_backward_a", "lora_backward_input")

# whose memory differs from that of the GPU that their architecture's table was measured on
_PRODUCTS = ("H200",)
_TL_TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@triton.jit
def _probe_kernel():
    pass


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels: TRITON_INTERPRET=1 when Triton was imported."""
    return isinstance(_probe_kernel, InterpretedFunction)


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """What a choice of tiles depends on: architecture ("sm90", "gfx942", "cpu") and multiprocessors.

    product is the model where it has a table of its own, else "", as on an H100, which sm90's table is of.
    """

    arch: str
    processors: int
    product: str = ""


@dataclass(frozen=True, kw_only=True)
class TileConfig:
    """Tile sizes of one launch, in elements.

    rows, cols and depth are the kernel's own: for a GEMM the output tile and the step of the sum; for a
    skinny pass the tile of the big operand (BLOCK_COLS unused when it sums over columns, and so on).
    MOST_RANKS is the largest number of ranks that a program of a skinny pass takes, 0 for the pass's own
    choice. SPLIT programs share a sum, whose parts a second launch adds up. PERSISTENT is the number of
    programs per multiprocessor, 0 for one program a tile. DESCRIPTORS asks for tensor descriptors (TMA on
    Hopper). CUBLAS leaves the product to cuBLAS in ``dispatch``; a GEMM then gets its update from a second
    launch.
    """

    BLOCK_ROWS: int
    BLOCK_COLS: int
    BLOCK_DEPTH: int
    GROUP_ROWS: int = 8
    SPLIT: int = 1
    MOST_RANKS: int = 0
    PERSISTENT: int = 0
    DESCRIPTORS: bool = False
    CUBLAS: bool = False
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        # a config is part of the key of every launch
        object.__setattr__(self, "_hash", hash(tuple(vars(self).values())))

    def __hash__(self) -> int:
        return self._hash

    def programs(self, facts: DeviceFacts) -> int:
        """Return the largest number of programs that this config launches."""
        return self.PERSISTENT * facts.processors if self.PERSISTENT else 2**31 - 1


@cache
def device_facts(device: torch.device) -> DeviceFacts:
    """Return the facts of a device; a CPU (the interpreter) counts as one small processor."""
    if device.type != "cuda":
        return DeviceFacts(arch="cpu", processors=4)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return DeviceFacts(
            arch=properties.gcnArchName.split(":")[0], processors=properties.multi_processor_count
        )
    return DeviceFacts(
        arch=f"sm{properties.major}{properties.minor}",
        processors=properties.multi_processor_count,
        product=product_of(properties.name),
    )


def product_of(name: str) -> str:
    """Return the model in a GPU's name, "" for one without a table of its own."""
    return next((word for word in name.split() if word in _PRODUCTS), "")


def tl_type(dtype: torch.dtype, accumulate: bool = False) -> tl.dtype:
    """Return Triton's name for ``dtype``, or for the type in which its products are summed."""
    if accumulate:
        return tl.float64 if dtype is torch.float64 else tl.float32
    return _TL_TYPES[dtype]


def dot_precision(big: torch.dtype, small: torch.dtype) -> tuple[str, tl.dtype]:
    """Return PRECISION of ``_tiles.dot`` for two dtypes, and the type that 16-bit products take."""
    if big is torch.float64:
        return "double", tl.float64
    # the interpreter keeps bfloat16 as integers, and would multiply those
    if big is torch.float32 or (big is torch.bfloat16 and interpreted()):
        return "float", _TL_TYPES[big]
    if small is big:
        return "native", _TL_TYPES[big]
    return ("split" if big is torch.bfloat16 else "float"), _TL_TYPES[big]


def block_rank(R: int, most: int) -> int:
    """Return BLOCK_R: a power of two, at least 16 (the smallest product) and at most ``most``."""
    return min(most, max(16, triton.next_power_of_2(R)))


def aligned(t: torch.Tensor) -> bool:
    """Whether 16-byte accesses along a contiguous dimension of ``t`` are possible."""
    pitch = t.stride(0) if t.stride(1) == 1 else t.stride(1)
    return 1 in t.stride() and pitch * t.element_size() % 16 == 0


def small_tiles(config: TileConfig, dtype: torch.dtype) -> TileConfig:
    """Return ``config`` for an operand that is not aligned: every element takes a load and a pointer."""
    rows = 32 if dtype.itemsize == 2 else 16
    least = {name: min(getattr(config, name), 32) for name in ("BLOCK_COLS", "BLOCK_DEPTH")}
    return replace(config, **least, BLOCK_ROWS=min(config.BLOCK_ROWS, rows), num_stages=2)


def _split(blocks: int, steps: int, programs: int) -> int:
    """Return how many programs share a sum of ``steps`` blocks, to have about ``programs`` of them in all."""
    return max(1, min(round(programs / max(blocks, 1)), steps, 32))


def _gemm(
    op: str, rows: int, dtype: torch.dtype, large: bool, crowded: bool, facts: DeviceFacts
) -> TileConfig:
    """Return tiles for a GEMM of so many rows; ``crowded``: float32 adapters and a mask want registers.

    ``large``: the largest tiles, which are enough to keep the multiprocessors busy.
    """
    if dtype.itemsize > 2:
        return TileConfig(BLOCK_ROWS=32, BLOCK_COLS=32, BLOCK_DEPTH=32, CUBLAS=True, num_stages=2)
    # measured on sm90 alone; elsewhere cuBLAS plus one pass is the safe choice
    measured = facts.arch == "sm90"
    if large and measured:
        rows, cols = (256, 128) if crowded else (128, 256)
        return TileConfig(
            BLOCK_ROWS=rows, BLOCK_COLS=cols, BLOCK_DEPTH=64, PERSISTENT=1, DESCRIPTORS=True, num_warps=8
        )
    if rows > 64:
        return TileConfig(
            BLOCK_ROWS=128,
            BLOCK_COLS=128,
            BLOCK_DEPTH=64,
            DESCRIPTORS=measured,
            CUBLAS=not measured or op == "lora_forward",
            num_warps=8,
            num_stages=4 if measured else 3,
        )
    if rows > 16:
        return TileConfig(BLOCK_ROWS=16, BLOCK_COLS=64, BLOCK_DEPTH=128, CUBLAS=True, num_stages=4)
    # a few tokens: all is bandwidth of w, so narrow tiles for many programs; a mask comes 32 columns wide
    cols, depth, warps = (16, 256, 2) if op == "lora_forward" else (32, 128, 4)
    return TileConfig(
        BLOCK_ROWS=16,
        BLOCK_COLS=cols,
        BLOCK_DEPTH=depth,
        CUBLAS=not measured,
        num_warps=warps,
        num_stages=4,
    )


def _hidden(
    M: int, depth: int, R: int, dtype: torch.dtype, wide: bool, dropout: bool, facts: DeviceFacts
) -> TileConfig:
    """Return tiles for a sum along the rows of an (M, depth) operand; ``wide``: adapters in float32."""
    warps, programs = 4, facts.processors
    if wide and M <= 64:
        # a short sum a block, for accuracy: these rows are too few for errors to hide among them
        rows, deep, stages = 16, 32, 3
    elif wide and dtype is torch.bfloat16:
        many = M >= 2048 and not dropout
        long = facts.arch == "sm90" and R <= (32 if many else 16)
        rows, deep, stages = 64, 128 if long else 64, 3
        programs *= 2 if long and many else 1
        warps = 8 if facts.arch.startswith("sm1") else 4
        if facts.arch == "sm90" and many and R > 32:
            rows, warps = 128, 8
    elif wide:
        rows, deep, stages, warps = 32, 32, 3, 8
    elif M <= 16:
        rows, deep, stages, programs = 16, 256, 3, 8 if depth <= 8192 else 16
    elif R > 64:
        rows, deep, stages = 32, 64, 3
    elif dropout:
        rows, deep, stages = (32, 128, 3) if M >= 1024 else (16, 256, 3)
    else:
        rows, deep, stages = 64, 128, 5
    # of three steps a second launch would take longer than two of them
    steps = 1 if depth <= 3 * deep and not wide else triton.cdiv(depth, 2 * deep)
    split = _split(triton.cdiv(M, rows) * triton.cdiv(R, 64), steps, programs)
    if rows == 128:
        blocks = triton.cdiv(M, rows) * triton.cdiv(R, 32)
        split = split_in_rounds(blocks, M * R, depth, steps, facts.processors)
    return TileConfig(
        BLOCK_ROWS=rows,
        BLOCK_COLS=0,
        BLOCK_DEPTH=deep,
        SPLIT=split,
        CUBLAS=R > 32 or 16 < M <= 4096 or dtype.itemsize > 2,
        num_warps=warps,
        num_stages=stages,
    )


def _columns(
    op: str, M: int, cols: int, R: int, dtype: torch.dtype, wide: bool, dropout: bool, facts: DeviceFacts
) -> TileConfig:
    """Return tiles for a sum along the columns of an (M, cols) operand; ``wide``: adapters in float32."""
    programs, most = facts.processors, 0
    leave = R > 32 or M <= 64 or dtype.itemsize > 2
    if op == "lora_backward_a":
        # four warps keep a few bytes on the stack on sm80 with some releases of Triton
        warps = 8 if facts.arch == "sm80" else 4
        # float32 adapters take registers, of which large tiles leave enough where they were tried
        large = facts.arch == "sm90" and dtype is torch.bfloat16 and M >= 2048 and not dropout
        rows, width = (32, 64) if wide and not large else (64, 64)
        programs *= 4 if dropout or (wide and large and R <= 32) else 2
        most = 64 if wide and large and R > 32 else 0
        leave = leave or M <= 2048
    elif wide and facts.arch == "sm90" and dtype is torch.bfloat16 and R <= 32 and M >= 2048 <= cols:
        rows, width, warps, most = (128, 128, 8, 32) if R > 16 else (64, 128, 4, 0)
    elif wide or R > 32:
        rows, width, warps = 32, 64 if M > 64 and dtype is torch.bfloat16 else 32, 4
    elif R > 16:
        rows, width, warps = (64, 256, 8) if cols >= 2048 else (64, 128, 8)
        leave = leave or M <= 512
    elif cols >= 2048:
        rows, width, warps = (32, 512, 4) if M >= 8192 else (64, 256, 8)
        leave = leave or (M <= 2048 and cols > 8192)
    else:
        rows, width, warps = 64, 128, 8
    if op == "lora_backward_hidden_b" and not wide:
        # one read of dy in place of two: of so few rows both come from the cache
        leave = leave or M <= (256 if R % 16 else 128)
    if wide and dtype is not torch.bfloat16:
        warps = 8
    blocks, steps = triton.cdiv(cols, width), triton.cdiv(M, 2 * rows)
    if most == 64:
        # of a last block of no more than 32 ranks the kernel takes half
        half = triton.cdiv(blocks * triton.cdiv(R, 32), 2)
        split = split_in_rounds(half, cols * R, M, steps, facts.processors)
    else:
        split = _split(blocks * triton.cdiv(R, 64), steps, programs)
    tiles = TileConfig(BLOCK_ROWS=rows, BLOCK_COLS=width, BLOCK_DEPTH=0, num_warps=warps)
    return replace(tiles, SPLIT=split, MOST_RANKS=most, CUBLAS=leave)


def _for_amd(config: TileConfig) -> TileConfig:
    """Return ``config`` within 64 KiB of shared memory, where a stage more is a buffer more."""
    return replace(config, BLOCK_COLS=min(config.BLOCK_COLS, 128), num_stages=min(config.num_stages, 2))


_INTERPRETED = {
    "lora_hidden": TileConfig(BLOCK_ROWS=16, BLOCK_COLS=0, BLOCK_DEPTH=32, SPLIT=2),
    "lora_forward": TileConfig(BLOCK_ROWS=32, BLOCK_COLS=32, BLOCK_DEPTH=32, PERSISTENT=1),
    "lora_backward_hidden_b": TileConfig(BLOCK_ROWS=16, BLOCK_COLS=32, BLOCK_DEPTH=0, SPLIT=2),
    "lora_backward_a": TileConfig(BLOCK_ROWS=16, BLOCK_COLS=32, BLOCK_DEPTH=0, SPLIT=2),
    "lora_backward_input": TileConfig(BLOCK_ROWS=32, BLOCK_COLS=32, BLOCK_DEPTH=32, PERSISTENT=1),
}


TABLES = Path(__file__).parent / "_tables"


def table_names(facts: DeviceFacts) -> list[str]:
    """Return the file names of a device's tables: of its architecture, then of its product if it has one."""
    return [f"{'-'.join(words)}.json" for words in ([facts.arch], [facts.arch, facts.product]) if words[-1]]


@cache
def measured_rows(facts: DeviceFacts) -> dict[str, dict]:
    """Return the rows of a device's tables, by launch and sizes: its product's where there is one."""
    paths = [TABLES / name for name in table_names(facts)]
    found = [json.loads(path.read_text())["rows"] for path in paths if path.exists()]
    return {key: row for rows in found for key, row in rows.items()}


@lru_cache(maxsize=4096)
def pick(
    op: str,
    M: int,
    N: int,
    K: int,
    R: int,
    dtype: torch.dtype,
    facts: DeviceFacts,
    *,
    wide: bool = False,
    dropout: bool = False,
) -> TileConfig:
    """Return the tiles for a launch: the measured row for this size if there is one, else a heuristic.

    Args:
        op: one of ``OPS``.
        M, N, K, R: sizes, 0 for one that the pass does not have; tables hold M by powers of two.
        dtype: of x and dy. facts: of the device.
        wide: whether the adapters are float32 beside a 16-bit x. dropout: whether the pass makes a mask.
    """
    if facts.arch == "cpu":
        return _INTERPRETED[op]
    gemm = op in ("lora_forward", "lora_backward_input")
    cols, depth = (N, K) if op == "lora_forward" else (K, N)
    product = M, cols, depth, facts.processors
    few = gemm and few_tiles(op == "lora_forward", M, cols, R, facts.processors)
    if gemm and dtype.itemsize == 2 and R <= 64:
        most = 1 << max(M - 1, 0).bit_length()
        row = measured_rows(facts).get(f"{op} M={most} N={N} K={K}")
        if row is not None and not (wide and dropout):
            config = TileConfig(**row)
            few = few or (M < most and loses((config.BLOCK_ROWS, config.BLOCK_COLS), *product))
            return replace(config, CUBLAS=config.CUBLAS or few)
    wide = wide or dtype.itemsize > 2
    if gemm:
        large = M >= 1024 and triton_time((128, 256), *product) <= triton_time((128, 128), *product)
        config = _gemm(op, M, dtype, large, wide and dropout, facts)
        small = N * K < 2**22 or loses((config.BLOCK_ROWS, config.BLOCK_COLS), *product)
    elif op == "lora_hidden":
        config = _hidden(M, K, R, dtype, wide, dropout, facts)
        small = K < 2048
    else:
        config = _columns(op, M, K or N, R, dtype, wide, dropout, facts)
        small = N < 1024 if op == "lora_backward_hidden_b" else K < 2048
    # in small models the host is the slower part, and cuBLAS takes less of its time to launch
    config = replace(config, CUBLAS=config.CUBLAS or few or (small and M > 16))
    return _for_amd(config) if facts.arch.startswith("gfx") else config


def pick_for(
    op: str, big: torch.Tensor, small: torch.Tensor, N: int, K: int, R: int, seed: torch.Tensor | None = None
) -> TileConfig:
    """Return :func:`pick` for a pass over ``big`` (M, ...) beside an adapter's tensor."""
    return _pick_on(big.device, op, big.shape[0], N, K, R, big.dtype, small.dtype, seed is not None)


@lru_cache(maxsize=4096)
def _pick_on(
    device: torch.device,
    op: str,
    M: int,
    N: int,
    K: int,
    R: int,
    dtype: torch.dtype,
    adapters: torch.dtype,
    dropout: bool,
) -> TileConfig:
    wide = adapters != dtype
    return pick(op, M, N, K, R, dtype, device_facts(device), wide=wide, dropout=dropout)

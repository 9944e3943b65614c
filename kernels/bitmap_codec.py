"""A dense weight to its bitmap and values, and either encoding back to a dense weight."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._compressed import _bitmap_eights, _popcount, _unknown_one, as_pointer, columns_tile, fetch
from ._config import device_facts, tl_type
from ._launch import Launch, launch

__all__ = ["bitmap_decode", "bitmap_encode", "pruned_decode", "two_four_decode", "two_four_encode"]

TILE = 64
# shared memory of a program's own, a tile of values of 16 bits; named once, or it does not compile
_SHARED = ".shared .align 16 .b8 packed_values[8192];\nmov.b32 $0, packed_values;"
_PUT = "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.shared.b16 [$1], $2; mov.b32 $0, 0; }"
_GET = "ld.shared.b16 $0, [$1];"
_WORDS = {2: tl.int16, 4: tl.int32, 8: tl.int64}  # by bytes
MASK_WARPS = PACK_WARPS = 4
DECODE_WARPS = 1
PACK_ROWS = DECODE_ROWS = 16
PACK_STEP = 512


@triton.jit
def _bitmap_mask_kernel(
    w_ptr, mask_ptr, offset_ptr, counts_ptr, N, K, tiles_k, stride_wn, stride_wk,
    TILE: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    """mask, row_offset and the number of values of one tile of w

    Tensors   w (N, K), free strides; mask (tiles, TILE, 2) int32, row_offset (tiles, TILE) int16, counts
              (tiles + 1,) int32, a zero first; the last three contiguous.
    Program   one tile of TILE x TILE.
    Numerics  w as integers of its width: an entry is there if a bit other than the sign is set.
    Traffic   w read once.
    """
    tile = tl.program_id(0)
    offs_n = tile // tiles_k * TILE + tl.arange(0, TILE)
    offs_k = tile % tiles_k * TILE + tl.arange(0, TILE)
    lines = as_pointer(w_ptr, WORD) + offs_n.to(tl.int64) * stride_wn
    ptrs = lines[:, None] + (offs_k.to(tl.int64) * stride_wk)[None, :]
    w = tl.load(ptrs, mask=(offs_n < N)[:, None] & (offs_k < K)[None, :], other=0)
    present = ((w << 1) != 0).to(tl.int32)
    counts = tl.sum(present, 1)
    weights = 1 << (tl.arange(0, TILE) % 32)
    words = tl.sum(tl.reshape(present * weights[None, :], (TILE, 2, TILE // 2)), 2)

    line = tile.to(tl.int64) * TILE + tl.arange(0, TILE)
    tl.store(mask_ptr + line[:, None] * 2 + tl.arange(0, 2)[None, :], words)
    tl.store(offset_ptr + line, (tl.cumsum(counts, 0) - counts).to(tl.int16))
    tl.store(counts_ptr, 0, mask=tile == 0)
    tl.store(counts_ptr + 1 + tile, tl.sum(counts, 0))


@triton.jit
def _pairs(mask_ptr, offset_ptr, line, TILE: tl.constexpr, ROWS: tl.constexpr):
    """Of columns 2 p and 2 p + 1 of rows of a tile: two bits, and where the value of the first would be.

    (ROWS, TILE / 2) both, places from the start of the tile. A warp of 32 has a row, so that the values that
    it reads or writes lie side by side.
    """
    pair = tl.arange(0, TILE // 2)[None, :]
    # no known contiguity along rows, which threads would be laid out along
    line += (tl.arange(0, ROWS) * _unknown_one())[:, None] + 0 * pair
    bits = tl.load(as_pointer(mask_ptr, tl.int64) + line)
    offset = tl.load(offset_ptr + line).to(tl.int32)
    low, high = bits.to(tl.int32), (bits >> 32).to(tl.int32)
    shift = pair % 16 * 2
    below = (1 << shift) - 1
    before = _popcount(low & tl.where(pair < 16, below, -1)) + _popcount(high & tl.where(pair < 16, 0, below))
    return tl.where(pair < 16, low, high) >> shift, offset + before


@triton.jit
def _bitmap_pack_kernel(
    w_ptr, values_ptr, mask_ptr, offset_ptr, start_ptr, N, K, tiles_k, stride_wn, stride_wk,
    TILE: tl.constexpr, WORD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """values[at] = w[n, k], of the entries of one tile that are not zero

    Tensors   w (N, K), free strides; values (nnz,), mask (tiles, TILE, 2), row_offset (tiles, TILE) int16,
              tile_start (tiles + 1,).
    Program   ROWS rows of a tile of TILE x TILE, the last first, which the cache may still hold.
    Traffic   w and mask read once, values written once.
    """
    PARTS: tl.constexpr = TILE // ROWS
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    tile, row = pid // PARTS, pid % PARTS * ROWS
    offs_n = tile // tiles_k * TILE + row + tl.arange(0, ROWS)
    offs_k = tile % tiles_k * TILE + tl.arange(0, TILE // 2) * 2
    lines = as_pointer(w_ptr, WORD) + offs_n.to(tl.int64) * stride_wn
    ptrs = lines[:, None] + (offs_k.to(tl.int64) * stride_wk)[None, :]
    inside = (offs_n < N)[:, None]
    even = tl.load(ptrs, mask=inside & (offs_k < K)[None, :], other=0)
    odd = tl.load(ptrs + stride_wk, mask=inside & (offs_k + 1 < K)[None, :], other=0)

    two, at = _pairs(mask_ptr, offset_ptr, tile.to(tl.int64) * TILE + row, TILE, ROWS)
    ptrs = as_pointer(values_ptr, WORD) + tl.load(start_ptr + tile).to(tl.int64) + at
    tl.store(ptrs, even, mask=(two & 1) != 0)
    tl.store(ptrs + (two & 1), odd, mask=(two & 2) != 0)


@triton.jit
def _bitmap_pack_shared_kernel(
    w_ptr, values_ptr, mask_ptr, offset_ptr, start_ptr, N, K, tiles_k, stride_wn, stride_wk,
    SHARED: tl.constexpr, PUT: tl.constexpr, GET: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """values[at] = w[n, k], of the entries of one tile that are not zero, for words of 16 bits on NVIDIA

    Tensors   as _bitmap_pack_kernel.
    Program   a tile of TILE x TILE, the last first, which the cache may still hold: its values meet in shared
              memory, from where they are stored side by side, in whole sectors but for the ends.
    Traffic   w and mask read once, values written once.
    Requires  TILE 64.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    rows, eights, column = tl.arange(0, TILE), tl.arange(0, TILE // 8), tl.arange(0, 8)
    offs_n = tile // tiles_k * TILE + rows
    offs_k = tile % tiles_k * TILE + eights[:, None] * 8 + column[None, :]
    lines = as_pointer(w_ptr, tl.int16) + offs_n.to(tl.int64) * stride_wn
    ptrs = lines[:, None, None] + (offs_k.to(tl.int64) * stride_wk)[None]
    w = tl.load(ptrs, mask=(offs_n < N)[:, None, None] & (offs_k < K)[None], other=0)

    line = tile.to(tl.int64) * TILE + (rows * _unknown_one())[:, None] + 0 * eights[None, :]
    bits = tl.load(as_pointer(mask_ptr, tl.int64) + line)
    first = tl.load(offset_ptr + line).to(tl.int32)
    eight, first = _bitmap_eights(bits, first, TILE // 8)
    start, end = tl.load(start_ptr + tile), tl.load(start_ptr + tile + 1)

    shared = tl.inline_asm_elementwise(SHARED, "=r,r", [tile], dtype=tl.int32, is_pure=False, pack=1)
    there = (eight[:, :, None] >> column[None, None, :]) & 1
    place = first[:, :, None] + tl.cumsum(there, 2) - there
    tl.inline_asm_elementwise(
        PUT, "=r,r,h,r", [shared + place * 2, w, there], dtype=tl.int32, is_pure=False, pack=1
    )
    tl.debug_barrier()

    # from the beginning of a line of 128 bytes
    ahead = (start % 64).to(tl.int32)
    count = (end - start).to(tl.int32)
    values_ptr = as_pointer(values_ptr, tl.int16) + (start - ahead)
    for i in tl.range(0, ahead + count, STEP, num_stages=1):
        at = i + tl.arange(0, STEP) - ahead
        value = tl.inline_asm_elementwise(
            GET, "=h,r", [shared + (at & (TILE * TILE - 1)) * 2], dtype=tl.int16, is_pure=False, pack=1
        )
        tl.store(values_ptr + (at + ahead), value, mask=(at >= 0) & (at < count))


@triton.jit
def _bitmap_decode_kernel(
    values_ptr, mask_ptr, offset_ptr, start_ptr, w_ptr, N, K, tiles_k,
    TILE: tl.constexpr, WORD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """w[n, k] = values[at], or zero where the mask has none, of one tile

    Tensors   as _bitmap_pack_kernel; w (N, K) contiguous.
    Program   ROWS rows of a tile of TILE x TILE.
    Traffic   values and mask read once, w written once.
    """
    PARTS: tl.constexpr = TILE // ROWS
    tile, row = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS * ROWS
    two, at = _pairs(mask_ptr, offset_ptr, tile.to(tl.int64) * TILE + row, TILE, ROWS)
    ptrs = as_pointer(values_ptr, WORD) + tl.load(start_ptr + tile).to(tl.int64) + at
    even = tl.load(ptrs, mask=(two & 1) != 0, other=0)
    odd = tl.load(ptrs + (two & 1), mask=(two & 2) != 0, other=0)
    w = tl.reshape(tl.join(even, odd), (ROWS, TILE))

    offs_n = tile // tiles_k * TILE + row + tl.arange(0, ROWS)
    offs_k = tile % tiles_k * TILE + tl.arange(0, TILE)
    ptrs = as_pointer(w_ptr, WORD) + offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]
    tl.store(ptrs, w, mask=(offs_n < N)[:, None] & (offs_k < K)[None, :])


@triton.jit
def _two_four_kernel(
    w_ptr, values_ptr, index_ptr, lost_ptr, N, K, groups, stride_wn, stride_wk,
    COUNT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """values and index of one block of w: two entries and four bits of every four columns

    Tensors   w (N, K), free strides; values (N, 2 groups), index (N, groups / 4) int16, contiguous;
              lost () int64, to which the entries that found no place are added (integers: in any order).
    Program   one block of w.
    Traffic   w read once, the result written once.
    Requires  BLOCK_K a multiple of 16; groups a multiple of 4.
    """
    blocks_k = tl.cdiv(K, BLOCK_K)
    row, k = tl.program_id(0) // blocks_k * BLOCK_N, tl.program_id(0) % blocks_k * BLOCK_K
    GROUPS: tl.constexpr = BLOCK_K // 4
    offs_n, offs_k = row + tl.arange(0, BLOCK_N), k + tl.arange(0, BLOCK_K)
    ptrs = w_ptr + offs_n[:, None].to(tl.int64) * stride_wn + offs_k[None, :].to(tl.int64) * stride_wk
    w = tl.load(ptrs, mask=(offs_n < N)[:, None] & (offs_k < K)[None, :], other=0.0)
    even, odd = tl.split(tl.reshape(w, (BLOCK_N, GROUPS, 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)

    if COUNT:
        left, right = (w0 != 0).to(tl.int32) + (w1 != 0), (w2 != 0).to(tl.int32) + (w3 != 0)
        lost = tl.sum(tl.sum(tl.maximum(left + right - 2, 0), 1), 0)
        tl.atomic_add(lost_ptr, lost.to(tl.int64), mask=lost > 0, sem="relaxed")

    # the last one, or column 1; and the one before it, or column 0
    second = tl.where(w3 != 0, 3, tl.where(w2 != 0, 2, 1))
    first = tl.where((w2 != 0) & (second == 3), 2, 0)
    first = tl.where((w1 != 0) & (second > 1), 1, first)
    first = tl.where(w0 != 0, 0, first)
    v0 = tl.where(first == 0, w0, tl.where(first == 1, w1, w2))
    v1 = tl.where(second == 1, w1, tl.where(second == 2, w2, w3))
    zero = tl.zeros_like(v0)
    values = tl.join(tl.where(v0 != 0, v0, zero), tl.where(v1 != 0, v1, zero))

    offs_v = k // 2 + tl.arange(0, BLOCK_K // 2)
    ptrs = values_ptr + offs_n[:, None].to(tl.int64) * (2 * groups) + offs_v[None, :]
    inside = (offs_n < N)[:, None] & (offs_v < 2 * groups)[None, :]
    tl.store(ptrs, tl.reshape(values, (BLOCK_N, BLOCK_K // 2)), mask=inside)
    shifts = 4 * (tl.arange(0, GROUPS) % 4)
    words = tl.sum(tl.reshape((first | second << 2) << shifts[None, :], (BLOCK_N, GROUPS // 4, 4)), 2)
    offs_i = k // 16 + tl.arange(0, GROUPS // 4)
    ptrs = index_ptr + offs_n[:, None].to(tl.int64) * (groups // 4) + offs_i[None, :]
    tl.store(ptrs, words.to(tl.int16), mask=(offs_n < N)[:, None] & (offs_i < groups // 4)[None, :])


@triton.jit
def _two_four_decode_kernel(
    values_ptr, index_ptr, w_ptr, N, K, eights,
    PAIRED: tl.constexpr, DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """w[n, k] = the entry at n, k of a 2:4 weight, or zero

    Tensors   as _compressed.fetch says; w (N, K) contiguous.
    Program   one block of w.
    Traffic   the compressed weight once, w written once.
    Requires  BLOCK_N a divisor of 64, BLOCK_K a multiple.
    """
    blocks_k = tl.cdiv(K, BLOCK_K)
    row, k = tl.program_id(0) // blocks_k * BLOCK_N, tl.program_id(0) % blocks_k * BLOCK_K
    GROUPS: tl.constexpr = BLOCK_K // 8
    first, second = fetch(
        values_ptr, index_ptr, index_ptr, index_ptr, 0, N, eights, row, k, True, PAIRED, BLOCK_N, GROUPS
    )
    w = columns_tile(values_ptr, first, second, True, PAIRED, False, DTYPE, BLOCK_N, GROUPS)
    offs_n, offs_k = row + tl.arange(0, BLOCK_N), k + tl.arange(0, BLOCK_K)
    ptrs = w_ptr + offs_n[:, None].to(tl.int64) * K + offs_k[None, :]
    tl.store(ptrs, w, mask=(offs_n < N)[:, None] & (offs_k < K)[None, :])


def _tiles(w: Tensor) -> tuple[int, int]:
    return -(-w.shape[0] // TILE), -(-w.shape[1] // TILE)


def _prepare_mask(w: Tensor, mask: Tensor, row_offset: Tensor, counts: Tensor) -> Launch:
    tiles_n, tiles_k = _tiles(w)
    return Launch.of(_bitmap_mask_kernel, (tiles_n * tiles_k,))(
        w, mask, row_offset, counts, *w.shape, tiles_k, *w.stride(),
        TILE=TILE, WORD=_WORDS[w.element_size()], num_warps=MASK_WARPS, enable_fp_fusion=True,
    )  # fmt: skip


def _prepare_pack(w: Tensor, mask: Tensor, row_offset: Tensor, tile_start: Tensor, values: Tensor) -> Launch:
    tiles_n, tiles_k = _tiles(w)
    if w.element_size() == 2 and device_facts(w.device).arch.startswith("sm"):
        return Launch.of(_bitmap_pack_shared_kernel, (tiles_n * tiles_k,))(
            w, values, mask, row_offset, tile_start, *w.shape, tiles_k, *w.stride(),
            SHARED=_SHARED, PUT=_PUT, GET=_GET, TILE=TILE, STEP=PACK_STEP,
            num_warps=PACK_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return Launch.of(_bitmap_pack_kernel, (tiles_n * tiles_k * (TILE // PACK_ROWS),))(
        w, values, mask, row_offset, tile_start, *w.shape, tiles_k, *w.stride(),
        TILE=TILE, WORD=_WORDS[w.element_size()], ROWS=PACK_ROWS,
        num_warps=PACK_WARPS, enable_fp_fusion=True,
    )  # fmt: skip


def bitmap_encode(w: Tensor) -> list[Tensor]:
    """Return values, mask, row_offset and tile_start of ``w``, (N, K); waits for the GPU to count once."""
    tiles = _tiles(w)
    count, device = tiles[0] * tiles[1], w.device
    mask = torch.empty(*tiles, TILE, 2, dtype=torch.int32, device=device)
    row_offset = torch.empty(*tiles, TILE, dtype=torch.int16, device=device)
    if not count:
        return [w.new_empty(0), mask, row_offset, torch.zeros(1, dtype=torch.int32, device=device)]
    # a zero comes first: the running sum is where tiles start
    counts = torch.empty(count + 1, dtype=torch.int32, device=device)
    launch(_prepare_mask, (w,), fresh=(mask, row_offset, counts))
    tile_start = counts.cumsum(0, dtype=torch.int32 if w.numel() < 2**31 else torch.int64)
    nnz = int(tile_start[-1])
    if nnz < 2**31:
        tile_start = tile_start.int()
    values = w.new_empty(nnz)
    if nnz:
        # a plan serves any number of values
        launch(_prepare_pack, (w, mask, row_offset, tile_start), fresh=(values,))
    return [values, mask, row_offset, tile_start]


def _prepare_two_four(w: Tensor, values: Tensor, index: Tensor, lost: Tensor | None) -> Launch:
    (N, K), BLOCK_N, BLOCK_K = w.shape, 8, 256
    return Launch.of(_two_four_kernel, (triton.cdiv(N, BLOCK_N) * triton.cdiv(K, BLOCK_K),))(
        w, values, index, lost, N, K, index.shape[1] * 4, *w.stride(),
        COUNT=lost is not None, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def two_four_encode(w: Tensor, lost: Tensor | None = None) -> list[Tensor]:
    """Return values and index of ``w``, (N, K).

    Of more than two entries in a group some are left out: their number is added to ``lost``, () int64.
    """
    N, sixteens = w.shape[0], triton.cdiv(w.shape[1], 16)
    values = w.new_empty(N, 8 * sixteens)
    index = torch.empty(N, sixteens, dtype=torch.int16, device=w.device)
    if w.numel():
        launch(_prepare_two_four, (w, values, index, lost))
    return [values, index]


def _prepare_bitmap_decode(
    w: Tensor, mask: Tensor, row_offset: Tensor, tile_start: Tensor, values: Tensor
) -> Launch:
    tiles_n, tiles_k = _tiles(w)
    return Launch.of(_bitmap_decode_kernel, (tiles_n * tiles_k * (TILE // DECODE_ROWS),))(
        values, mask, row_offset, tile_start, w, *w.shape, tiles_k,
        TILE=TILE, WORD=_WORDS[w.element_size()], ROWS=DECODE_ROWS,
        num_warps=DECODE_WARPS, enable_fp_fusion=True,
    )  # fmt: skip


def _prepare_two_four_decode(w: Tensor, values: Tensor, index: Tensor) -> Launch:
    (N, K), BLOCK_N, BLOCK_K = w.shape, 64, 64
    return Launch.of(_two_four_decode_kernel, (triton.cdiv(N, BLOCK_N) * triton.cdiv(K, BLOCK_K),))(
        values, index, w, N, K, index.shape[1] * 2,
        PAIRED=w.element_size() == 2, DTYPE=tl_type(w.dtype), BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def pruned_decode(packed: list[Tensor], N: int, K: int) -> Tensor:
    """Return the dense weight, (N, K), of either encoding."""
    w = packed[0].new_empty(N, K)
    if w.numel():
        values, *rest = packed
        if not values.numel():
            w.zero_()
        elif len(rest) == 1:
            launch(_prepare_two_four_decode, (w, values, *rest))
        else:
            # its values have the dtype of w, and any number
            launch(_prepare_bitmap_decode, (w, *rest), fresh=(values,))
    return w


def bitmap_decode(
    values: Tensor, mask: Tensor, row_offset: Tensor, tile_start: Tensor, N: int, K: int
) -> Tensor:
    """Return the dense (N, K) that :func:`bitmap_encode` was given."""
    return pruned_decode([values, mask, row_offset, tile_start], N, K)


def two_four_decode(values: Tensor, index: Tensor, N: int, K: int) -> Tensor:
    """Return the dense (N, K) that ``reference.two_four_encode`` was given."""
    return pruned_decode([values, index], N, K)

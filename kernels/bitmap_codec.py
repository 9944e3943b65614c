"""A dense weight to its bitmap and values, and either encoding back to a dense weight."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._compressed import columns_tile, fetch, first_value
from ._config import device_facts
from ._launch import Launch, launch
from ._packed import packed_args

__all__ = ["bitmap_decode", "bitmap_encode", "pruned_decode", "two_four_decode", "two_four_encode"]

TILE = 64


@triton.jit
def _load_tile(w_ptr, N, K, stride_wn, stride_wk, tile_n, tile_k, TILE: tl.constexpr):
    offs_n, offs_k = tile_n * TILE + tl.arange(0, TILE), tile_k * TILE + tl.arange(0, TILE)
    ptrs = w_ptr + offs_n[:, None].to(tl.int64) * stride_wn + offs_k[None, :].to(tl.int64) * stride_wk
    return tl.load(ptrs, mask=(offs_n < N)[:, None] & (offs_k < K)[None, :], other=0.0)


@triton.jit
def _bitmap_mask_kernel(
    w_ptr, mask_ptr, offset_ptr, counts_ptr, N, K, stride_wn, stride_wk, TILE: tl.constexpr
):
    """mask, row_offset and the number of values of one tile of w

    Tensors   w (N, K), free strides; mask (tiles, TILE, 2) int32, row_offset (tiles, TILE) int16, counts
              (tiles,) int32; the last three contiguous.
    Program   one tile of TILE x TILE.
    Traffic   w read once.
    """
    tile_n, tile_k = tl.program_id(0), tl.program_id(1)
    tile = tile_n.to(tl.int64) * tl.num_programs(1) + tile_k
    w = _load_tile(w_ptr, N, K, stride_wn, stride_wk, tile_n, tile_k, TILE)

    present = (w != 0).to(tl.int32)
    counts = tl.sum(present, 1)
    weights = 1 << (tl.arange(0, TILE) % 32)
    words = tl.sum(tl.reshape(present * weights[None, :], (TILE, 2, TILE // 2)), 2)

    lines = tile * TILE + tl.arange(0, TILE)
    tl.store(mask_ptr + lines[:, None] * 2 + tl.arange(0, 2)[None, :], words)
    tl.store(offset_ptr + lines, (tl.cumsum(counts, 0) - counts).to(tl.int16))
    tl.store(counts_ptr + tile, tl.sum(counts, 0))


@triton.jit
def _bitmap_pack_kernel(
    w_ptr, offset_ptr, start_ptr, values_ptr, N, K, stride_wn, stride_wk, TILE: tl.constexpr
):
    """values[start + offset + rank] = w[n, k], of the entries of one tile that are not zero

    Tensors   w (N, K), free strides; row_offset (tiles, TILE) int16, tile_start (tiles + 1,), values (nnz,).
    Program   one tile of TILE x TILE; rank counts the entries before k in its row of the tile.
    Traffic   w read once, values written once.
    """
    tile_n, tile_k = tl.program_id(0), tl.program_id(1)
    tile = tile_n.to(tl.int64) * tl.num_programs(1) + tile_k
    w = _load_tile(w_ptr, N, K, stride_wn, stride_wk, tile_n, tile_k, TILE)

    present = (w != 0).to(tl.int32)
    rank = tl.cumsum(present, 1) - present
    offset = tl.load(offset_ptr + tile * TILE + tl.arange(0, TILE)).to(tl.int32)

    at = tl.load(start_ptr + tile) + (offset[:, None] + rank)
    tl.store(values_ptr + at, w, mask=present != 0)


@triton.jit
def _two_four_kernel(
    w_ptr, values_ptr, index_ptr, N, K, groups, stride_wn, stride_wk,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """values and index of one block of w: two entries and four bits of every four columns

    Tensors   w (N, K), free strides; values (N, 2 groups), index (N, groups / 4) int16, contiguous.
    Program   one block of w.
    Traffic   w read once, the result written once.
    Requires  BLOCK_K a multiple of 16; groups a multiple of 4.
    """
    row, k = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_K
    GROUPS: tl.constexpr = BLOCK_K // 4
    offs_n, offs_k = row + tl.arange(0, BLOCK_N), k + tl.arange(0, BLOCK_K)
    ptrs = w_ptr + offs_n[:, None].to(tl.int64) * stride_wn + offs_k[None, :].to(tl.int64) * stride_wk
    w = tl.load(ptrs, mask=(offs_n < N)[:, None] & (offs_k < K)[None, :], other=0.0)
    even, odd = tl.split(tl.reshape(w, (BLOCK_N, GROUPS, 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)

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
def _decode_kernel(
    values_ptr, bits_ptr, offset_ptr, start_ptr, w_ptr, N, K, across,
    TWO_FOUR: tl.constexpr, PAIRED: tl.constexpr, PTX: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """w[n, k] = the entry at n, k of a compressed weight, or zero

    Tensors   as _compressed.fetch says; w (N, K) contiguous.
    Program   one block of w.
    Traffic   the compressed weight once, w written once.
    Requires  BLOCK_N a divisor of 64, BLOCK_K a multiple.
    """
    row, k = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_K
    GROUPS: tl.constexpr = BLOCK_K // 8
    origin = first_value(start_ptr, across, row, TWO_FOUR)
    first, second = fetch(
        values_ptr, bits_ptr, offset_ptr, start_ptr, origin, N, across, row, k,
        TWO_FOUR, PAIRED, BLOCK_N, GROUPS,
    )  # fmt: skip
    w = columns_tile(values_ptr + origin, first, second, TWO_FOUR, PAIRED, PTX, DTYPE, BLOCK_N, GROUPS)
    offs_n, offs_k = row + tl.arange(0, BLOCK_N), k + tl.arange(0, BLOCK_K)
    ptrs = w_ptr + offs_n[:, None].to(tl.int64) * K + offs_k[None, :]
    tl.store(ptrs, w, mask=(offs_n < N)[:, None] & (offs_k < K)[None, :])


def _tiles(w: Tensor) -> tuple[int, int]:
    return triton.cdiv(w.shape[0], TILE), triton.cdiv(w.shape[1], TILE)


def _prepare_mask(w: Tensor, mask: Tensor, row_offset: Tensor, counts: Tensor) -> Launch:
    return Launch.of(_bitmap_mask_kernel, _tiles(w))(
        w, mask, row_offset, counts, *w.shape, *w.stride(),
        TILE=TILE, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def _prepare_pack(w: Tensor, row_offset: Tensor, tile_start: Tensor, values: Tensor) -> Launch:
    return Launch.of(_bitmap_pack_kernel, _tiles(w))(
        w, row_offset, tile_start, values, *w.shape, *w.stride(),
        TILE=TILE, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def bitmap_encode(w: Tensor) -> list[Tensor]:
    """Return values, mask, row_offset and tile_start of ``w``, (N, K); waits for the GPU to count once."""
    tiles = _tiles(w)
    mask = torch.empty(*tiles, TILE, 2, dtype=torch.int32, device=w.device)
    row_offset = torch.empty(*tiles, TILE, dtype=torch.int16, device=w.device)
    counts = torch.empty(tiles[0] * tiles[1], dtype=torch.int32, device=w.device)
    if w.numel():
        launch(_prepare_mask, (w, mask, row_offset, counts))
    ends = counts.cumsum(0)
    nnz = int(ends[-1]) if w.numel() else 0
    tile_start = torch.zeros(
        ends.numel() + 1, dtype=torch.int32 if nnz < 2**31 else torch.int64, device=w.device
    )
    tile_start[1:] = ends
    values = w.new_empty(nnz)
    if nnz:
        launch(_prepare_pack, (w, row_offset, tile_start, values))
    return [values, mask, row_offset, tile_start]


def _prepare_two_four(w: Tensor, values: Tensor, index: Tensor) -> Launch:
    (N, K), BLOCK_N, BLOCK_K = w.shape, 16, 256
    return Launch.of(_two_four_kernel, (triton.cdiv(N, BLOCK_N), triton.cdiv(K, BLOCK_K)))(
        w, values, index, N, K, index.shape[1] * 4, *w.stride(),
        BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def two_four_encode(w: Tensor) -> list[Tensor]:
    """Return values and index of ``w``, (N, K); of more than two entries in a group some are lost."""
    N, sixteens = w.shape[0], triton.cdiv(w.shape[1], 16)
    values = w.new_empty(N, 8 * sixteens)
    index = torch.empty(N, sixteens, dtype=torch.int16, device=w.device)
    if w.numel():
        launch(_prepare_two_four, (w, values, index))
    return [values, index]


def _prepare_decode(w: Tensor, *packed: Tensor) -> Launch:
    (N, K), BLOCK_N, BLOCK_K = w.shape, 64, 64
    pointers, across, constants = packed_args(packed, w.dtype, device_facts(w.device))
    return Launch.of(_decode_kernel, (triton.cdiv(N, BLOCK_N), triton.cdiv(K, BLOCK_K)))(
        *pointers, w, N, K, across,
        **constants, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def pruned_decode(packed: list[Tensor], N: int, K: int) -> Tensor:
    """Return the dense weight, (N, K), of either encoding."""
    w = packed[0].new_empty(N, K)
    if w.numel():
        if packed[0].numel():
            launch(_prepare_decode, (w, *packed))
        else:
            w.zero_()
    return w


def bitmap_decode(
    values: Tensor, mask: Tensor, row_offset: Tensor, tile_start: Tensor, N: int, K: int
) -> Tensor:
    """Return the dense (N, K) that :func:`bitmap_encode` was given."""
    return pruned_decode([values, mask, row_offset, tile_start], N, K)


def two_four_decode(values: Tensor, index: Tensor, N: int, K: int) -> Tensor:
    """Return the dense (N, K) that ``reference.two_four_encode`` was given."""
    return pruned_decode([values, index], N, K)

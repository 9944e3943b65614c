"""A skinny product along the columns of a big operand: da = dhᵀ drop(x), and db = dyᵀ h."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._config import TileConfig, aligned, block_rank, dot_precision, small_tiles, tl_type
from ._launch import Launch, launch
from ._sum_parts import sum_parts
from ._tiles import dot, keep_tile, wide


@triton.jit
def _correlate_block(
    t_ptr, f_ptr, seed_ptr, out_ptr,
    rows, cols, R, width, rows_each, scale, threshold,
    stride_trow, stride_tcol, stride_frow, stride_fr, stride_ocol, stride_or, rank,
    USE_DROPOUT: tl.constexpr, BY_COLS: tl.constexpr, PRECISION: tl.constexpr, ACC_TYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """What a program of the kernel below does, for BLOCK_R ranks from ``rank`` on."""
    col = tl.program_id(0) * BLOCK_COLS
    part = tl.program_id(2)
    first = part * rows_each
    offs_col = col + tl.arange(0, BLOCK_COLS)
    offs_r = rank + tl.arange(0, BLOCK_R)
    offs_row = first + tl.arange(0, BLOCK_ROWS)
    t_ptrs = (
        t_ptr + offs_row[:, None].to(tl.int64) * stride_trow + offs_col[None, :].to(tl.int64) * stride_tcol
    )
    f_ptrs = f_ptr + offs_row[:, None].to(tl.int64) * stride_frow + offs_r[None, :].to(tl.int64) * stride_fr
    # a width that is known to be a multiple of 16 lets rows of f be read 16 bytes at a time
    mask_col, mask_r = offs_col < cols, offs_r < width
    kept = R if BY_COLS else width
    if USE_DROPOUT:
        seed = tl.load(seed_ptr)

    acc, rest = tl.zeros((BLOCK_COLS, BLOCK_R), ACC_TYPE), tl.zeros((BLOCK_COLS, BLOCK_R), ACC_TYPE)
    for row in range(first, min(first + rows_each, rows), BLOCK_ROWS):
        mask_row = row + tl.arange(0, BLOCK_ROWS) < rows
        t = tl.load(t_ptrs, mask=mask_row[:, None] & mask_col[None, :], other=0.0)
        f = tl.load(f_ptrs, mask=mask_row[:, None] & mask_r[None, :], other=0.0)
        if USE_DROPOUT:
            keep = keep_tile(seed, row, col, threshold, BLOCK_ROWS, BLOCK_COLS)
            t = tl.where(keep, t, tl.zeros_like(t))
        acc, rest = dot(t.T, f, acc, rest, PRECISION)
        t_ptrs += wide(BLOCK_ROWS) * stride_trow
        f_ptrs += wide(BLOCK_ROWS) * stride_frow

    offset = part.to(tl.int64) * cols * kept
    out_ptrs = out_ptr + offset + offs_col[:, None].to(tl.int64) * stride_ocol + offs_r[None, :] * stride_or
    result = ((acc + rest) * scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, result, mask=mask_col[:, None] & (offs_r < kept)[None, :])


@triton.jit(do_not_specialize=["R"])
def _correlate_kernel(
    t_ptr, f_ptr, seed_ptr, out_ptr,
    rows, cols, R, width, rows_each, scale, threshold,
    stride_trow, stride_tcol, stride_frow, stride_fr, stride_ocol, stride_or,
    USE_DROPOUT: tl.constexpr, BY_COLS: tl.constexpr, PRECISION: tl.constexpr, ACC_TYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_R: tl.constexpr,
    HALVES: tl.constexpr,
):  # fmt: skip
    """out[s, j, r] = scale * sum_i drop(t)[i, j] f[i, r],  i in the s-th share of rows

    Tensors   t (rows, cols)  f (rows, width)  out: parts of cols·R elements, or without BY_COLS cols·width,
              strides inside a part free; other strides free. R ≤ width; columns of f from R on go nowhere.
    Program   BLOCK_COLS columns, BLOCK_R ranks and one share of the rows, walked in order. With HALVES
              half as many ranks where there are no more left.
    Numerics  products as _tiles.dot says, sums in ACC_TYPE; the mask is exact and its factor is in scale.
    Traffic   t once per BLOCK_R ranks, f once per block of columns (from L2), out written once.
    Requires  BLOCK_COLS a multiple of 32, rows_each a multiple of BLOCK_ROWS.
    Source    derived in ops/lora_linear.py.
    """
    rank = tl.program_id(1) * BLOCK_R
    if HALVES and width - rank <= BLOCK_R // 2:
        _correlate_block(
            t_ptr, f_ptr, seed_ptr, out_ptr, rows, cols, R, width, rows_each, scale, threshold,
            stride_trow, stride_tcol, stride_frow, stride_fr, stride_ocol, stride_or, rank,
            USE_DROPOUT, BY_COLS, PRECISION, ACC_TYPE, BLOCK_ROWS, BLOCK_COLS, BLOCK_R // 2,
        )  # fmt: skip
    else:
        _correlate_block(
            t_ptr, f_ptr, seed_ptr, out_ptr, rows, cols, R, width, rows_each, scale, threshold,
            stride_trow, stride_tcol, stride_frow, stride_fr, stride_ocol, stride_or, rank,
            USE_DROPOUT, BY_COLS, PRECISION, ACC_TYPE, BLOCK_ROWS, BLOCK_COLS, BLOCK_R,
        )  # fmt: skip


@lru_cache(maxsize=4096)
def _shares(
    rows: int, R: int, dtype: torch.dtype, factors: torch.dtype, reads_rows: bool, config: TileConfig
) -> tuple[TileConfig, str, int, int, int]:
    """Return config, PRECISION, BLOCK_R, the rows of one share, and the number of shares."""
    precision, _ = dot_precision(dtype, factors)
    most_ranks = config.MOST_RANKS or {"native": 64, "split": 32}.get(precision, 16)
    if not reads_rows:
        config, most_ranks = small_tiles(config, dtype), 16
    each = triton.cdiv(triton.cdiv(rows, config.SPLIT), config.BLOCK_ROWS) * config.BLOCK_ROWS
    return config, precision, block_rank(R, most_ranks), each, triton.cdiv(rows, each) if rows else 1


def _prepare(
    t: Tensor,
    factor: Tensor,
    seed: Tensor | None,
    target: Tensor,
    stride_ocol: int,
    stride_or: int,
    R: int,
    threshold: int,
    config: TileConfig,
) -> Launch:
    (rows, cols), width = t.shape, factor.shape[1]
    config, precision, BLOCK_R, each, parts = _shares(rows, width, t.dtype, factor.dtype, aligned(t), config)
    acc_type = torch.float64 if t.dtype is torch.float64 else torch.float32
    grid = (triton.cdiv(cols, config.BLOCK_COLS), triton.cdiv(width, BLOCK_R), parts)
    return Launch.of(_correlate_kernel, grid)(
        t, factor, seed, target,
        rows, cols, R, width, each, 65536 / (65536 - threshold), threshold,
        t.stride(0), t.stride(1), factor.stride(0), factor.stride(1), stride_ocol, stride_or,
        USE_DROPOUT=seed is not None, BY_COLS=stride_ocol == 1,
        PRECISION=precision, ACC_TYPE=tl_type(acc_type),
        BLOCK_ROWS=config.BLOCK_ROWS, BLOCK_COLS=config.BLOCK_COLS, BLOCK_R=BLOCK_R,
        HALVES=32 <= BLOCK_R == config.MOST_RANKS,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip


def correlate(
    t: Tensor, factor: Tensor, seed: Tensor | None, threshold: int, out: Tensor, config: TileConfig
) -> Tensor:
    """Write ``out = drop(t)ᵀ factor``, (cols, R); t (rows, cols), factor (rows, R).

    More columns of factor than R are not used. ``out`` or its transpose must be contiguous.
    """
    rows, R, width, dtype = t.shape[0], out.shape[1], factor.shape[1], t.dtype
    if out.numel() == 0:
        return out
    # parts lie as the result lies in memory, so that adding them up is a flat sum
    by_cols = out.stride(0) == 1
    flat = out.T if by_cols else out
    parts = _shares(rows, width, dtype, factor.dtype, aligned(t), config)[-1]
    target, strides, shape, apart = flat, out.stride(), flat.shape, parts > 1
    if not by_cols and R != width:
        # rows of parts begin on 16 bytes; adding them up cuts them
        strides, shape, apart = (width, 1), (out.shape[0], width), True
    if apart:
        acc_type = torch.float64 if dtype is torch.float64 else torch.float32
        target = t.new_empty(parts, *shape, dtype=acc_type)
    launch(_prepare, (t, factor, seed, target), *strides, R, threshold, config)
    if apart:
        sum_parts((target, flat))
    return out


def correlate_parts(t: Tensor, factor: Tensor, config: TileConfig) -> Tensor:
    """Return the parts of ``tᵀ factor``, (S, cols, R), of which it is the sum."""
    (rows, cols), R, dtype = t.shape, factor.shape[1], t.dtype
    parts = _shares(rows, R, dtype, factor.dtype, aligned(t), config)[-1]
    acc_type = torch.float64 if dtype is torch.float64 else torch.float32
    target = t.new_empty(parts, cols, R, dtype=acc_type)
    if target.numel():
        launch(_prepare, (t, factor, None, target), R, 1, R, 0, config)
    return target

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
def _correlate_kernel(
    t_ptr, f_ptr, seed_ptr, out_ptr,
    rows, cols, R, rows_each, scale, threshold,
    stride_trow, stride_tcol, stride_frow, stride_fr, stride_ocol, stride_or,
    USE_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, ACC_TYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[s, j, r] = scale * sum_i drop(t)[i, j] f[i, r],  i in the s-th share of rows

    Tensors   t (rows, cols)  f (rows, R)  out: parts of cols·R elements, strides inside a part free;
              other strides free.
    Program   BLOCK_COLS columns, BLOCK_R ranks and one share of the rows, walked in order.
    Numerics  products as _tiles.dot says, sums in ACC_TYPE; the mask is exact and its factor is in scale.
    Traffic   t once per BLOCK_R ranks, f once per block of columns (from L2), out written once.
    Requires  BLOCK_COLS a multiple of 32, rows_each a multiple of BLOCK_ROWS.
    Source    derived in ops/lora_linear.py.
    """
    col = tl.program_id(0) * BLOCK_COLS
    part = tl.program_id(2)
    first = part * rows_each
    offs_col = col + tl.arange(0, BLOCK_COLS)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_row = first + tl.arange(0, BLOCK_ROWS)
    t_ptrs = (
        t_ptr + offs_row[:, None].to(tl.int64) * stride_trow + offs_col[None, :].to(tl.int64) * stride_tcol
    )
    f_ptrs = f_ptr + offs_row[:, None].to(tl.int64) * stride_frow + offs_r[None, :].to(tl.int64) * stride_fr
    mask_col, mask_r = offs_col < cols, offs_r < R
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

    offset = part.to(tl.int64) * cols * R
    out_ptrs = out_ptr + offset + offs_col[:, None].to(tl.int64) * stride_ocol + offs_r[None, :] * stride_or
    result = ((acc + rest) * scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, result, mask=mask_col[:, None] & mask_r[None, :])


@lru_cache(maxsize=4096)
def _shares(
    rows: int, R: int, dtype: torch.dtype, factors: torch.dtype, reads_rows: bool, config: TileConfig
) -> tuple[TileConfig, str, int, int, int]:
    """Return config, PRECISION, BLOCK_R, the rows of one share, and the number of shares."""
    precision, _ = dot_precision(dtype, factors)
    most_ranks = {"native": 64, "split": 32}.get(precision, 16)
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
    threshold: int,
    config: TileConfig,
) -> Launch:
    (rows, cols), R = t.shape, factor.shape[1]
    config, precision, BLOCK_R, each, parts = _shares(rows, R, t.dtype, factor.dtype, aligned(t), config)
    acc_type = torch.float64 if t.dtype is torch.float64 else torch.float32
    grid = (triton.cdiv(cols, config.BLOCK_COLS), triton.cdiv(R, BLOCK_R), parts)
    return Launch.of(_correlate_kernel, grid)(
        t, factor, seed, target,
        rows, cols, R, each, 65536 / (65536 - threshold), threshold,
        t.stride(0), t.stride(1), factor.stride(0), factor.stride(1), stride_ocol, stride_or,
        USE_DROPOUT=seed is not None, PRECISION=precision, ACC_TYPE=tl_type(acc_type),
        BLOCK_ROWS=config.BLOCK_ROWS, BLOCK_COLS=config.BLOCK_COLS, BLOCK_R=BLOCK_R,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip


def correlate(
    t: Tensor, factor: Tensor, seed: Tensor | None, threshold: int, out: Tensor, config: TileConfig
) -> Tensor:
    """Write ``out = drop(t)ᵀ factor``, (cols, R), strides free; t (rows, cols), factor (rows, R)."""
    rows, R, dtype = t.shape[0], factor.shape[1], t.dtype
    if out.numel() == 0:
        return out
    # parts lie as the result lies in memory, so that adding them up is a flat sum
    flat = out if out.is_contiguous() else out.T
    parts = _shares(rows, R, dtype, factor.dtype, aligned(t), config)[-1]
    target = flat
    if parts > 1:
        acc_type = torch.float64 if dtype is torch.float64 else torch.float32
        target = t.new_empty(parts, *flat.shape, dtype=acc_type)
    launch(_prepare, (t, factor, seed, target), *out.stride(), threshold, config)
    if parts > 1:
        sum_parts((target, flat))
    return out


def correlate_parts(t: Tensor, factor: Tensor, config: TileConfig) -> Tensor:
    """Return the parts of ``tᵀ factor``, (S, cols, R), of which it is the sum."""
    (rows, cols), R, dtype = t.shape, factor.shape[1], t.dtype
    parts = _shares(rows, R, dtype, factor.dtype, aligned(t), config)[-1]
    acc_type = torch.float64 if dtype is torch.float64 else torch.float32
    target = t.new_empty(parts, cols, R, dtype=acc_type)
    if target.numel():
        launch(_prepare, (t, factor, None, target), R, 1, 0, config)
    return target

"""A skinny product along the rows of a big operand: h = scale·drop(x) aᵀ, and dh = scale·dy b."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._config import TileConfig, aligned, block_rank, dot_precision, small_tiles, tl_type
from ._launch import Launch, launch
from ._sum_parts import sum_parts
from ._tiles import dot, keep_tile, wide


@triton.jit(do_not_specialize=["R"])
def _project_kernel(
    t_ptr, f_ptr, seed_ptr, out_ptr,
    rows, depth, R, width, depth_each, scale, threshold,
    stride_trow, stride_tdepth, stride_fr, stride_fdepth,
    USE_DROPOUT: tl.constexpr, SHORT: tl.constexpr, PRECISION: tl.constexpr, ACC_TYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[s, i, r] = scale * sum_d drop(t)[i, d] f[r, d],  d in the s-th share of depth

    Tensors   t (rows, depth)  f (R, depth)  out (parts, rows, width) contiguous, width ≥ R; other
              strides free. SHORT says that f has R rows and not width;
              out has zeros from there on, beside a row of t that is not finite NaN.
    Program   BLOCK_ROWS rows, BLOCK_R ranks and one share of depth, walked in order.
    Numerics  products as _tiles.dot says, sums in ACC_TYPE; the mask is exact and its factor is in scale.
    Traffic   t once per BLOCK_R ranks, f once per block of rows (from L2), out written once.
    Requires  BLOCK_DEPTH a multiple of 32, depth_each a multiple of BLOCK_DEPTH.
    Source    Hu et al. 2021, eq. 3 (arXiv:2106.09685).
    """
    row = tl.program_id(0) * BLOCK_ROWS
    part = tl.program_id(2)
    first = part * depth_each
    offs_row = row + tl.arange(0, BLOCK_ROWS)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = first + tl.arange(0, BLOCK_DEPTH)
    t_ptrs = (
        t_ptr + offs_row[:, None].to(tl.int64) * stride_trow + offs_d[None, :].to(tl.int64) * stride_tdepth
    )
    f_ptrs = f_ptr + offs_r[None, :].to(tl.int64) * stride_fr + offs_d[:, None].to(tl.int64) * stride_fdepth
    # a width that is known to be a multiple of 16 lets rows of f be read 16 bytes at a time
    mask_row, mask_width = offs_row < rows, offs_r < width
    mask_r = offs_r < R if SHORT else mask_width
    if USE_DROPOUT:
        seed = tl.load(seed_ptr)

    acc, rest = tl.zeros((BLOCK_ROWS, BLOCK_R), ACC_TYPE), tl.zeros((BLOCK_ROWS, BLOCK_R), ACC_TYPE)
    for d in range(first, min(first + depth_each, depth), BLOCK_DEPTH):
        mask_d = d + tl.arange(0, BLOCK_DEPTH) < depth
        t = tl.load(t_ptrs, mask=mask_row[:, None] & mask_d[None, :], other=0.0)
        f = tl.load(f_ptrs, mask=mask_r[None, :] & mask_d[:, None], other=0.0)
        if USE_DROPOUT:
            keep = keep_tile(seed, row, d, threshold, BLOCK_ROWS, BLOCK_DEPTH)
            t = tl.where(keep, t, tl.zeros_like(t))
        acc, rest = dot(t, f, acc, rest, PRECISION)
        t_ptrs += wide(BLOCK_DEPTH) * stride_tdepth
        f_ptrs += wide(BLOCK_DEPTH) * stride_fdepth

    out_ptrs = out_ptr + (part.to(tl.int64) * rows + offs_row[:, None]) * width + offs_r[None, :]
    result = ((acc + rest) * scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, result, mask=mask_row[:, None] & mask_width[None, :])


@lru_cache(maxsize=4096)
def _shares(
    depth: int, R: int, dtype: torch.dtype, factors: torch.dtype, reads_rows: bool, config: TileConfig
) -> tuple[TileConfig, str, int, int, int]:
    """Return config, PRECISION, BLOCK_R, the columns of one share of depth, and the number of shares."""
    precision, _ = dot_precision(dtype, factors)
    most_ranks = config.MOST_RANKS or {"native": 64, "split": 32}.get(precision, 16)
    if not reads_rows:
        config, most_ranks = small_tiles(config, dtype), 16
    each = triton.cdiv(triton.cdiv(depth, config.SPLIT), config.BLOCK_DEPTH) * config.BLOCK_DEPTH
    return config, precision, block_rank(R, most_ranks), each, triton.cdiv(depth, each) if depth else 1


def _prepare(
    t: Tensor,
    factor: Tensor,
    seed: Tensor | None,
    out: Tensor,
    scale: float,
    threshold: int,
    config: TileConfig,
) -> Launch:
    (rows, depth), R, width = t.shape, factor.shape[0], out.shape[-1]
    config, precision, BLOCK_R, each, parts = _shares(depth, width, t.dtype, factor.dtype, aligned(t), config)
    # where it costs nothing also at ranks that are multiples of 16, so that there is one variant for all
    short = factor.stride(1) == 1 and (R != width or precision == "split")
    acc_type = torch.float64 if t.dtype is torch.float64 else torch.float32
    grid = (triton.cdiv(rows, config.BLOCK_ROWS), triton.cdiv(width, BLOCK_R), parts)
    return Launch.of(_project_kernel, grid)(
        t, factor, seed, out,
        rows, depth, R, width, each, scale * 65536 / (65536 - threshold), threshold,
        t.stride(0), t.stride(1), factor.stride(0), factor.stride(1),
        USE_DROPOUT=seed is not None, SHORT=short,
        PRECISION=precision, ACC_TYPE=tl_type(acc_type),
        BLOCK_ROWS=config.BLOCK_ROWS, BLOCK_DEPTH=config.BLOCK_DEPTH, BLOCK_R=BLOCK_R,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip


def project(
    t: Tensor,
    factor: Tensor,
    scale: float,
    seed: Tensor | None,
    threshold: int,
    config: TileConfig,
    width: int | None = None,
) -> Tensor:
    """Return ``scale · drop(t) factorᵀ``, (rows, R), dtype of ``factor``; factor (R, depth).

    With ``width`` the result has so many columns, zeros from R on; then factor must be contiguous.
    """
    (rows, depth), R, dtype = t.shape, width or factor.shape[0], t.dtype
    out = factor.new_empty(rows, R)
    if out.numel() == 0:
        return out
    parts = _shares(depth, R, dtype, factor.dtype, aligned(t), config)[-1]
    if parts == 1:
        launch(_prepare, (t, factor, seed, out), scale, threshold, config)
        return out
    acc_type = torch.float64 if dtype is torch.float64 else torch.float32
    target = t.new_empty(parts, rows, R, dtype=acc_type)
    launch(_prepare, (t, factor, seed, target), scale, threshold, config)
    sum_parts((target, out))
    return out

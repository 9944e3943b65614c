"""Back through DenseLoRA's decoder: one read of dy, from which z is recomputed tile by tile."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._config import TileConfig, aligned, block_rank, device_facts, dot_precision, small_tiles, tl_type
from ._gelu import gelu_slope
from ._launch import Launch, launch
from ._tiles import dot, keep_tile, rank_product, wide
from .dense_lora_hidden import hidden_gradients


@triton.jit
def _dense_backward_kernel(
    dy_ptr, b_ptr, h_ptr, seed_ptr, dh_ptr, db_ptr,
    M, N, R, rows_each, factor, threshold,
    stride_dym, stride_dyn, stride_bn, stride_br, stride_hm, stride_hr,
    GELU: tl.constexpr, USE_DROPOUT: tl.constexpr, NEED_HIDDEN: tl.constexpr, NEED_B: tl.constexpr,
    ONE_BLOCK: tl.constexpr, PRECISION: tl.constexpr, ACC_TYPE: tl.constexpr, DOT_TYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dz[m, n] = factor * mask[m, n] * dy[m, n] * g'(sum_r h[m, r] b[n, r])
    dh[t, m, r] = sum_n dz[m, n] b[n, r],  n in the t-th block of N
    db[s, n, r] = sum_m dz[m, n] h[m, r],  m in the s-th share of M

    Tensors   dy (M, N)  b (N, R)  h (M, R)  seed (3,), of which the third is used; dh (blocks of N, M, R) and
              db (shares of M, N, R), both contiguous; other strides free.
    Program   BLOCK_N columns of dy, one share of M, walked in order, and BLOCK_R ranks of the results.
    Numerics  products as _tiles.dot says, dz rounded to the dtype of dy, sums in ACC_TYPE; no atomics.
    Traffic   dy once per BLOCK_R ranks; parts of dh and db written once, small enough to stay in L2.
    Requires  ONE_BLOCK: BLOCK_R ≥ R; rows_each a multiple of BLOCK_M; USE_DROPOUT: BLOCK_N a multiple of 32.
    Source    derived in ops/dense_lora.py.
    """
    block_n, part = tl.program_id(0), tl.program_id(1)
    first = part * rows_each
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_m = first + tl.arange(0, BLOCK_M)
    mask_n, mask_r = offs_n < N, offs_r < R
    b_ptrs = b_ptr + offs_n[:, None].to(tl.int64) * stride_bn + offs_r[None, :].to(tl.int64) * stride_br
    b = tl.load(b_ptrs, mask=mask_n[:, None] & mask_r[None, :], other=0.0)
    dy_ptrs = dy_ptr + offs_m[:, None].to(tl.int64) * stride_dym + offs_n[None, :].to(tl.int64) * stride_dyn
    h_ptrs = h_ptr + offs_m[:, None].to(tl.int64) * stride_hm + offs_r[None, :].to(tl.int64) * stride_hr
    if NEED_HIDDEN:
        dh_ptrs = dh_ptr + (block_n.to(tl.int64) * M + offs_m[:, None]) * R + offs_r[None, :]
    if USE_DROPOUT:
        seed = tl.load(seed_ptr + 2)

    acc, rest = tl.zeros((BLOCK_N, BLOCK_R), ACC_TYPE), tl.zeros((BLOCK_N, BLOCK_R), ACC_TYPE)
    zero = tl.zeros((BLOCK_M, BLOCK_R), ACC_TYPE)
    for m in range(first, min(first + rows_each, M), BLOCK_M):
        mask_m = m + tl.arange(0, BLOCK_M) < M
        dy = tl.load(dy_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        h = tl.load(h_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        dz = dy.to(ACC_TYPE) * factor
        if GELU:
            z = tl.zeros((BLOCK_M, BLOCK_N), ACC_TYPE)
            if ONE_BLOCK:
                z, error = dot(h, b.T, z, z, PRECISION)
            else:
                z, error = rank_product(
                    z, z, h_ptr, b_ptr, m, block_n * BLOCK_N, M, N, R,
                    stride_hm, stride_hr, stride_bn, stride_br,
                    PRECISION, DOT_TYPE, BLOCK_M, BLOCK_N, BLOCK_R,
                )  # fmt: skip
            if PRECISION == "float":
                z += error
            dz *= gelu_slope(z, PRECISION == "native")
        if USE_DROPOUT:
            keep = keep_tile(seed, m, block_n * BLOCK_N, threshold, BLOCK_M, BLOCK_N)
            dz = tl.where(keep, dz, 0.0)
        dz = dz.to(dy.dtype)
        if NEED_HIDDEN:
            dh, rounding = dot(dz, b, zero, zero, PRECISION)
            tl.store(dh_ptrs, dh + rounding, mask=mask_m[:, None] & mask_r[None, :])
            dh_ptrs += wide(BLOCK_M) * R
        if NEED_B:
            acc, rest = dot(dz.T, h, acc, rest, PRECISION)
        dy_ptrs += wide(BLOCK_M) * stride_dym
        h_ptrs += wide(BLOCK_M) * stride_hm

    if NEED_B:
        db_ptrs = db_ptr + (part.to(tl.int64) * N + offs_n[:, None]) * R + offs_r[None, :]
        tl.store(db_ptrs, acc + rest, mask=mask_n[:, None] & mask_r[None, :])


@lru_cache(maxsize=4096)
def backward_config(
    M: int, N: int, R: int, itemsize: int, dropout: bool, arch: str, processors: int
) -> TileConfig:
    """Return the tiles of a pass over an (M, N) gradient: BLOCK_ROWS of M, BLOCK_COLS of N, SPLIT of M."""
    stages, programs = 2, 2
    if arch == "cpu":
        return TileConfig(BLOCK_ROWS=16, BLOCK_COLS=32, BLOCK_DEPTH=0, SPLIT=2)
    if itemsize > 2:
        rows, cols, warps = 16, 32, 4
    elif arch.startswith("gfx"):
        rows, cols, warps = 32, 64, 4
    elif R <= 32 and arch == "sm90":
        # eight warps take twice as long
        rows, cols, warps, stages, programs = (64, 64, 4, 3, 6) if dropout else (64, 128, 4, 2, 8)
    elif R > 32 or arch.startswith("sm1"):
        rows, cols, warps = 64, 64, 8
    else:
        rows, cols, warps = 64, 128, 8
    split = triton.cdiv(programs * processors, triton.cdiv(N, cols))
    split = max(1, min(split, triton.cdiv(M, 4 * rows), 32))
    return TileConfig(
        BLOCK_ROWS=rows, BLOCK_COLS=cols, BLOCK_DEPTH=0, SPLIT=split, num_warps=warps, num_stages=stages
    )


@lru_cache(maxsize=4096)
def _shares(
    M: int, N: int, dtype: torch.dtype, reads_rows: bool, config: TileConfig
) -> tuple[TileConfig, int, int, int]:
    """Return config, the blocks of columns, the shares of M and the rows of one."""
    if not reads_rows:
        config = small_tiles(config, dtype)
    each = triton.cdiv(triton.cdiv(M, config.SPLIT), config.BLOCK_ROWS) * config.BLOCK_ROWS
    return config, triton.cdiv(N, config.BLOCK_COLS), triton.cdiv(M, each), each


def _prepare(
    dy: Tensor,
    b: Tensor,
    h: Tensor,
    seed: Tensor | None,
    dh_parts: Tensor | None,
    db_parts: Tensor | None,
    scale: float,
    gelu: bool,
    threshold: int,
    config: TileConfig,
) -> Launch:
    (M, N), R = dy.shape, b.shape[1]
    config, blocks, shares, each = _shares(M, N, dy.dtype, aligned(dy), config)
    precision, dot_type = dot_precision(dy.dtype, dy.dtype)
    BLOCK_R = block_rank(R, 64 if precision == "native" else 16)
    return Launch.of(_dense_backward_kernel, (blocks, shares, triton.cdiv(R, BLOCK_R)))(
        dy, b, h, seed, dh_parts, db_parts,
        M, N, R, each, scale * 65536 / (65536 - threshold), threshold,
        dy.stride(0), dy.stride(1), b.stride(0), b.stride(1), h.stride(0), h.stride(1),
        GELU=gelu, USE_DROPOUT=seed is not None, NEED_HIDDEN=dh_parts is not None,
        NEED_B=db_parts is not None, ONE_BLOCK=BLOCK_R >= R,
        PRECISION=precision, ACC_TYPE=tl_type(dy.dtype, accumulate=True), DOT_TYPE=dot_type,
        BLOCK_M=config.BLOCK_ROWS, BLOCK_N=config.BLOCK_COLS, BLOCK_R=BLOCK_R,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip


def dense_backward_update(
    dy: Tensor,
    b: Tensor,
    h: Tensor,
    u: Tensor | None,
    scale: float,
    gelu: bool,
    seed: Tensor | None,
    threshold: int,
    adapters: torch.dtype,
    need_b: bool,
    factor: float = 1.0,
    *,
    config: TileConfig | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return du, (M, R), dtype of ``dy``, and the gradient of b, (N, R), in ``adapters``; dy is read once.

    With b = decoder core, z = h bᵀ and dz = scale·drop₃(dy) ∘ g'(z): du = factor · drop₂(dz b) ∘ g'(u), if
    there is a u, and db = dzᵀ h, if ``need_b``. b, h and u in the dtype of dy, h and u contiguous.
    """
    (M, N), R = dy.shape, b.shape[1]
    du = None if u is None else torch.empty_like(u)
    db = b.new_empty(N, R, dtype=adapters) if need_b else None
    if M == 0 or N == 0:
        return du if du is None else du.zero_(), db if db is None else db.zero_()
    facts = device_facts(dy.device)
    config = config or backward_config(
        M, N, R, dy.element_size(), seed is not None, facts.arch, facts.processors
    )
    _, blocks, shares, _ = _shares(M, N, dy.dtype, aligned(dy), config)
    acc_type = torch.float64 if dy.dtype is torch.float64 else torch.float32
    dh_parts = None if u is None else dy.new_empty(blocks, M, R, dtype=acc_type)
    db_parts = dy.new_empty(shares, N, R, dtype=acc_type) if need_b else None
    launch(_prepare, (dy, b, h, seed, dh_parts, db_parts), float(scale), gelu, threshold, config)
    hidden_gradients(dh_parts, u, du, db_parts, db, gelu, seed, threshold, factor)
    return du, db

"""dh and db from one read of dy, the same bits every time."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._config import TileConfig, aligned, block_rank, dot_precision, pick_for, small_tiles, tl_type
from ._launch import Launch, launch
from ._sum_parts import sum_parts
from ._tiles import dot, wide


@triton.jit(do_not_specialize=["R"])
def _lora_backward_hidden_b_kernel(
    dy_ptr, b_ptr, h_ptr, dh_ptr, db_ptr,
    M, N, R, width, rows_each, scale,
    stride_dym, stride_dyn, stride_bn, stride_br, stride_hm, stride_hr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, ACC_TYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dh[t, m, r] = scale * sum_n dy[m, n] b[n, r],  n in the t-th block of N
    db[s, n, r] = sum_m dy[m, n] h[m, r],  m in the s-th share of M

    Tensors   dy (M, N)  b (N, R)  h (M, width)  dh (blocks of N, M, width)  db (shares of M, N, width), both
              contiguous; other strides free. R ≤ width, equal if EVEN; from rank R on dh is zero.
    Program   BLOCK_N columns of dy, BLOCK_R ranks and one share of M, walked in order.
    Numerics  products as _tiles.dot says, sums in ACC_TYPE; no atomics: parts are added up afterwards.
    Traffic   dy once per BLOCK_R ranks; dh and db parts written once, small enough to stay in L2.
    Requires  rows_each a multiple of BLOCK_M.
    Source    derived in ops/lora_linear.py.
    """
    block_n, part = tl.program_id(0), tl.program_id(2)
    first = part * rows_each
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_m = first + tl.arange(0, BLOCK_M)
    # a width that is known to be a multiple of 16 lets rows of ranks be read 16 bytes at a time
    mask_n, mask_r = offs_n < N, offs_r < width
    real = mask_r if EVEN else offs_r < R
    b_ptrs = b_ptr + offs_n[:, None].to(tl.int64) * stride_bn + offs_r[None, :].to(tl.int64) * stride_br
    b = tl.load(b_ptrs, mask=mask_n[:, None] & real[None, :], other=0.0)
    dy_ptrs = dy_ptr + offs_m[:, None].to(tl.int64) * stride_dym + offs_n[None, :].to(tl.int64) * stride_dyn
    h_ptrs = h_ptr + offs_m[:, None].to(tl.int64) * stride_hm + offs_r[None, :].to(tl.int64) * stride_hr
    dh_ptrs = dh_ptr + (block_n.to(tl.int64) * M + offs_m[:, None]) * width + offs_r[None, :]

    acc, rest = tl.zeros((BLOCK_N, BLOCK_R), ACC_TYPE), tl.zeros((BLOCK_N, BLOCK_R), ACC_TYPE)
    zero = tl.zeros((BLOCK_M, BLOCK_R), ACC_TYPE)
    for m in range(first, min(first + rows_each, M), BLOCK_M):
        mask_m = m + tl.arange(0, BLOCK_M) < M
        dy = tl.load(dy_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        h = tl.load(h_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        dh, _ = dot(dy, b, zero, zero, PRECISION)
        if not EVEN:
            # an infinity in dy times a factor that is not there
            dh = tl.where(real[None, :], dh, 0.0)
        tl.store(dh_ptrs, (dh * scale).to(dh_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])
        acc, rest = dot(dy.T, h, acc, rest, PRECISION)
        dy_ptrs += wide(BLOCK_M) * stride_dym
        h_ptrs += wide(BLOCK_M) * stride_hm
        dh_ptrs += wide(BLOCK_M) * width

    db_ptrs = db_ptr + (part.to(tl.int64) * N + offs_n[:, None]) * width + offs_r[None, :]
    tl.store(db_ptrs, (acc + rest).to(db_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_r[None, :])


@lru_cache(maxsize=4096)
def _shares(
    M: int, N: int, R: int, dtype: torch.dtype, adapters: torch.dtype, reads_rows: bool, config: TileConfig
) -> tuple[TileConfig, str, int, int, int, int]:
    """Return config, PRECISION, BLOCK_R, the blocks of columns, the shares of M and the rows of one."""
    precision, _ = dot_precision(dtype, adapters)
    most_ranks = config.MOST_RANKS or (32 if precision == "native" else 16)
    if not reads_rows:
        config, most_ranks = small_tiles(config, dtype), 16
    each = triton.cdiv(triton.cdiv(M, config.SPLIT), config.BLOCK_ROWS) * config.BLOCK_ROWS
    blocks, shares = triton.cdiv(N, config.BLOCK_COLS), triton.cdiv(M, each)
    return config, precision, block_rank(R, most_ranks), blocks, shares, each


def _prepare(
    dy: Tensor, b: Tensor, h: Tensor, dh_parts: Tensor, db_parts: Tensor, scale: float, config: TileConfig
) -> Launch:
    (M, N), R, width = dy.shape, b.shape[1], h.shape[1]
    config, precision, BLOCK_R, blocks, shares, each = _shares(
        M, N, width, dy.dtype, b.dtype, aligned(dy), config
    )
    return Launch.of(_lora_backward_hidden_b_kernel, (blocks, triton.cdiv(width, BLOCK_R), shares))(
        dy, b, h, dh_parts, db_parts,
        M, N, R, width, each, float(scale),
        dy.stride(0), dy.stride(1), b.stride(0), b.stride(1), h.stride(0), h.stride(1),
        EVEN=R == width, PRECISION=precision, ACC_TYPE=tl_type(dh_parts.dtype),
        BLOCK_M=config.BLOCK_ROWS, BLOCK_N=config.BLOCK_COLS, BLOCK_R=BLOCK_R,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip


def hidden_b_parts(
    dy: Tensor, b: Tensor, h: Tensor, scale: float, config: TileConfig
) -> tuple[Tensor, Tensor]:
    """Return the parts of dh, (blocks, M, R), and of db, (shares, N, R), of which these are the sums.

    As many ranks as h has: where those are more than b's, dh is zero from there on, and db anything.
    """
    (M, N), R, dtype = dy.shape, h.shape[1], dy.dtype
    *_, blocks, shares, _ = _shares(M, N, R, dtype, b.dtype, aligned(dy), config)
    acc_type = torch.float64 if dtype is torch.float64 else torch.float32
    dh_parts = dy.new_empty(blocks, M, R, dtype=acc_type)
    db_parts = dy.new_empty(shares, N, R, dtype=acc_type)
    launch(_prepare, (dy, b, h, dh_parts, db_parts), scale, config)
    return dh_parts, db_parts


def lora_backward_hidden_b(
    dy: Tensor, b: Tensor, h: Tensor, scale: float, *, config: TileConfig | None = None
) -> tuple[Tensor, Tensor]:
    """Return ``dh = scale · dy b``, (M, R), and ``db = dyᵀ h``, (N, R), dtype of ``b``; dy is read once.

    h may have columns beside its R: dh then has as many, zeros.
    """
    (M, N), R = dy.shape, h.shape[1]
    dh, db = b.new_empty(M, R), b.new_empty(b.shape)
    if M == 0 or N == 0:
        return dh.zero_(), db.zero_()
    config = config or pick_for("lora_backward_hidden_b", dy, b, N, 0, R)
    dh_parts, db_parts = hidden_b_parts(dy, b, h, scale, config)
    sum_parts((dh_parts, dh), (db_parts, db))
    return dh, db

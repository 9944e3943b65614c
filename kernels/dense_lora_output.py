"""DenseLoRA's big product: a GEMM whose accumulator starts at the activated update of its tile."""

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from ._config import (
    TileConfig,
    aligned,
    block_rank,
    device_facts,
    dot_precision,
    pick_for,
    small_tiles,
    tl_type,
)
from ._gelu import gelu
from ._launch import Launch, launch
from ._matmul import _references
from ._tiles import base_product, grouped_tile, keep_tile, rank_product


@triton.jit
def _dense_output_kernel(
    x_ref, w_ref, h_ptr, b_ptr, bias_ptr, seed_ptr, y_ref,
    M, N, K, R, scale, threshold, keep_scale,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_hm, stride_hr, stride_bn, stride_br,
    stride_bias, stride_ym,
    HAS_BASE: tl.constexpr, HAS_BIAS: tl.constexpr, GELU: tl.constexpr, USE_DROPOUT: tl.constexpr,
    USE_DESC: tl.constexpr, DEPTH_FIRST: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, ACC_TYPE: tl.constexpr, DOT_TYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """y[m, n] = sum_k x[m, k] w[n, k]  +  bias[n]  +  scale * drop(g(sum_r h[m, r] b[n, r]))

    Tensors   x (M, K)  w (N, K)  h (M, R)  b (N, R)  bias (N,)  seed (3,), of which the third is used
              y (M, N), rows contiguous; other strides free. Without HAS_BASE all is added to what y holds.
    Program   tiles of y, program_id and every num_programs-th after it, GROUP_M rows of tiles at a time.
    Numerics  products of the inputs, sums in ACC_TYPE, one rounding, at the end; a zero b adds exactly zero.
    Traffic   x once per column of tiles, w once per row of tiles, y written once, without HAS_BASE read once.
    Requires  BLOCK_R a power of two and at least 16; USE_DROPOUT: BLOCK_N a multiple of 32; EVEN only if
              the blocks divide M, N and K; USE_DESC: all references are descriptors.
    Source    DenseLoRA, section 3 (arXiv:2505.23808).
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, GROUP_M)
        row, col = tile_m * BLOCK_M, tile_n * BLOCK_N

        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC_TYPE)
        acc, rest = rank_product(
            acc, acc, h_ptr, b_ptr, row, col, M, N, R, stride_hm, stride_hr, stride_bn, stride_br,
            PRECISION, DOT_TYPE, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        if PRECISION == "float":
            acc += rest
            rest = tl.zeros((BLOCK_M, BLOCK_N), ACC_TYPE)
        if GELU:
            acc = gelu(acc, PRECISION == "native")
        acc *= scale
        if USE_DROPOUT:
            keep = keep_tile(tl.load(seed_ptr + 2), row, col, threshold, BLOCK_M, BLOCK_N)
            acc = tl.where(keep, acc * keep_scale, 0.0)
        if HAS_BASE:
            acc, rest = base_product(
                acc, rest, x_ref, w_ref, row, col, M, N, K,
                stride_xm, stride_xk, stride_wn, stride_wk,
                USE_DESC, DEPTH_FIRST, EVEN, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip

        if PRECISION == "float":
            acc += rest
        offs_m, offs_n = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + offs_n * stride_bias, mask=offs_n < N, other=0.0)
            acc += bias.to(ACC_TYPE)[None, :]

        if USE_DESC:
            y_ref.store([row, col], acc.to(y_ref.dtype))
        else:
            y_ptrs = y_ref + offs_m[:, None].to(tl.int64) * stride_ym + offs_n[None, :]
            mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
            if not HAS_BASE:
                acc += tl.load(y_ptrs, mask=mask, other=0.0).to(ACC_TYPE)
            tl.store(y_ptrs, acc.to(y_ref.dtype.element_ty), mask=mask)


def _prepare(
    x: Tensor | None,
    w: Tensor | None,
    h: Tensor,
    b: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    y: Tensor,
    scale: float,
    gelu: bool,
    threshold: int,
    config: TileConfig,
) -> Launch:
    (M, N), R, fused = y.shape, h.shape[1], x is not None
    K = x.shape[1] if fused else 0
    if not all(aligned(t) for t in ((x, w) if fused else (y,))):
        config = small_tiles(config, y.dtype)
    if seed is not None:
        # the mask comes by 32 columns
        config = replace(config, BLOCK_COLS=max(config.BLOCK_COLS, 32))
    references, use_desc, depth_first = _references(x, w, y, config)
    x, w = (x, w) if fused else (y, y)
    even = M % config.BLOCK_ROWS == N % config.BLOCK_COLS == K % config.BLOCK_DEPTH == 0
    tiles = triton.cdiv(M, config.BLOCK_ROWS) * triton.cdiv(N, config.BLOCK_COLS)
    precision, dot_type = dot_precision(y.dtype, y.dtype)
    return Launch.of(_dense_output_kernel, (min(tiles, config.programs(device_facts(y.device))),))(
        references[0], references[1], h, b, bias, seed, references[2],
        M, N, K, R, scale, threshold, 65536 / (65536 - threshold),
        x.stride(0), x.stride(1), w.stride(0), w.stride(1),
        h.stride(0), h.stride(1), b.stride(0), b.stride(1),
        0 if bias is None else bias.stride(0), y.stride(0),
        HAS_BASE=fused, HAS_BIAS=bias is not None, GELU=gelu, USE_DROPOUT=seed is not None,
        USE_DESC=use_desc, DEPTH_FIRST=depth_first, EVEN=even,
        PRECISION=precision, ACC_TYPE=tl_type(y.dtype, accumulate=True), DOT_TYPE=dot_type,
        BLOCK_M=config.BLOCK_ROWS, BLOCK_N=config.BLOCK_COLS, BLOCK_K=config.BLOCK_DEPTH,
        BLOCK_R=block_rank(R, 16 if y.element_size() > 2 else 32), GROUP_M=config.GROUP_ROWS,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip


def output_config(x: Tensor, b: Tensor, seed: Tensor | None) -> TileConfig:
    """Return the tiles of the big product: those of LoRA's, which holds no activation, or narrower ones."""
    (N, R), K, arch = b.shape, x.shape[1], device_facts(x.device).arch
    config = pick_for("lora_forward", x, b, N, K, R, seed)
    return narrowed(config, arch)


def narrowed(config: TileConfig, arch: str) -> TileConfig:
    """Return ``config`` with tiles that leave registers for the activation on architectures unmeasured."""
    return config if arch in ("sm90", "cpu") else replace(config, BLOCK_COLS=min(config.BLOCK_COLS, 64))


def dense_output(
    x: Tensor | None,
    w: Tensor | None,
    h: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scale: float,
    gelu: bool,
    seed: Tensor | None,
    threshold: int,
    y: Tensor,
    config: TileConfig,
) -> Tensor:
    """Write ``y = x wᵀ + bias + scale · drop₃(g(h bᵀ))``; or, x and w None, add all but the base to ``y``."""
    if y.numel() > 0:
        launch(_prepare, (x, w, h, b, bias, seed, y), float(scale), gelu, threshold, config)
    return y

"""A matrix product whose accumulator starts at a low-rank product: both big GEMMs of a LoRA layer."""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._config import TileConfig, aligned, block_rank, device_facts, dot_precision, small_tiles, tl_type
from ._launch import Launch, launch
from ._tiles import base_product, grouped_tile, keep_tile, rank_product


@triton.jit
def _extended_matmul_kernel(
    left_ref, right_ref, h_ptr, b_ptr, bias_ptr, seed_ptr, out_ref,
    rows, cols, depth, R, threshold, keep_scale,
    stride_lrow, stride_ldepth, stride_rcol, stride_rdepth,
    stride_hrow, stride_hr, stride_bcol, stride_br, stride_bias, stride_orow,
    HAS_BASE: tl.constexpr, HAS_UPDATE: tl.constexpr, HAS_BIAS: tl.constexpr,
    USE_DROPOUT: tl.constexpr, ADD_OUT: tl.constexpr,
    USE_DESC: tl.constexpr, DEPTH_FIRST: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, ACC_TYPE: tl.constexpr, DOT_TYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
    BLOCK_R: tl.constexpr, GROUP_ROWS: tl.constexpr,
):  # fmt: skip
    """out[i, j] = sum_d left[i, d] right[j, d]  +  drop(sum_r h[i, r] b[j, r])  +  bias[j]

    Tensors   left (rows, depth)  right (cols, depth)  h (rows, R)  b (cols, R)  bias (cols,)
              out (rows, cols), rows of out contiguous; other strides free. Without HAS_BASE there is no left
              and no right, without HAS_UPDATE no h and no b; with ADD_OUT all is added to what out holds.
    Program   tiles of out, program_id and every num_programs-th after it, GROUP_ROWS rows of tiles at a time.
    Numerics  products of the inputs, h and b rounded to DOT_TYPE, sums in ACC_TYPE, one rounding, at the
              store. The rank product comes first: the mask then acts on the accumulator in place.
    Traffic   left once per column of tiles, right once per row of tiles, h and b alike, out written once,
              and with ADD_OUT read once.
    Requires  BLOCK_R a power of two and at least 16; USE_DROPOUT: BLOCK_COLS a multiple of 32; EVEN only if
              the blocks divide rows, cols and depth; USE_DESC: all references are descriptors.
    Source    Hu et al. 2021, eq. 3 (arXiv:2106.09685); backward derived in ops/lora_linear.py.
    """
    tiles_row, tiles_col = tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(cols, BLOCK_COLS)
    for tile in range(tl.program_id(0), tiles_row * tiles_col, tl.num_programs(0)):
        tile_row, tile_col = grouped_tile(tile, tiles_row, tiles_col, GROUP_ROWS)
        row, col = tile_row * BLOCK_ROWS, tile_col * BLOCK_COLS

        acc = tl.zeros((BLOCK_ROWS, BLOCK_COLS), ACC_TYPE)
        rest = acc
        if HAS_UPDATE:
            acc, rest = rank_product(
                acc, rest, h_ptr, b_ptr, row, col, rows, cols, R,
                stride_hrow, stride_hr, stride_bcol, stride_br,
                PRECISION, DOT_TYPE, BLOCK_ROWS, BLOCK_COLS, BLOCK_R,
            )  # fmt: skip
        if USE_DROPOUT:
            keep = keep_tile(tl.load(seed_ptr), row, col, threshold, BLOCK_ROWS, BLOCK_COLS)
            acc = tl.where(keep, acc * keep_scale, 0.0)
            if PRECISION == "float":
                rest = tl.where(keep, rest * keep_scale, 0.0)
        if HAS_BASE:
            acc, rest = base_product(
                acc, rest, left_ref, right_ref, row, col, rows, cols, depth,
                stride_lrow, stride_ldepth, stride_rcol, stride_rdepth,
                USE_DESC, DEPTH_FIRST, EVEN, PRECISION, BLOCK_ROWS, BLOCK_COLS, BLOCK_DEPTH,
            )  # fmt: skip

        if PRECISION == "float":
            acc += rest
        offs_row, offs_col = row + tl.arange(0, BLOCK_ROWS), col + tl.arange(0, BLOCK_COLS)
        if HAS_BIAS:
            acc += tl.load(bias_ptr + offs_col * stride_bias, mask=offs_col < cols, other=0.0).to(ACC_TYPE)[
                None, :
            ]

        if USE_DESC:
            if ADD_OUT:
                acc += out_ref.load([row, col]).to(ACC_TYPE)
            out_ref.store([row, col], acc.to(out_ref.dtype))
        else:
            out_ptrs = out_ref + offs_row[:, None].to(tl.int64) * stride_orow + offs_col[None, :]
            mask = (offs_row[:, None] < rows) & (offs_col[None, :] < cols)
            if ADD_OUT:
                acc += tl.load(out_ptrs, mask=mask, other=0.0).to(ACC_TYPE)
            tl.store(out_ptrs, acc.to(out_ref.dtype.element_ty), mask=mask)


def _fits_descriptor(*tensors: Tensor) -> bool:
    """Whether the copy engine can address these: separate contiguous rows at 16-byte boundaries."""
    return all(
        t.stride(1) == 1
        and t.stride(0) >= t.shape[1]
        and t.stride(0) * t.element_size() % 16 == 0
        and t.data_ptr() % 16 == 0
        and t.numel() > 0
        for t in tensors
    )


def _references(
    left: Tensor | None, right: Tensor | None, out: Tensor, config: TileConfig
) -> tuple[tuple[object, object, object], bool, bool]:
    """Return what the kernel takes for left, right and out, USE_DESC and DEPTH_FIRST."""
    if left is None:
        return (out, out, out), False, False
    depth_first = right.stride(0) == 1 and right.stride(1) != 1
    stored = right.T if depth_first else right
    if not (config.DESCRIPTORS and _fits_descriptor(left, stored, out)):
        return (left, right, out), False, False
    ROWS, COLS, DEPTH = config.BLOCK_ROWS, config.BLOCK_COLS, config.BLOCK_DEPTH
    block = [DEPTH, COLS] if depth_first else [COLS, DEPTH]
    references = (
        TensorDescriptor.from_tensor(left, [ROWS, DEPTH]),
        TensorDescriptor(right, stored.shape, stored.stride(), block),
        TensorDescriptor.from_tensor(out, [ROWS, COLS]),
    )
    return references, True, depth_first


def _prepare(
    left: Tensor | None,
    right: Tensor | None,
    h: Tensor | None,
    b: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    threshold: int,
    config: TileConfig,
) -> Launch:
    rows, cols = out.shape
    fused, updates = left is not None, h is not None
    depth, R = left.shape[1] if fused else 0, h.shape[1] if updates else 0
    if not all(aligned(t) for t in ((left, right) if fused else (out,))):
        config = small_tiles(config, out.dtype)
    references, use_desc, depth_first = _references(left, right, out, config)
    left, right, h, b = (out if t is None else t for t in (left, right, h, b))
    even = rows % config.BLOCK_ROWS == cols % config.BLOCK_COLS == depth % config.BLOCK_DEPTH == 0
    tiles = triton.cdiv(rows, config.BLOCK_ROWS) * triton.cdiv(cols, config.BLOCK_COLS)
    precision, dot_type = dot_precision(out.dtype, out.dtype)
    return Launch.of(_extended_matmul_kernel, (min(tiles, config.programs(device_facts(out.device))),))(
        references[0], references[1], h, b, bias, seed, references[2],
        rows, cols, depth, R, threshold, 65536 / (65536 - threshold),
        left.stride(0), left.stride(1), right.stride(0), right.stride(1),
        h.stride(0), h.stride(1), b.stride(0), b.stride(1),
        0 if bias is None else bias.stride(0), out.stride(0),
        HAS_BASE=fused, HAS_UPDATE=updates, HAS_BIAS=bias is not None,
        USE_DROPOUT=seed is not None, ADD_OUT=not (fused and updates),
        USE_DESC=use_desc, DEPTH_FIRST=depth_first, EVEN=even,
        PRECISION=precision, ACC_TYPE=tl_type(out.dtype, accumulate=True), DOT_TYPE=dot_type,
        BLOCK_ROWS=config.BLOCK_ROWS, BLOCK_COLS=config.BLOCK_COLS, BLOCK_DEPTH=config.BLOCK_DEPTH,
        BLOCK_R=block_rank(R, 16 if max(h.element_size(), out.element_size()) > 2 else 32),
        GROUP_ROWS=config.GROUP_ROWS,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip


def extended_matmul(
    left: Tensor | None,
    right: Tensor | None,
    h: Tensor | None,
    b: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    threshold: int,
    out: Tensor,
    config: TileConfig,
) -> Tensor:
    """Write ``out = left rightᵀ + drop(h bᵀ) + bias``; or, one of the products None, add to ``out``."""
    if out.numel() > 0:
        launch(_prepare, (left, right, h, b, bias, seed, out), threshold, config)
    return out

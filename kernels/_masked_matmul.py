"""The forward GEMM of a layer with a masked b, whose entries are expanded inside the product."""

import triton
import triton.language as tl
from torch import Tensor

from ._config import TileConfig, aligned, device_facts, dot_precision, small_tiles, tl_type
from ._launch import Launch, launch
from ._matmul import _references
from ._tiles import base_product, dot, grouped_tile


@triton.jit
def _entries_product(
    acc, rest, h_ptr, values_ptr, words_ptr, offsets_ptr, row, col, rows, cols, R, pitch,
    stride_hrow, stride_hr, PRECISION: tl.constexpr, DOT_TYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """(acc, rest)[row, col] += sum_r h[row, r] b[col, r], 32 ranks of packed entries at a time."""
    offs_row, offs_col, offs_r = (
        row + tl.arange(0, BLOCK_ROWS),
        col + tl.arange(0, BLOCK_COLS),
        tl.arange(0, 32),
    )
    mask_row, mask_col = offs_row < rows, offs_col < cols
    h_ptrs = h_ptr + offs_row[:, None].to(tl.int64) * stride_hrow + offs_r[None, :] * stride_hr
    word_ptrs = words_ptr + offs_col.to(tl.int64) * pitch
    place = tl.load(offsets_ptr + offs_col, mask=mask_col, other=0)
    for word in tl.range(0, pitch, num_stages=1):
        bits = tl.load(word_ptrs + word, mask=mask_col, other=0)[:, None] >> offs_r[None, :] & 1
        places = place[:, None] + tl.cumsum(bits, 1) - bits
        b = tl.load(values_ptr + places, mask=bits != 0, other=0.0)
        h = tl.load(h_ptrs, mask=mask_row[:, None] & (offs_r < R - 32 * word)[None, :], other=0.0)
        acc, rest = dot(h.to(DOT_TYPE), b.to(DOT_TYPE).T, acc, rest, PRECISION)
        place += tl.sum(bits, 1)
        h_ptrs += 32 * stride_hr
    return acc, rest


@triton.jit
def _masked_matmul_kernel(
    left_ref, right_ref, h_ptr, values_ptr, words_ptr, offsets_ptr, bias_ptr, out_ref,
    rows, cols, depth, R, pitch,
    stride_lrow, stride_ldepth, stride_rcol, stride_rdepth, stride_hrow, stride_hr, stride_bias, stride_orow,
    HAS_BIAS: tl.constexpr, USE_DESC: tl.constexpr, DEPTH_FIRST: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, ACC_TYPE: tl.constexpr, DOT_TYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, GROUP_ROWS: tl.constexpr,
):  # fmt: skip
    """out[i, j] = sum_d left[i, d] right[j, d]  +  sum_r h[i, r] b[j, r]  +  bias[j]

    Tensors   left (rows, depth)  right (cols, depth)  h (rows, R)  bias (cols,)  out (rows, cols), its rows
              contiguous; other strides free. b: values (nnz,) at the entries of words (cols, pitch), int32,
              those of row j from offsets[j] on; contiguous.
    Program   tiles of out, program_id and every num_programs-th after it, GROUP_ROWS rows of tiles at a time.
    Numerics  as _extended_matmul_kernel.
    Traffic   as _extended_matmul_kernel, of b only entries, from L2, and its mask.
    Requires  EVEN only if the blocks divide rows, cols and depth; USE_DESC: all references are descriptors.
    Source    LoRI (arXiv:2504.07448); b is dense in registers alone.
    """
    tiles_row, tiles_col = tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(cols, BLOCK_COLS)
    for tile in range(tl.program_id(0), tiles_row * tiles_col, tl.num_programs(0)):
        tile_row, tile_col = grouped_tile(tile, tiles_row, tiles_col, GROUP_ROWS)
        row, col = tile_row * BLOCK_ROWS, tile_col * BLOCK_COLS

        acc = tl.zeros((BLOCK_ROWS, BLOCK_COLS), ACC_TYPE)
        acc, rest = _entries_product(
            acc, acc, h_ptr, values_ptr, words_ptr, offsets_ptr, row, col, rows, cols, R, pitch,
            stride_hrow, stride_hr, PRECISION, DOT_TYPE, BLOCK_ROWS, BLOCK_COLS,
        )  # fmt: skip
        acc, rest = base_product(
            acc, rest, left_ref, right_ref, row, col, rows, cols, depth,
            stride_lrow, stride_ldepth, stride_rcol, stride_rdepth,
            USE_DESC, DEPTH_FIRST, EVEN, PRECISION, BLOCK_ROWS, BLOCK_COLS, BLOCK_DEPTH,
        )  # fmt: skip

        if PRECISION == "float":
            acc += rest
        offs_row, offs_col = row + tl.arange(0, BLOCK_ROWS), col + tl.arange(0, BLOCK_COLS)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + offs_col * stride_bias, mask=offs_col < cols, other=0.0)
            acc += bias.to(ACC_TYPE)[None, :]

        if USE_DESC:
            out_ref.store([row, col], acc.to(out_ref.dtype))
        else:
            out_ptrs = out_ref + offs_row[:, None].to(tl.int64) * stride_orow + offs_col[None, :]
            mask = (offs_row[:, None] < rows) & (offs_col[None, :] < cols)
            tl.store(out_ptrs, acc.to(out_ref.dtype.element_ty), mask=mask)


def _prepare(
    left: Tensor, right: Tensor, h: Tensor, values: Tensor, words: Tensor, offsets: Tensor,
    bias: Tensor | None, out: Tensor, config: TileConfig,
) -> Launch:  # fmt: skip
    (rows, cols), depth = out.shape, left.shape[1]
    if not (aligned(left) and aligned(right)):
        config = small_tiles(config, out.dtype)
    references, use_desc, depth_first = _references(left, right, out, config)
    even = rows % config.BLOCK_ROWS == cols % config.BLOCK_COLS == depth % config.BLOCK_DEPTH == 0
    tiles = triton.cdiv(rows, config.BLOCK_ROWS) * triton.cdiv(cols, config.BLOCK_COLS)
    precision, dot_type = dot_precision(out.dtype, out.dtype)
    return Launch.of(_masked_matmul_kernel, (min(tiles, config.programs(device_facts(out.device))),))(
        references[0], references[1], h, values, words, offsets, bias, references[2],
        rows, cols, depth, h.shape[1], words.shape[1],
        left.stride(0), left.stride(1), right.stride(0), right.stride(1),
        h.stride(0), h.stride(1), 0 if bias is None else bias.stride(0), out.stride(0),
        HAS_BIAS=bias is not None, USE_DESC=use_desc, DEPTH_FIRST=depth_first, EVEN=even,
        PRECISION=precision, ACC_TYPE=tl_type(out.dtype, accumulate=True), DOT_TYPE=dot_type,
        BLOCK_ROWS=config.BLOCK_ROWS, BLOCK_COLS=config.BLOCK_COLS, BLOCK_DEPTH=config.BLOCK_DEPTH,
        GROUP_ROWS=config.GROUP_ROWS,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip


def masked_matmul(
    x: Tensor, w: Tensor, h: Tensor, values: Tensor, words: Tensor, offsets: Tensor, bias: Tensor | None,
    config: TileConfig,
) -> Tensor:  # fmt: skip
    """Return ``x wᵀ + h bᵀ + bias``, (M, N), dtype of ``x``; b (N, R) has ``values`` at a mask's entries."""
    out = x.new_empty(x.shape[0], w.shape[0])
    if out.numel():
        launch(_prepare, (x, w, h, values.contiguous(), words, offsets, bias, out), config)
    return out

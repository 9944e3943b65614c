"""Between the packed values of a masked matrix and the dense one."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._config import tl_type
from ._launch import Launch, launch
from ._tiles import add, total, wide

BLOCK_ROWS = 32


@triton.jit
def _entries(words_ptr, offsets_ptr, offs_row, mask_row, pitch, word, BLOCK_ROWS: tl.constexpr):
    """(bits, places) of 32 columns of some rows: which entries exist, and where their values are."""
    columns = tl.arange(0, 32)[None, :]
    row_ptrs = words_ptr + offs_row.to(tl.int64) * pitch
    place = tl.load(offsets_ptr + offs_row, mask=mask_row, other=0)
    for left in range(0, word):
        bits = tl.load(row_ptrs + left, mask=mask_row, other=0)[:, None] >> columns & 1
        place += tl.sum(bits, 1)
    bits = tl.load(row_ptrs + word, mask=mask_row, other=0)[:, None] >> columns & 1
    return bits != 0, place[:, None] + tl.cumsum(bits, 1) - bits


@triton.jit
def _unpack_kernel(
    values_ptr, words_ptr, offsets_ptr, out_ptr, rows, cols, pitch, BLOCK_ROWS: tl.constexpr
):  # fmt: skip
    """out[i, j] = values[offsets[i] + entries of row i before j] where the mask has (i, j), else 0

    Tensors   values (nnz,); words (rows, pitch) int32; offsets (rows + 1,); out (rows, cols); contiguous.
    Program   BLOCK_ROWS rows of 32 columns.
    Traffic   values and out once; words once per 32 columns to their right.
    """
    word = tl.program_id(1)
    offs_row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask_row = offs_row < rows
    bits, places = _entries(words_ptr, offsets_ptr, offs_row, mask_row, pitch, word, BLOCK_ROWS)
    values = tl.load(values_ptr + places, mask=bits, other=0.0)
    offs_col = word * 32 + tl.arange(0, 32)
    out_ptrs = out_ptr + offs_row[:, None].to(tl.int64) * cols + offs_col[None, :]
    tl.store(out_ptrs, values, mask=mask_row[:, None] & (offs_col < cols)[None, :])


@triton.jit
def _pack_sum_kernel(
    parts_ptr, words_ptr, offsets_ptr, train_ptr, out_ptr, rows, cols, pitch, parts,
    HAS_TRAIN: tl.constexpr, ACC_TYPE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """out[place of (i, j)] = sum_s parts[s, i, j] where the train mask has (i, j), else 0

    Tensors   parts (parts, rows, cols); words (rows, pitch) int32; train: like words, of a mask inside that
              one; offsets (rows + 1,); out (nnz,); contiguous.
    Program   BLOCK_ROWS rows of 32 columns.
    Numerics  sums in ACC_TYPE in the order of s, their errors kept; one rounding, at the store.
    Traffic   of the parts only what the train mask has, out once.
    """
    word = tl.program_id(1)
    offs_row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask_row = offs_row < rows
    bits, places = _entries(words_ptr, offsets_ptr, offs_row, mask_row, pitch, word, BLOCK_ROWS)
    trained = bits
    if HAS_TRAIN:
        train = tl.load(train_ptr + offs_row.to(tl.int64) * pitch + word, mask=mask_row, other=0)
        trained = bits & ((train[:, None] >> tl.arange(0, 32)[None, :] & 1) != 0)
    part_ptrs = parts_ptr + offs_row[:, None].to(tl.int64) * cols + (word * 32 + tl.arange(0, 32))[None, :]
    acc = tl.zeros((BLOCK_ROWS, 32), ACC_TYPE)
    rest = tl.zeros((BLOCK_ROWS, 32), ACC_TYPE)
    for _ in range(parts):
        acc, rest = add(acc, rest, tl.load(part_ptrs, mask=trained, other=0.0).to(ACC_TYPE))
        part_ptrs += wide(rows) * cols
    tl.store(out_ptr + places, total(acc, rest).to(out_ptr.dtype.element_ty), mask=bits)


def _prepare_unpack(values: Tensor, words: Tensor, offsets: Tensor, out: Tensor) -> Launch:
    (rows, pitch), cols = words.shape, out.shape[1]
    return Launch.of(_unpack_kernel, (triton.cdiv(rows, BLOCK_ROWS), pitch))(
        values,
        words,
        offsets,
        out,
        rows,
        cols,
        pitch,
        BLOCK_ROWS=BLOCK_ROWS,
        num_warps=4,
        enable_fp_fusion=True,
    )


def unpack_values(values: Tensor, words: Tensor, offsets: Tensor, cols: int) -> Tensor:
    """Return (rows, cols), dtype of ``values``: them at the mask's entries, zero elsewhere."""
    out = values.new_empty(words.shape[0], cols)
    if out.numel():
        launch(_prepare_unpack, (values.contiguous(), words, offsets, out))
    return out


def _prepare_pack(
    parts: Tensor, words: Tensor, offsets: Tensor, train_words: Tensor | None, out: Tensor
) -> Launch:
    (rows, pitch), (count, _, cols) = words.shape, parts.shape
    acc_type = tl_type(torch.float64 if parts.dtype is torch.float64 else torch.float32)
    return Launch.of(_pack_sum_kernel, (triton.cdiv(rows, BLOCK_ROWS), pitch))(
        parts, words, offsets, train_words, out, rows, cols, pitch, count,
        HAS_TRAIN=train_words is not None, ACC_TYPE=acc_type, BLOCK_ROWS=BLOCK_ROWS,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def pack_sum(
    parts: Tensor, words: Tensor, offsets: Tensor, train_words: Tensor | None, out: Tensor
) -> Tensor:
    """Write the sum of ``parts``, (S, rows, cols), at the mask's entries to ``out``, (nnz,), and return it.

    Zero at entries that ``train_words``, a mask inside the first, lacks.
    """
    if out.numel():
        launch(_prepare_pack, (parts, words, offsets, train_words, out))
    return out

"""The dropout mask as bits, made once for several passes over the same tensor."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Launch, launch
from ._tiles import keep_of, keep_words, wide

# the most elements of a copy: above, the pass that draws as it multiplies has enough programs
_FEW = 2**23


@triton.jit
def _mask_kernel(
    seed_ptr, words_ptr, threshold, rows, words, pitch,
    BLOCK_ROWS: tl.constexpr, BLOCK_WORDS: tl.constexpr,
):  # fmt: skip
    """words[m, j] = the bits of columns 32 j to 32 j + 31 of row m; see _tiles.keep_words."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    word = tl.program_id(1) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)[None, :]
    zero = tl.zeros((BLOCK_ROWS, BLOCK_WORDS), tl.int32)
    bits = keep_words(tl.load(seed_ptr), zero + row, zero + word, threshold).to(tl.int32, bitcast=True)
    tl.store(words_ptr + wide(pitch) * row + word, bits, mask=(row < rows) & (word < words))


def _prepare(seed: Tensor, mask: Tensor, threshold: int, rows: int, words: int) -> Launch:
    grid = (triton.cdiv(rows, 16), triton.cdiv(words, 64))
    return Launch.of(_mask_kernel, grid)(
        seed, mask, threshold, rows, words, words, BLOCK_ROWS=16, BLOCK_WORDS=64, num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip


def dropout_mask(seed: Tensor, rows: int, cols: int, threshold: int) -> Tensor:
    """Return the mask of a (rows, cols) tensor as bits, int32 (rows, ceil(cols / 32)).

    Bit c of word j of a row says whether column 32·j + c is kept. Memory: rows·cols / 8 bytes.
    """
    words = -(-cols // 32)
    mask = torch.empty(rows, words, dtype=torch.int32, device=seed.device)
    launch(_prepare, (seed,), threshold, rows, words, fresh=(mask,))
    return mask


@triton.jit
def _drop_kernel(
    x_ptr, seed_ptr, out_ptr, words_ptr, threshold, rows, cols, words, stride_xm, stride_xk,
    BLOCK_ROWS: tl.constexpr, BLOCK_WORDS: tl.constexpr,
):  # fmt: skip
    """out[m, k] = x[m, k] where bit k % 32 of words[m, k // 32] is set, else 0; the words as of _mask_kernel.

    Tensors   x (rows, cols), free strides; out (rows, cols) and words (rows, words) contiguous.
    Program   one tile of BLOCK_ROWS rows and BLOCK_WORDS words.
    Numerics  exact: the factor of the mask belongs into the product.
    Traffic   x once, out once.
    """
    BLOCK_COLS: tl.constexpr = 32 * BLOCK_WORDS
    index = tl.arange(0, BLOCK_ROWS * BLOCK_WORDS)[:, None]
    row = tl.program_id(0) * BLOCK_ROWS + index // BLOCK_WORDS
    word = tl.program_id(1) * BLOCK_WORDS + index % BLOCK_WORDS
    drawn = keep_words(tl.load(seed_ptr), row, word, threshold)
    inside = (row < rows) & (word < words)
    tl.store(words_ptr + wide(words) * row + word, drawn.to(tl.int32, bitcast=True), mask=inside)
    keep = keep_of(drawn, BLOCK_ROWS, BLOCK_COLS)
    offs_m = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    offs_k = (tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS))[None, :]
    mask = (offs_m < rows) & (offs_k < cols)
    x_ptrs = x_ptr + wide(stride_xm) * offs_m + wide(stride_xk) * offs_k
    x = tl.load(x_ptrs, mask=mask, other=0.0)
    tl.store(out_ptr + wide(cols) * offs_m + offs_k, tl.where(keep, x, tl.zeros_like(x)), mask=mask)


def _prepare_drop(
    x: Tensor, seed: Tensor, dropped: Tensor, mask: Tensor, threshold: int, words: int
) -> Launch:
    rows, cols = x.shape
    return Launch.of(_drop_kernel, (triton.cdiv(rows, 8), triton.cdiv(words, 16)))(
        x, seed, dropped, mask, threshold, rows, cols, words, *x.stride(),
        BLOCK_ROWS=8, BLOCK_WORDS=16, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def is_few(M: int, K: int, R: int) -> bool:
    """Whether cuBLAS and a copy of (M, K) elements with zeros beat a kernel that draws in its product."""
    return M > 128 and M * K <= _FEW and (R > 64 or (R > 32 and M < 1024))


def drop_some(x: Tensor, seed: Tensor, threshold: int) -> tuple[Tensor, Tensor]:
    """Return ``x`` (M, K) with zeros where it is dropped, and ``dropout_mask`` of it.

    What is kept is as it was: the factor 65536 / (65536 - threshold) is left to the caller. Memory: a copy.
    """
    rows, cols = x.shape
    words = -(-cols // 32)
    dropped = torch.empty(rows, cols, dtype=x.dtype, device=x.device)
    mask = torch.empty(rows, words, dtype=torch.int32, device=x.device)
    launch(_prepare_drop, (x, seed), threshold, words, fresh=(dropped, mask))
    return dropped, mask

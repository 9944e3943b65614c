"""The dropout mask as bits, made once for several passes over the same tensor."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Launch, launch
from ._tiles import wide


@triton.jit
def _philox(seed, c0, c1):
    """Philox-4x32-7 at counter (c0, c1, 0, 0), as tl.philox, with both halves of a product at once."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    c0 = c0.to(tl.uint32)
    c1 = c1.to(tl.uint32)
    c2 = tl.zeros_like(c0)
    c3 = c2
    for _ in tl.static_range(7):
        left = c0.to(tl.uint64) * 0xD2511F53
        right = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (right >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = right.to(tl.uint32)
        c2 = (left >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = left.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _mask_kernel(
    seed_ptr, words_ptr, threshold, rows, words, pitch,
    BLOCK_ROWS: tl.constexpr, BLOCK_WORDS: tl.constexpr,
):  # fmt: skip
    """One word a lane: four calls of Philox, of which each gives eight of its bits; see _tiles.keep_tile."""
    seed = tl.load(seed_ptr)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    word = tl.program_id(1) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)[None, :]
    zero = tl.zeros((BLOCK_ROWS, BLOCK_WORDS), tl.int32)
    bits = zero
    least = tl.full((), threshold, tl.uint32) << 16
    for t in tl.static_range(4):
        w0, w1, w2, w3 = _philox(seed, zero + word * 4 + t, zero + row)
        # a half-word is at least the threshold where the word that starts with it is at least ``least``
        bits |= (w0 << 16 >= least).to(tl.int32) << 2 * t | (w0 >= least).to(tl.int32) << 2 * t + 1
        bits |= (w1 << 16 >= least).to(tl.int32) << 2 * t + 8 | (w1 >= least).to(tl.int32) << 2 * t + 9
        bits |= (w2 << 16 >= least).to(tl.int32) << 2 * t + 16 | (w2 >= least).to(tl.int32) << 2 * t + 17
        bits |= (w3 << 16 >= least).to(tl.int32) << 2 * t + 24 | (w3 >= least).to(tl.int32) << 2 * t + 25
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

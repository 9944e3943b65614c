"""The gradients of both factors, after the pass that made dh and the parts of db, in one launch."""

from dataclasses import dataclass
from functools import cache, lru_cache
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._config import DeviceFacts, block_rank, device_facts
from ._launch import Launch, Part, launch
from ._tiles import add, total, wide


@triton.jit
def _add_parts(
    parts_ptr, out_ptr, parts, count, width, kept, first, CUT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out[i] = sum_s parts[s, i], BLOCK elements a program, in the order of s with its errors kept.

    With CUT out keeps the first ``kept`` of every ``width`` elements.
    """
    programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    for start in range(first * BLOCK, count, programs * BLOCK):
        offs = start + tl.arange(0, BLOCK)
        acc, rest = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for part in range(parts):
            one = tl.load(parts_ptr + wide(count) * part + offs, mask=offs < count, other=0.0)
            acc, rest = add(acc, rest, one)
        mask, places = offs < count, offs
        if CUT:
            mask, places = mask & (offs % width < kept), offs // width * kept + offs % width
        tl.store(out_ptr + places, total(acc, rest).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _masked(x, words, ROWS: tl.constexpr, COLS: tl.constexpr, PTX: tl.constexpr):
    """``x`` (ROWS, COLS) with zeros where bits of ``words`` (ROWS, COLS / 32) are zero."""
    col = tl.arange(0, 32)
    if PTX:
        # two 16-bit elements at once: a byte permutation repeats their bits, each at the top of a byte
        shifted = tl.reshape(words[:, :, None] << (7 - (col & 7))[None, None, :], (ROWS, COLS))
        chosen = (0xCC88 + 0x1111 * (col >> 3))[None, None, :]
        chosen = tl.reshape(tl.broadcast_to(chosen, (ROWS, COLS // 32, 32)), (ROWS, COLS))
        return tl.inline_asm_elementwise(
            "{ .reg .b32 both; prmt.b32 both, $2, $3, $4; and.b32 $0, $1, both; }", "=r,r,r,r,r,r",
            [x, shifted, chosen], dtype=x.dtype, is_pure=True, pack=2,
        )  # fmt: skip
    bits = words[:, :, None] >> col[None, None, :] & 1
    return tl.where(tl.reshape(bits, (ROWS, COLS)) != 0, x, tl.zeros_like(x))


@triton.jit(do_not_specialize=["R", "db_width", "db_kept"])
def _factors_kernel(
    x_ptr, dh_ptr, words_ptr, da_ptr, shares_ptr, counters_ptr, db_parts_ptr, db_ptr,
    M, K, R, width, pitch, rows_each, db_parts, db_count, db_width, db_kept, stride_xm, stride_dh,
    USE_DROPOUT: tl.constexpr, HAS_DB: tl.constexpr, CUT_DB: tl.constexpr, SHARES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """da[r, k] = sum_m dh[m, r] mask[m, k] x[m, k], and db[i] = sum_s db_parts[s, i]

    Tensors   x (M, K), dh (M, width), width ≥ R, rows contiguous; words, the mask's bits, (M, pitch) int32;
              da (R, K); shares (SHARES, K, width) float32 scratch; counters, one zero for each block of da;
              db_parts (db_parts, db_count) float32, db (db_count,), with CUT_DB db_kept of every
              db_width.
    Program   BLOCK_K columns, BLOCK_R ranks, one share of the rows; the last to finish of those that share a
              block adds up the shares in their order, so that the result does not depend on who that is.
    Numerics  16-bit products summed in float32. PTX: a mask is applied by instructions of NVIDIA's.
    Traffic   x once per BLOCK_R ranks, dh once per block of columns (from L2), da written once.
    Requires  BLOCK_K a multiple of 32, rows_each a multiple of BLOCK_M.
    """
    block_k, block_r, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    block = block_r * tl.num_programs(0) + block_k
    if HAS_DB:
        _add_parts(
            db_parts_ptr, db_ptr, db_parts, db_count, db_width, db_kept, block * SHARES + share, CUT_DB, 256
        )  # fmt: skip
    offs_k = block_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_r = block_r * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_m = share * rows_each + tl.arange(0, BLOCK_M)
    offs_w = block_k * (BLOCK_K // 32) + tl.arange(0, BLOCK_K // 32)
    x_ptrs = x_ptr + offs_m[:, None].to(tl.int64) * stride_xm + offs_k[None, :]
    dh_ptrs = dh_ptr + offs_m[:, None].to(tl.int64) * stride_dh + offs_r[None, :]
    if USE_DROPOUT:
        word_ptrs = words_ptr + offs_m[:, None].to(tl.int64) * pitch + offs_w[None, :]
    acc = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for row in range(share * rows_each, min(share * rows_each + rows_each, M), BLOCK_M):
        inside = (row + tl.arange(0, BLOCK_M) < M)[:, None]
        x = tl.load(x_ptrs, mask=inside & (offs_k < K)[None, :], other=0.0)
        dh = tl.load(dh_ptrs, mask=inside & (offs_r < width)[None, :], other=0.0)
        if USE_DROPOUT:
            words = tl.load(word_ptrs, mask=inside & (offs_w < pitch)[None, :], other=0)
            x = _masked(x, words, BLOCK_M, BLOCK_K, PTX)
            word_ptrs += wide(BLOCK_M) * pitch
        acc = tl.dot(x.T, dh, acc)
        x_ptrs += wide(BLOCK_M) * stride_xm
        dh_ptrs += wide(BLOCK_M) * stride_dh
    mask = (offs_k < K)[:, None] & (offs_r < width)[None, :]
    finished = True
    if SHARES > 1:
        share_ptrs = shares_ptr + offs_k[:, None] * width + offs_r[None, :]
        tl.store(share_ptrs + wide(K) * width * share, acc, mask=mask)
        tl.debug_barrier()
        finished = tl.atomic_add(counters_ptr + block, 1, sem="acq_rel", scope="gpu") == SHARES - 1
        if finished:
            acc = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
            for s in range(SHARES):
                acc += tl.load(share_ptrs + wide(K) * width * s, mask=mask, other=0.0)
    if finished:
        da_ptrs = da_ptr + wide(K) * offs_r[None, :] + offs_k[:, None]
        tl.store(da_ptrs, acc.to(da_ptr.dtype.element_ty), mask=mask & (offs_r < R)[None, :])


@dataclass(frozen=True, kw_only=True)
class FactorConfig:
    """Sizes of a launch. PROGRAMS: about how many there are for each multiprocessor."""

    BLOCK_M: int = 64
    BLOCK_K: int = 64
    BLOCK_R: int = 64
    PROGRAMS: float = 2
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        # a config is part of the key of every launch
        object.__setattr__(self, "_hash", hash(tuple(vars(self).values())))

    def __hash__(self) -> int:
        return self._hash


@lru_cache(maxsize=4096)
def factor_config(M: int, K: int, R: int, dropout: bool) -> FactorConfig:
    """Return the sizes of a launch for (M, K) elements of x and R columns of dh."""
    BLOCK_R = block_rank(R, 64)
    if not dropout:
        return FactorConfig(BLOCK_R=BLOCK_R)
    # with few rows, more programs are worth more than one read of x
    if R > 64 and M > 2048:
        BLOCK_R = 128
    if K < 8192:
        return FactorConfig(BLOCK_R=BLOCK_R, num_warps=8 if BLOCK_R > 64 else 4)
    return FactorConfig(
        BLOCK_K=128, BLOCK_R=BLOCK_R, num_warps=8 if R > 32 else 4, PROGRAMS=2 if BLOCK_R <= 64 else 1
    )


def _blocks(K: int, R: int, config: FactorConfig) -> int:
    return triton.cdiv(K, config.BLOCK_K) * triton.cdiv(R, config.BLOCK_R)


@lru_cache(maxsize=4096)
def _shares(M: int, K: int, R: int, config: FactorConfig, facts: DeviceFacts) -> tuple[int, int]:
    """Return the rows of one share, and the number of shares."""
    programs = config.PROGRAMS * facts.processors
    wanted = max(1, min(round(programs / _blocks(K, R, config)), triton.cdiv(M, 128), 32))
    each = triton.cdiv(triton.cdiv(M, wanted), 64) * 64
    return each, triton.cdiv(M, each)


@cache
def factor_counters(K: int, R: int) -> int:
    """Return how many zeros ``factor_gradients`` wants as counters."""
    return _blocks(K, R, FactorConfig(BLOCK_R=block_rank(R, 64)))  # no blocks are smaller


def _prepare(
    x: Tensor,
    dh: Tensor,
    mask: Tensor | None,
    db: Tensor | None,
    da: Tensor,
    shares: Tensor | None,
    counters: Tensor,
    db_parts: Tensor | None,
    each: int,
    sizes: tuple[int, ...] | None,
    R: int,
    dtype: torch.dtype,
    ptx: bool,
    config: FactorConfig,
) -> Launch:
    """Lay out the launch; ``dtype``, of da, is there to be a part of its key."""
    (M, K), width = x.shape, dh.shape[1]
    count = 1 if shares is None else shares.shape[0]
    grid = (triton.cdiv(K, config.BLOCK_K), triton.cdiv(width, config.BLOCK_R), count)
    return Launch.of(_factors_kernel, grid)(
        x, dh, mask, da, shares, counters, db_parts, db,
        M, K, R, width, 0 if mask is None else mask.shape[1], each,
        *((0, 0, 0, 0) if sizes is None else (sizes[0], prod(sizes[1:]), sizes[-1], db.shape[-1])),
        x.stride(0), dh.stride(0),
        USE_DROPOUT=mask is not None, HAS_DB=db is not None,
        CUT_DB=db is not None and sizes[-1] != db.shape[-1], SHARES=count,
        BLOCK_M=config.BLOCK_M, BLOCK_K=config.BLOCK_K, BLOCK_R=config.BLOCK_R, PTX=ptx,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip


def factor_gradients(
    x: Tensor,
    dh: Tensor,
    mask: Tensor | None,
    counters: Tensor | Part,
    db_parts: Tensor | Part | None = None,
    db: Tensor | None = None,
    dtype: torch.dtype | None = None,
    rank: int | None = None,
    *,
    config: FactorConfig | None = None,
) -> Tensor:
    """Return ``da = dhᵀ (mask ∘ x)``, (R, K); and write ``db``, the sum of ``db_parts`` (S, *db.shape).

    With ``rank`` dh may have more columns than those, and so may ``db_parts``.

    ``dtype``: of da, that of dh unless given. ``counters``: int32 zeros, ``factor_counters(K, R)`` of them or
    more, which are used up. ``db_parts``: float32. Both contiguous.
    """
    K, R = x.shape[1], dh.shape[1]
    rank = rank or R
    facts = device_facts(x.device)
    config = config or factor_config(*x.shape, R, mask is not None)
    each, count = _shares(*x.shape, R, config, facts)
    dtype = dh.dtype if dtype is None else dtype
    da = dh.new_empty((rank, K), dtype=dtype)
    shares = None if count == 1 else dh.new_empty((count, K, R), dtype=torch.float32)
    sizes = None if db_parts is None else db_parts.shape
    # with sm100 as the target Triton 3.6 keeps an address on the stack then
    ptx = facts.arch == "sm90"
    fresh = (da, shares, counters, db_parts)
    launch(_prepare, (x, dh, mask, db), each, sizes, rank, dtype, ptx, config, fresh=fresh)
    return da

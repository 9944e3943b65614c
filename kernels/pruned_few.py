"""Few tokens through a compressed weight, which is decoded in registers as it streams by."""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._compressed import add_products, as_pointer, columns_tile, fetch, first_value, half_word
from ._config import DeviceFacts, block_rank, device_facts, dot_precision, tl_type
from ._launch import Launch, launch
from ._packed import packed_args
from ._tiles import add, dot, total, wide

__all__ = ["MOST_TOKENS", "FewConfig", "overlaps", "pick_few", "pruned_few"]

MOST_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class FewConfig:
    """Tiles of one launch: BLOCK_N features and BLOCK_K columns a step; SPLIT programs share a sum over K."""

    BLOCK_N: int
    BLOCK_K: int
    SPLIT: int = 1
    num_warps: int = 4
    num_stages: int = 1


@triton.jit
def _x_columns(x_ptr, K, k, stride_xk, PACKED: tl.constexpr, DTYPE: tl.constexpr, GROUPS: tl.constexpr):
    """Columns 0 to 3 of every eight of a row of x from ``k`` on, each (GROUPS,); PACKED: in one load."""
    if PACKED:
        group = k // 4 + 2 * tl.arange(0, GROUPS)
        four = tl.load(as_pointer(x_ptr, tl.int64) + group, mask=group < K // 4, other=0)
        x0, x1 = half_word(four, 0, DTYPE), half_word(four, 16, DTYPE)
        x2, x3 = half_word(four, 32, DTYPE), half_word(four, 48, DTYPE)
    else:
        offs_k = k + 8 * tl.arange(0, GROUPS)
        ptrs = x_ptr + offs_k.to(tl.int64) * stride_xk
        x0 = tl.load(ptrs, mask=offs_k < K, other=0.0)
        x1 = tl.load(ptrs + stride_xk, mask=offs_k + 1 < K, other=0.0)
        x2 = tl.load(ptrs + 2 * wide(stride_xk), mask=offs_k + 2 < K, other=0.0)
        x3 = tl.load(ptrs + 3 * wide(stride_xk), mask=offs_k + 3 < K, other=0.0)
    return x0, x1, x2, x3


@triton.jit
def _store_sum(acc, y_ptrs, parts_ptrs, count, counter_ptr, mask, SPLIT: tl.constexpr):
    """Store ``acc``, or with SPLIT the sum of all programs' in their order, by the last to finish."""
    finished = True
    if SPLIT > 1:
        tl.store(parts_ptrs + wide(count) * tl.program_id(1), acc, mask=mask)
        tl.debug_barrier()
        finished = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == SPLIT - 1
        if finished:
            acc, rest = tl.zeros_like(acc), tl.zeros_like(acc)
            for part in range(SPLIT):
                acc, rest = add(acc, rest, tl.load(parts_ptrs + wide(count) * part, mask=mask, other=0.0))
            acc = total(acc, rest)
    if finished:
        tl.store(y_ptrs, acc.to(y_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _pruned_vector_kernel(
    x_ptr, values_ptr, bits_ptr, offset_ptr, start_ptr,
    h_ptr, b_ptr, bias_ptr, y_ptr, parts_ptr, counters_ptr,
    N, K, R, across, steps, stride_xk, stride_hr, stride_bn, stride_br, stride_bias,
    TWO_FOUR: tl.constexpr, PAIRED: tl.constexpr, PTX: tl.constexpr, DTYPE: tl.constexpr,
    PACKED: tl.constexpr, HAS_UPDATE: tl.constexpr, HAS_BIAS: tl.constexpr, ACC_TYPE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """y[n] = sum_k x[k] w[n, k]  +  sum_r h[r] b[n, r]  +  bias[n], one token

    Tensors   x (K,), at 8-byte boundaries if PACKED; w as _compressed.fetch says; h (R,)  b (N, R)  bias

              contiguous; parts (SPLIT, N) ACC_TYPE and counters, a zero for each block of N, with SPLIT.
    Program   BLOCK_N features, ``steps`` blocks of columns. A thread keeps its own columns: no entry of w
              crosses threads before the sum at the end.
    Numerics  products and sums in ACC_TYPE, one rounding, at the store.
    Traffic   the compressed weight once, x once per block of features (from L2).
    Requires  BLOCK_N a divisor of 64, BLOCK_K a multiple.
    """
    block, part = tl.program_id(0), tl.program_id(1)
    row = block * BLOCK_N
    GROUPS: tl.constexpr = BLOCK_K // 8
    acc = tl.zeros((BLOCK_N, GROUPS), ACC_TYPE)
    start = part * steps * BLOCK_K
    origin = first_value(start_ptr, across, row, TWO_FOUR)
    next_bits, next_at = fetch(
        values_ptr, bits_ptr, offset_ptr, start_ptr, origin, N, across, row, start,
        TWO_FOUR, PAIRED, BLOCK_N, GROUPS,
    )  # fmt: skip
    last = min(start + steps * BLOCK_K, K)
    for k in range(start, last, BLOCK_K):
        bits, at = next_bits, next_at
        # past the weight nothing is loaded
        ahead = tl.where(k + BLOCK_K < last, k + BLOCK_K, across * 64)
        next_bits, next_at = fetch(
            values_ptr, bits_ptr, offset_ptr, start_ptr, origin, N, across, row, ahead,
            TWO_FOUR, PAIRED, BLOCK_N, GROUPS,
        )  # fmt: skip
        x0, x1, x2, x3 = _x_columns(x_ptr, K, k, stride_xk, PACKED, DTYPE, GROUPS)
        x4, x5, x6, x7 = _x_columns(x_ptr, K, k + 4, stride_xk, PACKED, DTYPE, GROUPS)
        acc = add_products(
            acc, values_ptr + origin, bits, at, x0, x1, x2, x3, x4, x5, x6, x7,
            TWO_FOUR, PAIRED, PTX, DTYPE, GROUPS,
        )  # fmt: skip
    y = tl.sum(acc, 1)

    offs_n = row + tl.arange(0, BLOCK_N)
    mask = offs_n < N
    if HAS_UPDATE:
        for r in tl.range(part * BLOCK_R, R, SPLIT * BLOCK_R, num_stages=1):
            offs_r = r + tl.arange(0, BLOCK_R)
            h = tl.load(h_ptr + offs_r * stride_hr, mask=offs_r < R, other=0.0).to(ACC_TYPE)
            ptrs = b_ptr + offs_n[:, None].to(tl.int64) * stride_bn + offs_r[None, :].to(tl.int64) * stride_br
            b = tl.load(ptrs, mask=mask[:, None] & (offs_r < R)[None, :], other=0.0)
            y += tl.sum(b.to(ACC_TYPE) * h[None, :], 1)
    if HAS_BIAS:
        if part == 0:
            y += tl.load(bias_ptr + offs_n * stride_bias, mask=mask, other=0.0).to(ACC_TYPE)
    _store_sum(y, y_ptr + offs_n, parts_ptr + offs_n, N, counters_ptr + block, mask, SPLIT)


@triton.jit
def _pruned_few_kernel(
    x_ptr, values_ptr, bits_ptr, offset_ptr, start_ptr,
    h_ptr, b_ptr, bias_ptr, y_ptr, parts_ptr, counters_ptr,
    M, N, K, R, across, steps,
    stride_xm, stride_xk, stride_hm, stride_hr, stride_bn, stride_br, stride_bias,
    TWO_FOUR: tl.constexpr, PAIRED: tl.constexpr, PTX: tl.constexpr, DTYPE: tl.constexpr,
    HAS_UPDATE: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, ACC_TYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """y[m, n] = sum_k x[m, k] w[n, k]  +  sum_r h[m, r] b[n, r]  +  bias[n], at most BLOCK_M tokens

    Tensors   x (M, K)  w as _compressed.fetch says  h (M, R)  b (N, R)  bias (N,); y (M, N) contiguous; parts
              (SPLIT, M, N) ACC_TYPE and counters, a zero for each block of N, with SPLIT.
    Program   BLOCK_N features of all tokens, ``steps`` blocks of columns; the tile is transposed, because
              features fill the wide side of a tensor-core product and tokens its narrow side.
    Numerics  products as _tiles.dot says, sums in ACC_TYPE, one rounding, at the store.
    Traffic   the compressed weight once, x once per block of features (from L2).
    Requires  BLOCK_N a divisor of 64, BLOCK_K a multiple, BLOCK_M at least M and 16.
    """
    block, part = tl.program_id(0), tl.program_id(1)
    row = block * BLOCK_N
    offs_m, offs_n = tl.arange(0, BLOCK_M), row + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    acc, rest = tl.zeros((BLOCK_N, BLOCK_M), ACC_TYPE), tl.zeros((BLOCK_N, BLOCK_M), ACC_TYPE)
    GROUPS: tl.constexpr = BLOCK_K // 8
    start = part * steps * BLOCK_K
    origin = first_value(start_ptr, across, row, TWO_FOUR)
    next_bits, next_at = fetch(
        values_ptr, bits_ptr, offset_ptr, start_ptr, origin, N, across, row, start,
        TWO_FOUR, PAIRED, BLOCK_N, GROUPS,
    )  # fmt: skip
    last = min(start + steps * BLOCK_K, K)
    for k in range(start, last, BLOCK_K):
        bits, at = next_bits, next_at
        # past the weight nothing is loaded
        ahead = tl.where(k + BLOCK_K < last, k + BLOCK_K, across * 64)
        next_bits, next_at = fetch(
            values_ptr, bits_ptr, offset_ptr, start_ptr, origin, N, across, row, ahead,
            TWO_FOUR, PAIRED, BLOCK_N, GROUPS,
        )  # fmt: skip
        offs_k = k + tl.arange(0, BLOCK_K)
        x_ptrs = x_ptr + offs_m[None, :].to(tl.int64) * stride_xm + offs_k[:, None].to(tl.int64) * stride_xk
        x = tl.load(x_ptrs, mask=mask_m[None, :] & (offs_k < K)[:, None], other=0.0)
        w = columns_tile(values_ptr + origin, bits, at, TWO_FOUR, PAIRED, PTX, DTYPE, BLOCK_N, GROUPS)
        acc, rest = dot(w, x, acc, rest, PRECISION)
    if HAS_UPDATE:
        for r in tl.range(part * BLOCK_R, R, SPLIT * BLOCK_R, num_stages=1):
            offs_r = r + tl.arange(0, BLOCK_R)
            h_ptrs = h_ptr + offs_m[None, :].to(tl.int64) * stride_hm + offs_r[:, None] * stride_hr
            b_ptrs = (
                b_ptr + offs_n[:, None].to(tl.int64) * stride_bn + offs_r[None, :].to(tl.int64) * stride_br
            )
            h = tl.load(h_ptrs, mask=mask_m[None, :] & (offs_r < R)[:, None], other=0.0)
            b = tl.load(b_ptrs, mask=mask_n[:, None] & (offs_r < R)[None, :], other=0.0)
            acc, rest = dot(b.to(DTYPE), h.to(DTYPE), acc, rest, PRECISION)
    if HAS_BIAS:
        if part == 0:
            bias = tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0).to(ACC_TYPE)
            acc, rest = add(acc, rest, bias[:, None] + tl.zeros_like(acc))
    if PRECISION == "float":
        acc = total(acc, rest)
    offs = offs_m[None, :].to(tl.int64) * N + offs_n[:, None]
    mask = mask_m[None, :] & mask_n[:, None]
    _store_sum(acc, y_ptr + offs, parts_ptr + offs, M * N, counters_ptr + block, mask, SPLIT)


@lru_cache(maxsize=4096)
def pick_few(M: int, N: int, K: int, two_four: bool, dtype: torch.dtype, facts: DeviceFacts) -> FewConfig:
    """Return the tiles for M tokens: enough programs to fill the GPU, by splitting K if need be."""
    if facts.arch == "cpu":
        return FewConfig(BLOCK_N=16, BLOCK_K=64, SPLIT=2)
    rows, depth = (16 if M == 1 else 64), 256 if two_four and M == 1 else 64
    wanted = max(1, round(6 * facts.processors / triton.cdiv(N, rows)))
    return FewConfig(BLOCK_N=rows, BLOCK_K=depth, SPLIT=min(wanted, 8, triton.cdiv(K, 2 * depth)))


def _steps(K: int, config: FewConfig) -> tuple[int, int]:
    """Return the blocks of columns of one program, and how many programs share a sum."""
    steps = triton.cdiv(triton.cdiv(K, config.BLOCK_K), config.SPLIT)
    return steps, triton.cdiv(K, steps * config.BLOCK_K)


def _constants(
    dtype: torch.dtype, R: int, has_bias: bool, split: int, config: FewConfig
) -> dict[str, object]:
    """Return what both kernels are compiled for."""
    return {
        "HAS_UPDATE": R > 0,
        "HAS_BIAS": has_bias,
        "ACC_TYPE": tl_type(dtype, accumulate=True),
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_K": config.BLOCK_K,
        "BLOCK_R": block_rank(R, 64 if dtype.itemsize == 2 else 16),
        "SPLIT": split,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }


def _prepare(
    x: Tensor,
    h: Tensor | None,
    b: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    parts: Tensor | None,
    counters: Tensor | None,
    *rest: object,
) -> Launch:
    *packed, config = rest
    (M, K), N, dtype = x.shape, y.shape[1], y.dtype
    R = 0 if h is None else h.shape[1]
    pointers, across, constants = packed_args(tuple(packed), dtype, device_facts(y.device))
    steps, split = _steps(K, config)
    precision, _ = dot_precision(dtype, dtype)
    h_strides, b_strides = (0, 0) if h is None else h.stride(), (0, 0) if b is None else b.stride()
    # without a split nothing is read or written there
    parts, counters = y if parts is None else parts, y if counters is None else counters
    common = {**constants, **_constants(dtype, R, bias is not None, split, config)}
    tensors = (*pointers, h, b, bias, y, parts, counters)
    stride_bias = 0 if bias is None else bias.stride(0)
    grid = (triton.cdiv(N, config.BLOCK_N), split)
    if M == 1:
        packs = dtype.itemsize == 2 and x.stride(1) == 1 and K % 4 == 0 and x.data_ptr() % 8 == 0
        return Launch.of(_pruned_vector_kernel, grid)(
            x, *tensors, N, K, R, across, steps, x.stride(1), h_strides[1], *b_strides, stride_bias,
            PACKED=packs, **common,
        )  # fmt: skip
    return Launch.of(_pruned_few_kernel, grid)(
        x, *tensors, M, N, K, R, across, steps, *x.stride(), *h_strides, *b_strides, stride_bias,
        PRECISION=precision, BLOCK_M=max(16, triton.next_power_of_2(M)), **common,
    )  # fmt: skip


def overlaps(x: Tensor, packed: list[Tensor]) -> bool:
    """Whether ``pruned_stream.adapted_stream`` takes them: a bitmap, where launches may overlap."""
    if x.shape[0] > 16 or x.element_size() != 2 or len(packed) != 4:
        return False
    arch = device_facts(x.device).arch
    return arch.startswith("sm") and int(arch[2:]) >= 90


def pruned_few(
    x: Tensor,
    packed: list[Tensor],
    N: int,
    h: Tensor | None,
    b: Tensor | None,
    bias: Tensor | None,
    *,
    config: FewConfig | None = None,
) -> Tensor:
    """Return ``y = x wᵀ + h bᵀ + bias``, (M, N), for 1 ≤ M ≤ ``MOST_TOKENS``; N and K positive."""
    M, K = x.shape
    facts = device_facts(x.device)
    # the other kernel's 2:4 loads take 16 bytes at once
    streams = x.element_size() == 2 and (len(packed) == 4 or packed[0].data_ptr() % 16 == 0)
    if config is None and streams and facts.arch.startswith("sm"):
        from .pruned_stream import pruned_stream

        return pruned_stream(x, packed, N, h, b, bias)
    config = config or pick_few(M, N, K, len(packed) == 2, x.dtype, facts)
    _, split = _steps(K, config)
    y, parts, counters = x.new_empty(M, N), None, None
    if split > 1:
        acc_type = torch.float64 if x.dtype is torch.float64 else torch.float32
        parts = x.new_empty((split, M, N), dtype=acc_type)
        counters = x.new_zeros(triton.cdiv(N, config.BLOCK_N), dtype=torch.int32)
    launch(_prepare, (x, h, b, bias, y, parts, counters, *packed), config)
    return y

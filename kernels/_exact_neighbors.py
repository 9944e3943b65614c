"""Distances to neighbours by differences: exact to float32's rounding, however close the points are."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._config import DeviceFacts
from ._tiles import wide

_INFINITE = tl.constexpr(0x7F800000)  # bits of float32's infinity


@triton.jit
def _measure_kernel(
    points_ptr, keys_ptr, first_ptr, second_ptr,
    K, factor,
    stride_pm, stride_pk,
    KEPT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """first[m], second[m] = the two smallest |factor * (points[m] - points[n])|, n in the keys of m

    Tensors   points (M, K), strides free; keys (M, KEPT) int64 of _screen_kernel; first, second (M,).
    Program   one point.
    Numerics  float32 differences, which are exact for close neighbours, squared and summed in float32.
    Traffic   KEPT + 1 rows a point, mostly from L2.
    Requires  KEPT a power of two.
    """
    row = tl.program_id(0)
    offs_slot, offs_k = tl.arange(0, KEPT), tl.arange(0, BLOCK_K)
    keys = tl.load(keys_ptr + wide(row) * KEPT + offs_slot)
    is_point = (keys >> 32) < _INFINITE
    other_ptrs = points_ptr + (keys & 0xFFFFFFFF)[:, None] * stride_pm
    row_ptr = points_ptr + wide(row) * stride_pm
    acc = tl.zeros((KEPT, BLOCK_K), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask = k + offs_k < K
        offs = (k + offs_k).to(tl.int64) * stride_pk
        point = tl.load(row_ptr + offs, mask=mask, other=0.0).to(tl.float32) * factor
        other = tl.load(other_ptrs + offs[None, :], mask=is_point[:, None] & mask[None, :], other=0.0)
        difference = other.to(tl.float32) * factor - point[None, :]
        acc += difference * difference
    square = tl.where(is_point, tl.sum(acc, 1), float("inf"))
    nearest = tl.argmin(square, 0)
    tl.store(first_ptr + row, tl.sqrt_rn(tl.min(square, 0)))
    tl.store(second_ptr + row, tl.sqrt_rn(tl.min(tl.where(offs_slot == nearest, float("inf"), square), 0)))


@triton.jit
def _search_kernel(
    points_ptr, rows_ptr, found_ptr,
    M, K, count, factor, tiles_each,
    stride_pm, stride_pk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """found[s, :, i] = the two smallest |factor * (points[rows[i]] - points[n])|, n in the s-th share

    Tensors   points (M, K), strides free; rows (count,) int64; found (shares, 2, count).
    Program   BLOCK_M of the listed points and one share of their neighbours, walked tile by tile.
    Numerics  as in _measure_kernel: no cancellation whatever the points.
    Traffic   all points once per BLOCK_M of the listed ones.
    """
    offs_m, share = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1)
    offs_k = tl.arange(0, BLOCK_K)
    row = tl.load(rows_ptr + offs_m, mask=offs_m < count, other=0)
    row_ptrs = points_ptr + (row * stride_pm)[:, None, None]
    first = tl.full((BLOCK_M,), float("inf"), tl.float32)
    second = first
    for tile in range(share * tiles_each, min((share + 1) * tiles_each, tl.cdiv(M, BLOCK_N))):
        offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        other_ptrs = points_ptr + offs_n.to(tl.int64)[None, :, None] * stride_pm
        acc = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_K), tl.float32)
        for k in range(0, K, BLOCK_K):
            mask = (k + offs_k < K)[None, None, :]
            offs = ((k + offs_k).to(tl.int64) * stride_pk)[None, None, :]
            point = tl.load(row_ptrs + offs, mask=mask, other=0.0).to(tl.float32) * factor
            other = tl.load(other_ptrs + offs, mask=mask & (offs_n < M)[None, :, None], other=0.0)
            difference = other.to(tl.float32) * factor - point
            acc += difference * difference
        is_other = (offs_n < M)[None, :] & (offs_n[None, :] != row[:, None])
        square = tl.where(is_other, tl.sum(acc, 2), float("inf"))
        is_nearest = tl.arange(0, BLOCK_N)[None, :] == tl.argmin(square, 1)[:, None]
        least = tl.min(square, 1)
        next_least = tl.min(tl.where(is_nearest, float("inf"), square), 1)
        second = tl.minimum(tl.maximum(first, least), tl.minimum(second, next_least))
        first = tl.minimum(first, least)
    found_ptrs = found_ptr + wide(share) * 2 * count + offs_m
    tl.store(found_ptrs, tl.sqrt_rn(first), mask=offs_m < count)
    tl.store(found_ptrs + count, tl.sqrt_rn(second), mask=offs_m < count)


def measure_candidates(points: Tensor, keys: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Return factor · distance to the nearest and second nearest of each point's candidates, (M,) float32."""
    M, K = points.shape
    first, second = (points.new_empty(M, dtype=torch.float32) for _ in range(2))
    _measure_kernel[(M,)](
        points, keys, first, second,
        K, factor,
        points.stride(0), points.stride(1),
        KEPT=keys.shape[1], BLOCK_K=256, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return first, second


def search_all(points: Tensor, rows: Tensor, factor: float, facts: DeviceFacts) -> tuple[Tensor, Tensor]:
    """Return factor · distance to the two nearest of all points, for the listed rows, (count,) float32."""
    (M, K), count = points.shape, rows.numel()
    BLOCK_M, BLOCK_N = 4, 32
    blocks, tiles = triton.cdiv(count, BLOCK_M), triton.cdiv(M, BLOCK_N)
    each = triton.cdiv(tiles, max(1, min(tiles, 16 * facts.processors // blocks)))
    shares = triton.cdiv(tiles, each)
    found = points.new_empty(shares, 2, count, dtype=torch.float32)
    _search_kernel[(blocks, shares)](
        points, rows, found,
        M, K, count, factor, each,
        points.stride(0), points.stride(1),
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=64, num_warps=8, num_stages=2, enable_fp_fusion=True,
    )  # fmt: skip
    first, second = found.flatten(0, 1).topk(2, dim=0, largest=False).values
    return first, second

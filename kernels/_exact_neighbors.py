"""Distances to neighbours by differences: exact to float32's rounding, however close the points are."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._config import DeviceFacts
from ._screen_neighbors import ScreenConfig
from ._tiles import wide

_INFINITE = tl.constexpr(0x7F800000)  # bits of float32's infinity


@triton.jit
def _is_beyond(square, second, length, error, worst_error, depth):
    """Whether no point at or above this squared distance, as screening computed it, is nearer than second.

    Let q be a rounded point, e what rounding took, t = second. A point j nearer than t has |q_j| <= near
    := |q| + t + e, and rounding took at most e_j of it: 2⁻¹¹ near + 2⁻²⁵ √K, and no more than of the worst
    point. Its computed squared distance is off by the sums' errors: of q·q_j, each step of 16 products may
    lose 2⁻²⁰ |q| near on tensor cores, which truncate; |q|² and |q_j|² are float32 sums of numbers that are
    not negative. So the computed one is below (t + e + e_j)² + loss. In float64.
    """
    near = length + second + error
    loss = depth * 2**-23 * length * near + (depth * 2**-33 + 2**-19) * (length * length + near * near)
    # roots are of float32: those of float64 are calls, with a stack
    root = tl.sqrt_rn(depth.to(tl.float32)).to(tl.float64) * (1 + 2**-20)
    error_other = tl.minimum(2**-11 * near + 2**-25 * root, worst_error + 2**-23 * near)
    # the factor is for the rounding of second itself
    reach = second * (1 + 2**-16) + error + error_other
    return (second == 0) | (square - loss >= reach * reach)


@triton.jit
def _distance_of(key):
    """The squared distance in a key's high half, in float64."""
    return (key >> 32).to(tl.int32).to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def _measure_kernel(
    points_ptr, keys_ptr, square_ptr, error_ptr, worst_error_ptr, first_ptr, second_ptr, certain_ptr,
    K, depth, shares, factor,
    stride_pm, stride_pk, stride_keys,
    SHARES: tl.constexpr, KEPT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """first[m], second[m] = the two smallest |factor * (points[m] - points[n])|, n in the keys of m

    certain[m] says whether a point outside the keys cannot be nearer than second[m].

    Tensors   points (M, K), strides free; keys (M, shares, KEPT) int64 of _screen_kernel; square, error of
              _round_points_kernel, worst_error () the largest of error; first, second, certain (M,).
    Program   one point; candidates by rising key, two at a time, until the next ones are certainly farther.
    Numerics  float32 differences, which are exact for close neighbours, squared and summed in float32.
    Traffic   a row a point and one for every candidate that is measured, two at least.
    Requires  SHARES and KEPT powers of two, SHARES at least shares.
    """
    row = tl.program_id(0)
    offs_share, offs_k = tl.arange(0, SHARES)[:, None], tl.arange(0, BLOCK_K)
    infinite = wide(_INFINITE) << 32
    keys_ptrs = keys_ptr + wide(row) * stride_keys + offs_share * KEPT + tl.arange(0, KEPT)[None, :]
    keys = tl.load(keys_ptrs, mask=offs_share < shares, other=infinite)
    # all points below the largest key of their share are in it
    limit = tl.min(tl.max(keys, 1), 0)
    length = tl.sqrt_rn(tl.load(square_ptr + row)).to(tl.float64) * (1 + 2**-16)
    # float32 rounds a centred point too, before float16 does
    error = tl.load(error_ptr + row).to(tl.float64) * (1 + 2**-14) + 2**-23 * length
    worst_error, long = tl.load(worst_error_ptr).to(tl.float64) * (1 + 2**-14), depth.to(tl.float64)
    row_ptr = points_ptr + wide(row) * stride_pm
    first = tl.full((), float("inf"), tl.float32)
    second = first
    key = tl.min(tl.min(keys, 1), 0)
    is_near = key < infinite
    while is_near:
        keys = tl.where(keys == key, infinite, keys)
        other = tl.min(tl.min(keys, 1), 0)
        keys = tl.where(keys == other, infinite, keys)
        is_other = other < infinite
        left_ptr = points_ptr + (key & 0xFFFFFFFF) * stride_pm
        right_ptr = points_ptr + tl.where(is_other, other & 0xFFFFFFFF, 0) * stride_pm
        left_acc, right_acc = tl.zeros((BLOCK_K,), tl.float32), tl.zeros((BLOCK_K,), tl.float32)
        for k in range(0, K, BLOCK_K):
            mask = k + offs_k < K
            offs = (k + offs_k).to(tl.int64) * stride_pk
            point = tl.load(row_ptr + offs, mask=mask, other=0.0).to(tl.float32) * factor
            left = tl.load(left_ptr + offs, mask=mask, other=0.0).to(tl.float32) * factor - point
            right = tl.load(right_ptr + offs, mask=mask, other=0.0).to(tl.float32) * factor - point
            left_acc += left * left
            right_acc += right * right
        left_square = tl.sum(left_acc, 0)
        right_square = tl.where(is_other, tl.sum(right_acc, 0), float("inf"))
        least, next_least = tl.minimum(left_square, right_square), tl.maximum(left_square, right_square)
        second = tl.minimum(tl.maximum(first, least), tl.minimum(second, next_least))
        first = tl.minimum(first, least)
        key = tl.min(tl.min(keys, 1), 0)
        farthest = tl.sqrt_rn(second).to(tl.float64)
        beyond = _is_beyond(_distance_of(key), farthest, length, error, worst_error, long)
        is_near = (key < infinite) & (beyond == 0)
    farthest = tl.sqrt_rn(second).to(tl.float64)
    beyond = _is_beyond(_distance_of(limit), farthest, length, error, worst_error, long)
    tl.store(first_ptr + row, tl.sqrt_rn(first))
    tl.store(second_ptr + row, tl.sqrt_rn(second))
    tl.store(certain_ptr + row, (limit >= infinite) | beyond)


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


def measure_candidates(
    points: Tensor,
    keys: Tensor,
    square: Tensor,
    error: Tensor,
    depth: int,
    config: ScreenConfig,
    factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return factor · distance to the nearest and second nearest of each point's candidates, (M,) float32.

    And whether they are the nearest of all points, (M,) bool. square, error and depth are of round_points.
    """
    (M, K), shares = points.shape, keys.shape[1] // config.KEPT
    first, second = (points.new_empty(M, dtype=torch.float32) for _ in range(2))
    certain = points.new_empty(M, dtype=torch.bool)
    _measure_kernel[(M,)](
        points, keys, square, error, error.amax(), first, second, certain,
        K, depth, shares, factor,
        points.stride(0), points.stride(1), keys.stride(0),
        SHARES=triton.next_power_of_2(shares), KEPT=config.KEPT,
        BLOCK_K=config.BLOCK_MEASURE, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return first, second, certain


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

"""Candidates for the nearest neighbours of every point, from one product on the tensor cores."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._config import DeviceFacts
from ._tiles import wide

_INFINITE = tl.constexpr(0x7F800000)  # bits of float32's infinity: the largest value of a key


@dataclass(frozen=True, kw_only=True)
class ScreenConfig:
    """Tiles of the screening product; BLOCK_N at most 256, BLOCK_N columns' numbers fill a key's low bits.

    KEPT, a power of two, is the number of candidates that a point keeps of every share of the others; EARLY
    stops looking for them in a tile once no row finds another. A multiprocessor gets about PROGRAMS shares.
    BLOCK_MEASURE columns at a time are then measured exactly.
    """

    KEPT: int = 8
    EARLY: bool = True
    PROGRAMS: int = 12
    BLOCK_MEASURE: int = 2048
    BLOCK_M: int = 128
    BLOCK_N: int = 128
    BLOCK_K: int = 64
    DESCRIPTORS: bool = False
    num_warps: int = 8
    num_stages: int = 3


def pick_screen(arch: str) -> ScreenConfig:
    """Return the tiles for an architecture as ``DeviceFacts.arch`` names it."""
    if arch == "sm90":
        return ScreenConfig(BLOCK_N=256, DESCRIPTORS=True)
    if arch in ("sm80", "sm100"):
        return ScreenConfig(DESCRIPTORS=arch == "sm100")
    if arch == "cpu":
        return ScreenConfig(BLOCK_M=32, BLOCK_N=32, BLOCK_K=32)
    if arch.startswith("gfx"):
        return ScreenConfig(BLOCK_K=32, num_stages=2)
    return ScreenConfig(BLOCK_M=64)


@triton.jit
def _round_points_kernel(
    points_ptr, centre_ptr, rounded_ptr, square_ptr, error_ptr,
    M, K, depth, factor,
    stride_pm, stride_pk,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """rounded[m] = float16(factor * (points[m] - centre)), its squared length, and what rounding took

    Tensors   points (M, K), strides free  centre (K,)  rounded (rows, depth)  square, error (rows,)
    Program   one row; those from M on, and the columns from K on, become zeros.
    Numerics  float32; factor is a power of two. A sum is of depth / BLOCK_K numbers, then of BLOCK_K.
    Requires  rows of rounded = number of programs.
    """
    row = tl.program_id(0)
    offs_k = tl.arange(0, BLOCK_K)
    points_row, rounded_row = points_ptr + wide(row) * stride_pm, rounded_ptr + wide(row) * depth
    square, error = tl.zeros((BLOCK_K,), tl.float32), tl.zeros((BLOCK_K,), tl.float32)
    width = tl.where(row < M, K, 0)
    for k in range(0, depth, BLOCK_K):
        mask = k + offs_k < width
        point = tl.load(points_row + (k + offs_k).to(tl.int64) * stride_pk, mask=mask, other=0.0)
        centred = point.to(tl.float32) * factor
        centred -= tl.load(centre_ptr + k + offs_k, mask=mask, other=0.0) * factor
        rounded = centred.to(tl.float16)
        tl.store(rounded_row + k + offs_k, rounded, mask=k + offs_k < depth)
        back = rounded.to(tl.float32)
        square += back * back
        error += (back - centred) * (back - centred)
    tl.store(square_ptr + row, tl.sum(square, 0))
    tl.store(error_ptr + row, tl.sqrt_rn(tl.sum(error, 0)))


@triton.jit
def _screen_kernel(
    left_ref, right_ref, square_ptr, keys_ptr,
    M, depth, shares, tiles_each,
    USE_DESC: tl.constexpr, KEPT: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """keys[m, s] = the KEPT smallest of (|q[m] - q[n]|², n), n != m, n in the s-th share of all points

    Tensors   left and right are q (rows, depth), contiguous float16, or descriptors of it; square (rows,)
              = |q|²; keys (rows, shares, KEPT) int64, squared distance in the high half, n in the low.
    Program   BLOCK_M points and one share of their neighbours, walked tile by tile; programs side by side
              share rows of tiles and tiles_each columns of tiles, so that operands stay in L2.
    Numerics  exact products of float16, sums in float32; the low bits of a squared distance, as many as
              number BLOCK_N columns, are cut off: what is kept is never above what was computed.
    Traffic   q once per tile row and once per tile column, mostly from L2; KEPT keys a point and share.
    Requires  rows a multiple of BLOCK_M and BLOCK_N, depth of BLOCK_K; KEPT a power of two.
    Source    Facco et al. 2017, TwoNN (doi:10.1038/s41598-017-11873-y), needs two neighbours; the rest is in
              nearest_neighbors.
    """
    row = (tl.program_id(0) // shares) * BLOCK_M
    share = tl.program_id(0) % shares
    offs_m = row + tl.arange(0, BLOCK_M)
    offs_slot = tl.arange(0, KEPT)
    square_m = tl.load(square_ptr + offs_m)
    infinite = wide(_INFINITE) << 32
    best = tl.zeros((BLOCK_M, KEPT), tl.int64) + infinite + offs_slot[None, :]

    for tile in range(share * tiles_each, min((share + 1) * tiles_each, tl.cdiv(M, BLOCK_N))):
        col = tile * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if USE_DESC:
            for k in range(0, depth, BLOCK_K):
                acc = tl.dot(left_ref.load([row, k]), right_ref.load([col, k]).T, acc)
        else:
            offs_k = tl.arange(0, BLOCK_K)
            left_ptrs = left_ref + offs_m[:, None].to(tl.int64) * depth + offs_k[None, :]
            right_ptrs = right_ref + (col + tl.arange(0, BLOCK_N))[None, :].to(tl.int64) * depth
            right_ptrs += offs_k[:, None]
            for _ in range(0, depth, BLOCK_K):
                acc = tl.dot(tl.load(left_ptrs), tl.load(right_ptrs), acc)
                left_ptrs += BLOCK_K
                right_ptrs += BLOCK_K

        number = tl.arange(0, BLOCK_N)
        offs_n = col + number
        square = square_m[:, None] + tl.load(square_ptr + offs_n)[None, :] - 2.0 * acc
        # no distance is negative, and bits of floats that are not negative are in the order of the floats
        keys = tl.maximum(square, 0.0).to(tl.int32, bitcast=True)
        is_other = (offs_n[None, :] < M) & (offs_n[None, :] != offs_m[:, None])
        keys = tl.where(is_other, keys, _INFINITE) & -BLOCK_N | number[None, :]
        looked = tl.full((), 0, tl.int32)
        while looked < KEPT:
            least = tl.min(keys, 1)
            keys = tl.where(keys == least[:, None], 0x7FFFFFFF, keys)
            key = ((least & -BLOCK_N).to(tl.int64) << 32) + (least & (BLOCK_N - 1)) + col
            worst = tl.max(best, 1)
            enters = (least < _INFINITE) & (key < worst)
            best = tl.where((best == worst[:, None]) & enters[:, None], key[:, None], best)
            looked += 1
            if EARLY:
                # a tile's later keys are larger, and so enter no row that this one did not
                looked = tl.where(tl.max(enters.to(tl.int32), 0) == 0, KEPT, looked)

    keys_ptrs = keys_ptr + ((offs_m[:, None].to(tl.int64) * shares + share) * KEPT + offs_slot[None, :])
    tl.store(keys_ptrs, best)


def round_points(points: Tensor, centre: Tensor, factor: float, config: ScreenConfig) -> tuple[Tensor, ...]:
    """Return ``q = float16(factor · (points - centre))``, padded with zeros to whole tiles, |q|² and errors.

    q (rows, depth); |q|² and the length of what rounding took, |q - factor · (points - centre)|, are (rows,)
    in float32.
    """
    M, K = points.shape
    rows = triton.cdiv(M, max(config.BLOCK_M, config.BLOCK_N)) * max(config.BLOCK_M, config.BLOCK_N)
    depth = triton.cdiv(K, config.BLOCK_K) * config.BLOCK_K
    rounded = points.new_empty(rows, depth, dtype=torch.float16)
    square, error = (points.new_empty(rows, dtype=torch.float32) for _ in range(2))
    _round_points_kernel[(rows,)](
        points, centre, rounded, square, error,
        M, K, depth, factor,
        points.stride(0), points.stride(1),
        BLOCK_K=min(512, triton.next_power_of_2(depth)), num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
    return rounded, square, error


def screen(rounded: Tensor, square: Tensor, M: int, config: ScreenConfig, facts: DeviceFacts) -> Tensor:
    """Return ``keys``, (M, shares · KEPT), int64: the KEPT nearest others of each of M points in every share.

    The high half of a key is the bits of a float32 not above |q[m] - q[n]|² as computed, the low half n;
    where a share has fewer others than KEPT, infinity and a number that means nothing.
    """
    tiles_m, tiles_n = triton.cdiv(M, config.BLOCK_M), triton.cdiv(M, config.BLOCK_N)
    # several programs a multiprocessor, so that the last ones to run leave few idle
    each = triton.cdiv(tiles_n, max(1, min(tiles_n, config.PROGRAMS * facts.processors // tiles_m)))
    shares = triton.cdiv(tiles_n, each)
    keys = rounded.new_empty(rounded.shape[0], shares * config.KEPT, dtype=torch.int64)
    left = right = rounded
    if config.DESCRIPTORS:
        left = TensorDescriptor.from_tensor(rounded, [config.BLOCK_M, config.BLOCK_K])
        right = TensorDescriptor.from_tensor(rounded, [config.BLOCK_N, config.BLOCK_K])
    _screen_kernel[(tiles_m * shares,)](
        left, right, square, keys,
        M, rounded.shape[1], shares, each,
        USE_DESC=config.DESCRIPTORS, KEPT=config.KEPT, EARLY=config.EARLY,
        BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, BLOCK_K=config.BLOCK_K,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return keys[:M]

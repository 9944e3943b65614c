"""Launcher of Hopper's DenseLoRA kernel: the whole forward pass in one launch."""

import triton
from torch import Tensor

from ._config import block_rank, device_facts
from ._hopper_dense import hopper_dense_kernel
from ._launch import Launch, launch
from .hopper import HopperConfig, _box, _flags, _ring, _serves, _zeros

__all__ = ["hopper_dense_forward"]

_BLOCK_Y = 64  # columns of y that are finished at a time


def _prepare(
    x: Tensor,
    w: Tensor,
    encoder: Tensor | None,
    factor: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    mask: Tensor | None,
    u: Tensor,
    h: Tensor,
    flags: Tensor,
    y: Tensor,
    scale: float,
    gelu: bool,
    threshold: int,
    c: HopperConfig,
) -> Launch | None:
    (M, K), (N, R) = x.shape, factor.shape
    if encoder is None:
        encoder = factor  # any descriptor
    if not _serves([x, w, encoder, factor, h, y], x.dtype) or (bias is not None and bias.stride(0) != 1):
        return None
    BLOCK_R = block_rank(R, 64)
    tiles = triton.cdiv(M, c.BLOCK_M) * triton.cdiv(N, c.BLOCK_N)
    programs = min(tiles + c.SIDES, device_facts(x.device).processors)
    return Launch.of(hopper_dense_kernel, (programs,))(
        _box(x, [c.BLOCK_M, c.BLOCK_K]),
        _box(w, [c.BLOCK_N, c.BLOCK_K]),
        _box(encoder, [BLOCK_R, 64]),
        _box(factor, [c.BLOCK_N, BLOCK_R]),
        _box(y, [c.BLOCK_M, _BLOCK_Y]),
        _box(h, [c.BLOCK_M, BLOCK_R]),
        bias, u, h, flags, mask, 0 if mask is None else mask.shape[1], seed,
        M, N, K, R, scale, threshold, 65536 / (65536 - threshold),
        GELU=gelu, BIAS=bias is not None, DROP=seed is not None, SIDES=c.SIDES, GROUP_M=c.GROUP_M,
        BLOCK_M=c.BLOCK_M, BLOCK_N=c.BLOCK_N, BLOCK_K=c.BLOCK_K, BLOCK_R=BLOCK_R,
        SIDE_ROWS=c.SIDE_ROWS, SIDE_COLS=64, STAGES=c.STAGES, RING=_ring(BLOCK_R * 64, c),
        num_warps=8, maxnreg=168, enable_fp_fusion=True,
    )  # fmt: skip


def hopper_dense_forward(
    x: Tensor,
    w: Tensor,
    encoder: Tensor | None,
    factor: Tensor,
    bias: Tensor | None,
    scale: float,
    gelu: bool,
    seed: Tensor | None,
    mask: Tensor | None,
    threshold: int,
    h: Tensor | None = None,
    *,
    config: HopperConfig,
) -> tuple[Tensor, Tensor | None, Tensor] | None:
    """Return ``y = x wᵀ + bias + scale · drop₃(g(h factorᵀ))``, u and h; None if the tensors do not fit.

    ``h``: where it exists already; then config.SIDES must be 0, and nothing is made of the encoder.
    ``mask``: bits of drop₁. All of one 16-bit dtype, R ≤ 64.
    """
    M, (N, R) = x.shape[0], factor.shape
    y = x.new_empty(M, N)
    numbers, tensors = (float(scale), gelu, threshold, config), (x, w, encoder, factor, bias, seed, mask)
    if h is None:
        u, h = x.new_empty(M, R), x.new_empty(M, R)
        done = launch(_prepare, tensors, *numbers, fresh=(u, h, _zeros(x, _flags(M, config)), y))
    else:
        u = None
        done = launch(_prepare_given, (*tensors, h), *numbers, fresh=(y,))
    return (y, u, h) if done else None


def _prepare_given(
    x: Tensor,
    w: Tensor,
    encoder: Tensor | None,
    factor: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    mask: Tensor | None,
    h: Tensor,
    y: Tensor,
    *numbers: object,
) -> Launch | None:
    """As ``_prepare``, where nobody makes h or waits for it."""
    return _prepare(x, w, encoder, factor, bias, seed, mask, h, h, h, y, *numbers)

"""h = scale · x aᵀ for few tokens, by a kernel beside which the next one may already run."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from ._launch import Launch, launch

__all__ = ["few_hidden"]


@triton.jit
def _few_hidden_kernel(
    x_ptr, a_ptr, h_ptr, M, K, R, scale, stride_xm, stride_xk, stride_ar, stride_ak,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h[m, r] = scale * sum_k x[m, k] a[r, k]

    Tensors   x (M, K)  a (R, K), free strides; h (M, R) contiguous.
    Program   one r of BLOCK_M tokens; lets the next launch start at once, which waits for h itself.
    Numerics  products and sums in float32, one rounding, at the store.
    Traffic   a once per block of tokens, x once per r (from L2).
    """
    gdc_launch_dependents()
    r, offs_m = tl.program_id(0), tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    a_ptrs, x_ptrs = a_ptr + r.to(tl.int64) * stride_ar, x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm

    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        a = tl.load(a_ptrs + offs_k.to(tl.int64) * stride_ak, mask=mask_k, other=0.0)
        x_at = x_ptrs + offs_k.to(tl.int64)[None, :] * stride_xk
        x = tl.load(x_at, mask=(offs_m < M)[:, None] & mask_k[None, :], other=0.0)
        acc += x.to(tl.float32) * a.to(tl.float32)[None, :]

    h = scale * tl.sum(acc, 1)
    tl.store(h_ptr + offs_m.to(tl.int64) * R + r, h, mask=offs_m < M)


def _prepare(x: Tensor, a: Tensor, h: Tensor, *rest: object) -> Launch:
    (scale,) = rest
    (M, K), R = x.shape, a.shape[0]
    # few tokens a program and all of K in a few steps: it is latency that this costs
    BLOCK_M, BLOCK_K = min(4, triton.next_power_of_2(M)), min(4096, max(256, triton.next_power_of_2(K)))
    return Launch.of(_few_hidden_kernel, (R, triton.cdiv(M, BLOCK_M)))(
        x, a, h, M, K, R, scale, *x.stride(), *a.stride(),
        BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K, num_warps=8, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip


def few_hidden(x: Tensor, a: Tensor, scale: float) -> Tensor:
    """Return ``scale · x aᵀ``, (M, R), in the dtype of ``a``, for few tokens; x of 16 bits, a at most 32."""
    h = torch.empty(x.shape[0], a.shape[0], dtype=a.dtype, device=x.device)
    launch(_prepare, (x, a, h), scale)
    return h

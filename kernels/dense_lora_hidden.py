"""DenseLoRA's thin tensors, of (M, R): the activation after the encoder, and back through it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._config import tl_type
from ._gelu import gelu, gelu_slope, keep_elements
from ._launch import Launch, launch
from ._sum_parts import _sum_one
from ._tiles import add, total


@triton.jit
def _activate_kernel(
    u_ptr, h_ptr, seed_ptr, count, R, threshold, keep_scale,
    GELU: tl.constexpr, USE_DROPOUT: tl.constexpr, FAST: tl.constexpr, ACC_TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """h[m, r] = drop(g(u[m, r]))

    Tensors   u, h (M, R), contiguous, count elements each; seed (3,), of which the second is used.
    Program   BLOCK elements.
    Numerics  in ACC_TYPE, one rounding.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    t = tl.load(u_ptr + offs, mask=mask, other=0.0).to(ACC_TYPE)
    if GELU:
        t = gelu(t, FAST)
    if USE_DROPOUT:
        keep = keep_elements(tl.load(seed_ptr + 1), offs // R, offs % R, threshold)
        t = tl.where(keep, t * keep_scale, 0.0)
    tl.store(h_ptr + offs, t.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _hidden_gradients_kernel(
    parts_ptr, u_ptr, du_ptr, seed_ptr, count, parts, R, blocks, threshold, factor,
    second_parts_ptr, second_out_ptr, second_count, second_parts,
    HAS_FIRST: tl.constexpr, HAS_SECOND: tl.constexpr, GELU: tl.constexpr, USE_DROPOUT: tl.constexpr,
    FAST: tl.constexpr, ACC_TYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """du[m, r] = factor * mask[m, r] * sum_s parts[s, m, r] * g'(u[m, r]), and the second pair's plain sum

    Tensors   u, du (M, R), parts (parts, M, R), all contiguous; the second pair likewise; seed (3,), of which
              the second is used.
    Program   BLOCK elements of the first, or after ``blocks`` programs of the second.
    Numerics  sums in ACC_TYPE in the order of s, their errors kept; one rounding, at the store.
    Traffic   every part read once, usually from L2.
    """
    block = tl.program_id(0)
    if block < blocks:
        if HAS_FIRST:
            offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            mask = offs < count
            acc, rest = tl.zeros((BLOCK,), ACC_TYPE), tl.zeros((BLOCK,), ACC_TYPE)
            ptrs = parts_ptr + offs
            for _ in range(parts):
                acc, rest = add(acc, rest, tl.load(ptrs, mask=mask, other=0.0))
                ptrs += count
            grad = total(acc, rest) * factor
            if USE_DROPOUT:
                keep = keep_elements(tl.load(seed_ptr + 1), offs // R, offs % R, threshold)
                grad = tl.where(keep, grad, 0.0)
            if GELU:
                grad *= gelu_slope(tl.load(u_ptr + offs, mask=mask, other=0.0).to(ACC_TYPE), FAST)
            tl.store(du_ptr + offs, grad.to(du_ptr.dtype.element_ty), mask=mask)
    else:
        if HAS_SECOND:
            _sum_one(
                second_parts_ptr, second_out_ptr, second_parts, second_count, second_count, second_count,
                block - blocks, False, ACC_TYPE, BLOCK,
            )  # fmt: skip


_BLOCK = 256


def _prepare_activate(u: Tensor, seed: Tensor | None, h: Tensor, gelu: bool, threshold: int) -> Launch:
    return Launch.of(_activate_kernel, (triton.cdiv(u.numel(), _BLOCK),))(
        u, h, seed, u.numel(), u.shape[1], threshold, 65536 / (65536 - threshold),
        GELU=gelu, USE_DROPOUT=seed is not None, FAST=u.element_size() == 2,
        ACC_TYPE=tl_type(u.dtype, accumulate=True), BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def activate(u: Tensor, gelu: bool, seed: Tensor | None, threshold: int) -> Tensor:
    """Return ``h = drop₂(g(u))``, (M, R), dtype of ``u``, which is contiguous."""
    h = torch.empty_like(u)
    if u.numel() > 0:
        launch(_prepare_activate, (u, seed, h), gelu, threshold)
    return h


def _prepare_gradients(
    dh_parts: Tensor | None,
    u: Tensor | None,
    seed: Tensor | None,
    du: Tensor | None,
    second_parts: Tensor | None,
    second: Tensor | None,
    gelu: bool,
    threshold: int,
    factor: float,
) -> Launch:
    some = second_parts if dh_parts is None else dh_parts
    count, parts, R = (0, 0, 1) if du is None else (du.numel(), dh_parts.shape[0], du.shape[1])
    count2, parts2 = (0, 0) if second is None else (second.numel(), second_parts.shape[0])
    blocks = triton.cdiv(count, _BLOCK)
    return Launch.of(_hidden_gradients_kernel, (blocks + triton.cdiv(count2, _BLOCK),))(
        dh_parts, u, du, seed, count, parts, R, blocks, threshold, factor,
        second_parts, second, count2, parts2,
        HAS_FIRST=du is not None, HAS_SECOND=second is not None, GELU=gelu, USE_DROPOUT=seed is not None,
        FAST=du is not None and du.element_size() == 2, ACC_TYPE=tl_type(some.dtype), BLOCK=_BLOCK,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def hidden_gradients(
    dh_parts: Tensor | None,
    u: Tensor | None,
    du: Tensor | None,
    second_parts: Tensor | None,
    second: Tensor | None,
    gelu: bool,
    seed: Tensor | None,
    threshold: int,
    factor: float = 1.0,
) -> None:
    """Write ``du = factor · drop₂(Σ dh_parts) ∘ g'(u)``, (M, R), and ``second``, a sum too; or one alone.

    ``dh_parts`` (S, M, R) and ``second_parts`` (S, *second.shape): float32, or float64 in the interpreter.
    """
    if du is None:
        u = seed = None
    factor *= 65536 / (65536 - threshold)
    launch(_prepare_gradients, (dh_parts, u, seed, du, second_parts, second), gelu, threshold, factor)

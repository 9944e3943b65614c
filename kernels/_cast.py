"""Small factors in another type, or beside each other, in one launch."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Launch, launch

_BLOCK = 1024


@triton.jit
def _cast_one(t_ptr, out_ptr, count, factor, block, BLOCK: tl.constexpr):
    offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    t = tl.load(t_ptr + offs, mask=offs < count, other=0.0).to(tl.float32) * factor
    tl.store(out_ptr + offs, t.to(out_ptr.dtype.element_ty), mask=offs < count)


@triton.jit
def _cast_kernel(
    t_ptr, out_ptr, count, factor, blocks, second_ptr, second_out_ptr, second_count,
    HAS_SECOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = factor·t, and second_out = second

    Tensors   t, out (count,)  second, second_out (second_count,), contiguous.
    Program   BLOCK elements of t, or after ``blocks`` programs of second.
    Numerics  factor·t in float32, rounded once.
    Traffic   everything once.
    """
    block = tl.program_id(0)
    if HAS_SECOND:
        if block < blocks:
            _cast_one(t_ptr, out_ptr, count, factor, block, BLOCK)
        else:
            _cast_one(second_ptr, second_out_ptr, second_count, 1.0, block - blocks, BLOCK)
    else:
        _cast_one(t_ptr, out_ptr, count, factor, block, BLOCK)


def _prepare(
    t: Tensor,
    second: Tensor | None,
    out: Tensor,
    second_out: Tensor | None,
    dtype: torch.dtype,
    factor: float,
) -> Launch:
    """Lay out the launch; ``dtype``, of what is made, is there to be a part of its key."""
    blocks = triton.cdiv(t.numel(), _BLOCK)
    count = 0 if second is None else second.numel()
    return Launch.of(_cast_kernel, (blocks + triton.cdiv(count, _BLOCK),))(
        t, out, t.numel(), factor, blocks, second, second_out, count,
        HAS_SECOND=second is not None, BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def cast_pair(t: Tensor, second: Tensor, dtype: torch.dtype, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return ``factor·t`` and ``second`` in ``dtype``, contiguous where they are not what was given."""
    if t.dtype == dtype and factor == 1.0:
        return t, second.to(dtype)
    t, same = t.contiguous(), second.dtype == dtype
    out = t.new_empty(t.shape, dtype=dtype)
    if same:
        if out.numel():
            launch(_prepare, (t, None), dtype, factor, fresh=(out, None))
        return out, second
    second = second.contiguous()
    second_out = t.new_empty(second.shape, dtype=dtype)
    if out.numel() and second_out.numel():
        launch(_prepare, (t, second), dtype, factor, fresh=(out, second_out))
    return out, second_out


@triton.jit
def _beside_kernel(
    t0_ptr, t1_ptr, t2_ptr, out_ptr, count, width, end0, end1, stride0, stride1, stride2, BLOCK: tl.constexpr
):  # fmt: skip
    """out = [t0 | t1 | t2]

    Tensors   t (rows, columns), columns contiguous, rows stride apart; out (rows, width), contiguous, count
              elements; end0 and end1 are where in a row t0 and t1 end.
    Program   BLOCK elements of out.
    Numerics  rounded to the type of out.
    Traffic   everything once.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, col = offs // width, offs % width
    inside = offs < count
    first, second = col < end0, (col >= end0) & (col < end1)
    t = tl.load(t0_ptr + row * stride0 + col, mask=inside & first, other=0.0)
    t1 = tl.load(t1_ptr + row * stride1 + (col - end0), mask=inside & second, other=0.0)
    t2 = tl.load(t2_ptr + row * stride2 + (col - end1), mask=inside & (col >= end1), other=0.0)
    t = tl.where(first, t, tl.where(second, t1, t2))
    tl.store(out_ptr + offs, t.to(out_ptr.dtype.element_ty), mask=inside)


def _prepare_beside(
    t0: Tensor, t1: Tensor, t2: Tensor | None, out: Tensor, flat: bool, width: int, dtype: torch.dtype
) -> Launch:
    """Lay out the launch; ``dtype``, of out, is there to be a part of its key."""
    ends = [t.numel() if flat else t.shape[1] for t in (t0, t1)]
    strides = [0 if flat or t is None else t.stride(0) for t in (t0, t1, t2)]
    return Launch.of(_beside_kernel, (triton.cdiv(out.numel(), _BLOCK),))(
        t0, t1, t1 if t2 is None else t2, out, out.numel(), width, ends[0], sum(ends), *strides,
        BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def beside(tensors: Sequence[Tensor], dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return 2-D tensors of one type one after another, as ``torch.cat``; in ``dtype``."""
    first, dtype = tensors[0], dtype or tensors[0].dtype
    if not 2 <= len(tensors) <= 3 or not all(t.is_contiguous() for t in tensors):
        return torch.cat(tuple(tensors), dim).to(dtype)
    if dim == 0:
        shape = sum(t.shape[0] for t in tensors), first.shape[1]
        width = shape[0] * shape[1]
    else:
        width = sum(t.shape[1] for t in tensors)
        shape = first.shape[0], width
    out = first.new_empty(shape, dtype=dtype)
    if out.numel():
        given = (*tensors, None) if len(tensors) == 2 else tuple(tensors)
        launch(_prepare_beside, given, dim == 0, width, dtype, fresh=(out,))
    return out

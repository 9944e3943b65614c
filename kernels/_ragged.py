"""Ranks that are no multiple of 16, where a pass over x or dy is long: rows of factors 16 ranks at a time.

A row of h, dh or b then starts on 16 bytes; without, every element of it takes a load of its own, and a pass
costs up to five times as much. h and dh are made with zeros beside their ranks, gradients are cut as they are
written, and only b is ever copied.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Launch, launch
from ._tiles import wide

__all__ = [
    "cut_columns",
    "cut_rows",
    "filled_columns",
    "filled_parts",
    "filled_rows",
    "is_ragged",
    "wide_columns",
    "wide_rank",
]

_LONG = 2**22  # elements of x or dy


@triton.jit(do_not_specialize=["R", "stride_row"])
def _fill_kernel(t_ptr, out_ptr, count, R, width, stride_row, BLOCK: tl.constexpr):
    """out[i, r] = t[i, r] where r < R, else 0

    Tensors   t (rows, R), columns contiguous, rows anywhere; out (rows, width), contiguous, count elements.
    Program   BLOCK elements of out.
    Numerics  rounded to the type of out.
    Traffic   t once, out once.
    """
    first = wide(tl.program_id(0)) * BLOCK
    row = first // width
    place = (first - row * width).to(tl.int32) + tl.arange(0, BLOCK)
    column = place % width
    t_ptrs = t_ptr + (row + place // width) * stride_row + column
    inside = first + tl.arange(0, BLOCK) < count
    t = tl.load(t_ptrs, mask=inside & (column < R), other=0.0)
    tl.store(out_ptr + first + tl.arange(0, BLOCK), t.to(out_ptr.dtype.element_ty), mask=inside)


def _prepare(t: Tensor, out: Tensor, width: int, dtype: torch.dtype) -> Launch:
    """Lay out the launch; ``dtype``, of out, is there to be a part of its key."""
    count = t.shape[0] * width
    return Launch.of(_fill_kernel, (triton.cdiv(count, 1024),))(
        t, out, count, t.shape[1], width, t.stride(0), BLOCK=1024, num_warps=4, enable_fp_fusion=True
    )


def _filled(t: Tensor, width: int, dtype: torch.dtype | None = None) -> Tensor:
    t = t if t.stride(1) == 1 else t.contiguous()
    out = t.new_empty((t.shape[0], width), dtype=dtype or t.dtype)
    if out.numel():
        launch(_prepare, (t,), width, out.dtype, fresh=(out,))
    return out


def wide_rank(R: int) -> int:
    """Return ``R`` rounded up to a multiple of 16."""
    return R + -R % 16


def is_ragged(ranks: Sequence[int], elements: int) -> bool:
    """Whether to fill up these ranks, for passes over an operand of this many elements."""
    return elements >= _LONG and any(rank % 16 for rank in ranks)


def filled_rows(a: Tensor) -> Tensor:
    """Return ``a``, (R, K), with zeros below."""
    R, K = a.shape
    return a if R % 16 == 0 else _filled(a.reshape(1, R * K), wide_rank(R) * K).view(wide_rank(R), K)


def filled_columns(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return ``t``, (rows, R), in ``dtype``, with zeros beside; itself if there is nothing to do."""
    same = dtype is None or dtype == t.dtype
    return t if same and t.shape[1] % 16 == 0 else _filled(t, wide_rank(t.shape[1]), dtype)


def wide_columns(t: Tensor) -> Tensor:
    """Return (rows, 16 ranks at a time) that begins with the columns of ``t``, with anything beside them."""
    rows, R = t.shape
    pitch, width = t.stride(0), wide_rank(R)
    if width == R:
        return t
    held = t.untyped_storage().nbytes() // t.element_size() - t.storage_offset()
    if pitch % 16 == 0 and pitch >= width and t.stride(1) == 1 and held >= (rows - 1) * pitch + width:
        return t.as_strided((rows, width), (pitch, 1))
    return _filled(t, width)


def filled_parts(t: Tensor | None, ranks: Sequence[int]) -> Tensor | None:
    """Return ``t``, (rows, sum of ranks) or None, with zeros beside the columns of each rank."""
    if t is None:
        return None
    if len(set(ranks)) == 1:
        return filled_columns(t.reshape(-1, ranks[0])).view(t.shape[0], -1)
    out = t.new_zeros(t.shape[0], sum(map(wide_rank, ranks)))
    at = 0
    for part in t.split(list(ranks), 1):
        out[:, at : at + part.shape[1]] = part
        at += wide_rank(part.shape[1])
    return out


def cut_rows(grads: Sequence[Tensor | None], ranks: Sequence[int]) -> list[Tensor | None]:
    """Return the first rows of gradients of a, as many as the rank of each."""
    return [None if da is None else da[:rank] for da, rank in zip(grads, ranks, strict=True)]


def cut_columns(grads: Sequence[Tensor | None], ranks: Sequence[int]) -> list[Tensor | None]:
    """Return the first columns of gradients of b, as many as the rank of each."""
    return [None if db is None else db[:, :rank].contiguous() for db, rank in zip(grads, ranks, strict=True)]

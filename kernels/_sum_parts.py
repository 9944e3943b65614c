"""The second half of every split sum: partial results added in a fixed order, so that two runs agree."""

import triton
import triton.language as tl
from torch import Tensor

from ._config import tl_type
from ._launch import Launch, launch
from ._tiles import add, total


@triton.jit
def _sum_one(
    parts_ptr, out_ptr, parts, count, width, kept, block,
    CUT: tl.constexpr, ACC_TYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = block.to(tl.int64) * BLOCK
    offs = first + tl.arange(0, BLOCK)
    mask = offs < count
    ptrs = parts_ptr + offs
    acc, rest = tl.zeros((BLOCK,), ACC_TYPE), tl.zeros((BLOCK,), ACC_TYPE)
    for _ in range(parts):
        acc, rest = add(acc, rest, tl.load(ptrs, mask=mask, other=0.0))
        ptrs += count
    if CUT:
        row = first // width
        place = (first - row * width).to(tl.int32) + tl.arange(0, BLOCK)
        column = place % width
        offs = (row + place // width) * kept + column
        mask = mask & (column < kept)
    tl.store(out_ptr + offs, total(acc, rest).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["width", "kept"])
def _sum_parts_kernel(
    parts_ptr, out_ptr, parts, count, blocks,
    second_parts_ptr, second_out_ptr, second_parts, second_count, width, kept,
    HAS_SECOND: tl.constexpr, CUT: tl.constexpr, ACC_TYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[i] = sum_s parts[s, i], for one pair of arrays or for two

    Tensors   parts (parts, count), out (count,), contiguous; likewise the second pair. With CUT the
              last pair's parts have rows of ``width`` elements, of which out keeps the first ``kept``.
    Program   BLOCK elements of the first pair, or after ``blocks`` programs of the second.
    Numerics  sums in ACC_TYPE in the order of s, their errors kept; one rounding, at the store.
    Traffic   every part read once, usually from L2, out written once.
    """
    block = tl.program_id(0)
    if HAS_SECOND:
        if block < blocks:
            _sum_one(parts_ptr, out_ptr, parts, count, width, kept, block, False, ACC_TYPE, BLOCK)
        else:
            _sum_one(
                second_parts_ptr, second_out_ptr, second_parts, second_count, width, kept, block - blocks,
                CUT, ACC_TYPE, BLOCK,
            )  # fmt: skip
    else:
        _sum_one(parts_ptr, out_ptr, parts, count, width, kept, block, CUT, ACC_TYPE, BLOCK)


def _prepare(parts: Tensor, out: Tensor, parts2: Tensor | None, out2: Tensor | None) -> Launch:
    BLOCK = 512
    count = parts[0].numel()
    blocks = triton.cdiv(count, BLOCK)
    has_second = parts2 is not None
    if not has_second:
        parts2, out2 = parts, out
    count2 = parts2[0].numel()
    blocks2 = triton.cdiv(count2, BLOCK) if has_second else 0
    width, kept = parts2.shape[-1], out2.shape[-1]
    return Launch.of(_sum_parts_kernel, (blocks + blocks2,))(
        parts, out, parts.shape[0], count, blocks,
        parts2, out2, parts2.shape[0], count2, width, kept,
        HAS_SECOND=has_second, CUT=width != kept, ACC_TYPE=tl_type(parts.dtype), BLOCK=BLOCK,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def sum_parts(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor] | None = None) -> None:
    """Add up ``(parts, out)``, parts (S, *out.shape), and a second such pair in the same launch.

    The parts of the last pair may have longer rows than its out, which then keeps the first columns of them.
    """
    launch(_prepare, (*first, *(second or (None, None))))

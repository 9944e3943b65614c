"""Launchers of the Hopper kernels: whole passes of one to three projections in one launch.

Each returns None, and has done nothing, where the copy engine does not take the tensors as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import triton
from torch import Tensor

from ._config import block_rank, device_facts
from ._gluon import TensorDescriptor, gl
from ._hopper_roles import hopper_kernel
from ._launch import Launch, Part, launch

__all__ = [
    "HopperConfig",
    "hopper_backward_input",
    "hopper_forward",
    "hopper_input",
    "hopper_matmul",
    "hopper_outputs",
]

MOST_PROJECTIONS = 3
_GL_TYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


@dataclass(frozen=True, kw_only=True)
class HopperConfig:
    """Sizes of one launch. SIDES programs make the hidden factor; 0 says that it exists already."""

    SIDES: int = 4
    BLOCK_M: int = 128
    BLOCK_N: int = 256
    BLOCK_K: int = 64
    GROUP_M: int = 8
    SIDE_ROWS: int = 256
    STAGES: int = 3

    def __post_init__(self) -> None:
        # a config is part of the key of every launch
        object.__setattr__(self, "_hash", hash(tuple(vars(self).values())))

    def __hash__(self) -> int:
        return self._hash


def _box(tensor: Tensor, shape: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(shape, _GL_TYPES[tensor.dtype])
    return TensorDescriptor.from_tensor(tensor, shape, layout)


def _boxes(tensors: Sequence[Tensor], shape: list[int]) -> list[TensorDescriptor]:
    """Return three descriptors; a launch with fewer projections never reads the copies."""
    boxes = [_box(tensor, shape) for tensor in tensors]
    return boxes + [boxes[0]] * (MOST_PROJECTIONS - len(boxes))


def _padded(values: Sequence, fill: object = None) -> list:
    return [*values, *[fill] * (MOST_PROJECTIONS - len(values))]


def _serves(tensors: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether the copy engine takes these as they are: one 16-bit type, contiguous rows on 16 bytes."""
    return dtype in _GL_TYPES and all(
        t.dtype == dtype
        and t.stride(1) == 1
        and t.stride(0) % 8 == 0
        and t.stride(0) >= t.shape[1]
        and t.data_ptr() % 16 == 0
        for t in tensors
    )


def _factor_boxes(
    forward: bool, BLOCK_R: int, RANK: int, SIDE_COLS: int, c: HopperConfig
) -> tuple[list[int], list[int], list[int]]:
    """Return the boxes of the base weights, of the side's small factors, and of those after the base."""
    if forward:
        return [c.BLOCK_N, c.BLOCK_K], [BLOCK_R, SIDE_COLS], [c.BLOCK_N, RANK]
    return [c.BLOCK_K, c.BLOCK_N], [SIDE_COLS, BLOCK_R], [RANK, c.BLOCK_N]


def _programs(M: int, outs: Sequence[Tensor], c: HopperConfig) -> int:
    tiles = triton.cdiv(M, c.BLOCK_M) * sum(triton.cdiv(out.shape[1], c.BLOCK_N) for out in outs)
    return min(tiles + c.SIDES, device_facts(outs[0].device).processors)


def _ring(small: int, c: HopperConfig) -> int:
    """Return the stages of a forward pass's side programs: the output's buffer too, if small factors fit."""
    stages = c.STAGES + c.BLOCK_M // c.BLOCK_K
    return stages if stages * small <= c.STAGES * c.BLOCK_M * c.BLOCK_K else c.STAGES


def _prepare(*everything: object) -> Launch | None:
    """Lay out a launch; ``everything``: what ``_launch_pass`` gives to ``launch``, in that order."""
    *tensors, lengths, forward, scales, entries, c = everything
    tensors = iter(tensors)
    bigs, ws, smalls, ranks, biases = ([next(tensors) for _ in range(n)] for n in lengths)
    mask, kept, places, starts, hidden, zeros, parts, *outs = tensors
    operands = [hidden, *bigs, *ws, *smalls, *ranks, *outs, *([] if kept is None else [kept])]
    if not _serves(operands, hidden.dtype) or any(bias.stride(0) != 1 for bias in biases):
        return None
    flags = hidden if zeros is None else zeros
    M, K, P = bigs[0].shape[0], ws[0].shape[1], len(ws)
    R = hidden.shape[1] // P
    BLOCK_R = block_rank(R, 128)
    RANK = min(BLOCK_R, c.BLOCK_K)
    SIDE_COLS = 64 if kept is None else c.SIDE_ROWS // 2
    SLOTS = triton.next_power_of_2(P)
    boxes = _factor_boxes(forward, BLOCK_R, RANK, SIDE_COLS, c)
    return Launch.of(hopper_kernel, (_programs(M, outs, c),))(
        *_boxes(bigs, [c.BLOCK_M, c.BLOCK_K]),
        *_boxes(ws, boxes[0]),
        # where nothing is made of the small factors, the kernel takes any descriptor for them
        *_boxes(smalls or ranks, boxes[1]),
        *_boxes(ranks, boxes[2]),
        *_boxes(outs, [c.BLOCK_M, c.BLOCK_N]),
        _box(hidden, [c.BLOCK_M, RANK]),
        _box(hidden if kept is None else kept, [c.SIDE_ROWS // 2, RANK]),
        *_padded(biases),
        hidden, flags, mask, flags if parts is None else parts,
        places, starts, entries, 0 if mask is None else mask.shape[1],
        M, *_padded([w.shape[0] for w in ws], 0), K, R, *_padded(scales, 0.0),
        FORWARD=forward, BIAS=len(biases) > 0, DROP=mask is not None,
        DB=kept is not None, ENTRIES=places is not None,
        SIDES=c.SIDES, P=P, SLOTS=SLOTS, GROUP_M=c.GROUP_M,
        BLOCK_M=c.BLOCK_M, BLOCK_N=c.BLOCK_N, BLOCK_K=c.BLOCK_K, BLOCK_R=BLOCK_R,
        SIDE_ROWS=c.SIDE_ROWS, SIDE_COLS=SIDE_COLS, STAGES=c.STAGES,
        RING=_ring(SLOTS * BLOCK_R * SIDE_COLS, c) if forward else c.STAGES,
        num_warps=8, maxnreg=168, enable_fp_fusion=True,
    )  # fmt: skip


def _launch_pass(
    forward: bool,
    lists: tuple[Sequence[Tensor], ...],
    mask: Tensor | None,
    kept: Tensor | None,
    given: tuple[Tensor, ...],
    fresh: tuple[Tensor | Part | None, ...],
    scales: tuple[float, ...],
    config: HopperConfig,
    entries: tuple[Tensor | None, Tensor | None, int] = (None, None, 0),
) -> bool:
    """Launch and return True, or False if the kernels do not take the tensors as they are.

    ``lists``: what is multiplied by the base weights and by the small factors, base weights, small factors,
    those that the hidden factor is multiplied by, biases. ``given`` and ``fresh``: together the hidden one,
    zeros, parts of db, outputs; fresh those that are allocated here. ``entries``: as for
    :func:`hopper_backward_input`.
    """
    tensors, lengths = _arranged(lists, mask, kept, given, entries)
    return launch(_prepare, tensors, lengths, forward, scales, entries[2], config, fresh=fresh)


def _arranged(
    lists: tuple[Sequence, ...],
    mask: object,
    kept: object,
    given: tuple = (),
    entries: tuple = (None, None, 0),
) -> tuple[tuple, tuple[int, ...]]:
    """Return what a launch is given before what is fresh, in its order, and the lengths of the lists."""
    tensors = (*[t for own in lists for t in own], mask, kept, *entries[:2], *given)
    return tensors, tuple([len(own) for own in lists])


def _zeros(like: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float32, device=like.device)


def _flags(M: int, config: HopperConfig) -> int:
    return -(-M // config.SIDE_ROWS)


def hopper_forward(
    x: Tensor,
    ws: Sequence[Tensor],
    a_list: Sequence[Tensor],
    b_list: Sequence[Tensor],
    biases: Sequence[Tensor],
    scales: tuple[float, ...],
    mask: Tensor | None = None,
    *,
    config: HopperConfig,
) -> tuple[list[Tensor], Tensor] | None:
    """Return all ``y = x wᵀ + h bᵀ + bias``, and ``h = scale·(mask ∘ x) aᵀ`` side by side, (M, P·R).

    ``biases``: one a projection, or none. ``mask``: bits of ``dropout_mask``; its factor belongs into scales.
    """
    M = x.shape[0]
    ys = [x.new_empty(M, w.shape[0]) for w in ws]
    hidden = x.new_empty(M, len(ws) * b_list[0].shape[1])
    zeros = _zeros(x, _flags(M, config))
    lists, fresh = ((x,), ws, a_list, b_list, biases), (hidden, zeros, None, *ys)
    done = _launch_pass(True, lists, mask, None, (), fresh, scales, config)
    return (ys, hidden) if done else None


def hopper_outputs(
    x: Tensor,
    ws: Sequence[Tensor],
    h: Tensor,
    b_list: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    config: HopperConfig,
) -> list[Tensor] | None:
    """Return all ``y = x wᵀ + h bᵀ + bias``; h (M, P·R) is given, and ``config`` without side programs."""
    ys = [x.new_empty(x.shape[0], w.shape[0]) for w in ws]
    lists = ((x,), ws, (), b_list, biases)
    return ys if _launch_pass(True, lists, None, None, (h,), (None, None, *ys), (), config) else None


def hopper_input(
    dys: Sequence[Tensor],
    ws: Sequence[Tensor],
    dh: Tensor,
    a_list: Sequence[Tensor],
    mask: Tensor | None,
    *,
    config: HopperConfig,
) -> Tensor | None:
    """Return ``dx = Σ (dy w + mask ∘ (dh a))``; dh (M, P·R) is given, as for :func:`hopper_outputs`."""
    dx = dys[0].new_empty(dys[0].shape[0], ws[0].shape[1])
    lists = (dys, ws, (), a_list, ())
    return dx if _launch_pass(False, lists, mask, None, (dh,), (None, None, dx), (), config) else None


def hopper_backward_input(
    dys: Sequence[Tensor],
    ws: Sequence[Tensor],
    a_list: Sequence[Tensor],
    b_list: Sequence[Tensor],
    h: Tensor | None,
    scales: tuple[float, ...],
    mask: Tensor | None,
    counters: int = 0,
    entries: tuple[Tensor, Tensor, int] | None = None,
    *,
    width: int | None = None,
    config: HopperConfig,
) -> tuple[Tensor, Tensor, Part | None, Part] | None:
    """Return ``dx = Σ (dy w + mask ∘ (dh a))``, (M, K), and ``dh = scale·dy b`` side by side, (M, P·R).

    With ``h`` of the forward pass, (M, P·R), R ≤ 16, a third result has the parts of ``db = dyᵀ h``, float32
    (SIDES, sum of N, R), of which db is the sum; with ``entries``, P = 1 and R ≤ 32, of those entries alone,
    (SIDES, nnz): words (N, 1) and offsets, both int32, and nnz of the mask that has them. ``mask``: bits of
    ``dropout_mask``; its factor belongs into scales. A fourth result is at least that many ``counters``,
    int32 zeros. With ``width``, P = 1, dh and the parts have so many ranks, zeros beside those of b.
    """
    M, P, R = dys[0].shape[0], len(ws), width or b_list[0].shape[1]
    dx = dys[0].new_empty(M, ws[0].shape[1])
    hidden = dx.new_empty(M, P * R)
    # flags and counters, to a multiple of 16 bytes; then the parts of db
    flags, parts = _flags(M, config), None
    first = (flags + counters + 3) // 4 * 4
    if h is None:
        zeros = _zeros(dx, first)
    else:
        wide = ws[0].shape[0] if P == 1 else sum(w.shape[0] for w in ws)
        shape = (config.SIDES, wide, R) if entries is None else (config.SIDES, entries[2])
        zeros = _zeros(dx, first + prod(shape))
        parts = Part(zeros, first, shape, torch.float32)
    lists, fresh = (dys, ws, b_list, a_list, ()), (hidden, zeros, parts, dx)
    done = _launch_pass(False, lists, mask, h, (), fresh, scales, config, entries or (None, None, 0))
    return (dx, hidden, parts, Part(zeros, flags, (counters,), torch.int32)) if done else None


def hopper_matmul(
    forward: bool,
    left: Tensor,
    w: Tensor,
    h: Tensor,
    b: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    config: HopperConfig,
) -> Tensor | None:
    """Return ``left wᵀ + h bᵀ + bias``, b (N, R); not forward, ``left w + mask ∘ (h b)``, b (R, K)."""
    out = left.new_empty(left.shape[0], w.shape[0 if forward else 1])
    lists = ((left,), (w,), (), (b,), () if bias is None else (bias,))
    done = _launch_pass(forward, lists, mask, None, (h,), (None, None, out), (), config)
    return out if done else None

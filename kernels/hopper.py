"""Launchers of the Hopper kernels: whole passes of one to three projections in one launch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ._config import block_rank, device_facts
from ._gluon import TensorDescriptor, gl
from ._hopper_roles import hopper_kernel
from ._launch import Launch, launch

__all__ = ["HopperConfig", "hopper_backward_input", "hopper_forward", "hopper_matmul"]

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


def _prepare(*tensors_and_numbers: object) -> Launch:
    """Lay out a launch; arguments as in ``_launch_pass``."""
    *tensors, forward, scales, c = tensors_and_numbers
    hidden, zeros, parts, mask, kept, *lists = tensors
    lists = [[t for t in lists[i : i + 3] if t is not None] for i in range(0, len(lists), 3)]
    bigs, ws, smalls, ranks, outs, biases = lists
    smalls = smalls or ranks
    flags = hidden if zeros is None else zeros
    M, K, P = bigs[0].shape[0], ws[0].shape[1], len(ws)
    R = hidden.shape[1] // P
    BLOCK_R = block_rank(R, 128)
    RANK = min(BLOCK_R, c.BLOCK_K)
    SIDE_COLS = 64 if kept is None else c.SIDE_ROWS // 2
    if forward:
        shapes = [c.BLOCK_N, c.BLOCK_K], [BLOCK_R, SIDE_COLS], [c.BLOCK_N, RANK]
    else:
        shapes = [c.BLOCK_K, c.BLOCK_N], [SIDE_COLS, BLOCK_R], [RANK, c.BLOCK_N]
    columns = sum(triton.cdiv(out.shape[1], c.BLOCK_N) for out in outs)
    tiles = triton.cdiv(M, c.BLOCK_M) * columns
    gemms = min(tiles, device_facts(hidden.device).processors - c.SIDES)
    return Launch.of(hopper_kernel, (gemms + c.SIDES,))(
        *_boxes(bigs, [c.BLOCK_M, c.BLOCK_K]),
        *_boxes(ws, shapes[0]),
        *_boxes(smalls, shapes[1]),
        *_boxes(ranks, shapes[2]),
        *_boxes(outs, [c.BLOCK_M, c.BLOCK_N]),
        _box(hidden, [c.BLOCK_M, RANK]),
        _box(hidden if kept is None else kept, [c.SIDE_ROWS // 2, RANK]),
        *_padded(biases),
        hidden, flags, mask, flags if parts is None else parts, 0 if mask is None else mask.shape[1],
        M, *_padded([w.shape[0] for w in ws], 0), K, R, *_padded(scales, 0.0),
        FORWARD=forward, BIAS=len(biases) > 0, DROP=mask is not None,
        DB=kept is not None,
        SIDES=c.SIDES, P=P, SLOTS=triton.next_power_of_2(P), GROUP_M=c.GROUP_M,
        BLOCK_M=c.BLOCK_M, BLOCK_N=c.BLOCK_N, BLOCK_K=c.BLOCK_K, BLOCK_R=BLOCK_R,
        SIDE_ROWS=c.SIDE_ROWS, SIDE_COLS=SIDE_COLS, STAGES=c.STAGES, num_warps=8, maxnreg=168,
    )  # fmt: skip


def _launch_pass(
    forward: bool,
    bigs: Sequence[Tensor],
    ws: Sequence[Tensor],
    smalls: Sequence[Tensor],
    ranks: Sequence[Tensor],
    outs: Sequence[Tensor],
    biases: Sequence[Tensor],
    hidden: Tensor,
    kept: Tensor | None,
    scales: Sequence[float],
    mask: Tensor | None,
    config: HopperConfig,
    counters: int = 0,
) -> tuple[Tensor | None, Tensor | None]:
    """Launch; return the parts of db, (SIDES, sum N, R), if ``kept`` (h of the forward pass) is given, and
    so many int32 zeros beside them for the launch that reads them.
    """
    zeros = parts = spare = None
    if config.SIDES:
        # flags and counters, to a multiple of 16 bytes; then the parts of db
        flags = triton.cdiv(hidden.shape[0], config.SIDE_ROWS)
        first = triton.cdiv(flags + counters, 4) * 4
        wide = sum(w.shape[0] for w in ws), hidden.shape[1] // len(ws)
        size = config.SIDES * wide[0] * wide[1] if kept is not None else 0
        zeros = torch.zeros(first + size, dtype=torch.float32, device=hidden.device)
        spare = zeros[flags : flags + counters].view(torch.int32)
        if kept is not None:
            parts = zeros[first:].view(config.SIDES, *wide)
    # where nothing is made of the small factors, the kernel takes any descriptor for them
    lists = (bigs, ws, smalls if config.SIDES else [], ranks, outs, biases)
    tensors = (hidden, zeros, parts, mask, kept, *(t for group in lists for t in _padded(group)))
    launch(_prepare, tensors, forward, tuple(map(float, scales)), config)
    return parts, spare


def hopper_forward(
    x: Tensor,
    ws: Sequence[Tensor],
    a_list: Sequence[Tensor],
    b_list: Sequence[Tensor],
    biases: Sequence[Tensor],
    scales: Sequence[float],
    mask: Tensor | None,
    *,
    config: HopperConfig,
) -> tuple[list[Tensor], Tensor]:
    """Return all ``y = x wᵀ + h bᵀ + bias``, and ``h = scale·(mask ∘ x) aᵀ`` side by side, (M, P·R).

    ``biases``: one a projection, or none. ``mask``: bits of ``dropout_mask``; its factor belongs into scales.
    """
    ys = [x.new_empty(x.shape[0], w.shape[0]) for w in ws]
    hidden = x.new_empty(x.shape[0], len(ws) * a_list[0].shape[0])
    _launch_pass(True, [x], ws, a_list, b_list, ys, biases, hidden, None, scales, mask, config)
    return ys, hidden


def hopper_backward_input(
    dys: Sequence[Tensor],
    ws: Sequence[Tensor],
    a_list: Sequence[Tensor],
    b_list: Sequence[Tensor],
    h: Tensor | None,
    scales: Sequence[float],
    mask: Tensor | None,
    counters: int = 0,
    *,
    config: HopperConfig,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return ``dx = Σ (dy w + mask ∘ (dh a))``, (M, K), and ``dh = scale·dy b`` side by side, (M, P·R).

    With ``h`` of the forward pass, (M, P·R), R ≤ 16, a third result has the parts of ``db = dyᵀ h``, float32
    (SIDES, sum of N, R), of which db is the sum. ``mask`` as in :func:`hopper_forward`. A fourth
    result is that many ``counters``, int32 zeros.
    """
    dx = dys[0].new_empty(dys[0].shape[0], ws[0].shape[1])
    hidden = dx.new_empty(dx.shape[0], len(ws) * a_list[0].shape[0])
    rest = _launch_pass(
        False, dys, ws, b_list, a_list, [dx], [], hidden, h, scales, mask, config, counters=counters
    )
    return dx, hidden, *rest


def hopper_matmul(
    forward: bool,
    left: Tensor,
    w: Tensor,
    h: Tensor,
    b: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    config: HopperConfig,
) -> Tensor:
    """Return ``left wᵀ + h bᵀ + bias``, b (N, R); not forward, ``left w + mask ∘ (h b)``, b (R, K)."""
    out = left.new_empty(left.shape[0], w.shape[0 if forward else 1])
    biases = [] if bias is None else [bias]
    _launch_pass(forward, [left], [w], [b], [b], [out], biases, h, None, (), mask, config)
    return out

"""The launcher of ``_stream_kernel``: few tokens through a compressed 16-bit weight on NVIDIA GPUs."""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from ._config import DeviceFacts, device_facts, tl_type
from ._gluon import gl
from ._launch import Launch, launch
from ._packed import packed_args
from ._stream_kernel import stream_kernel

__all__ = ["StreamConfig", "pick_stream", "pruned_stream"]


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """Shape of one launch: ROWS features a program, whose warps share a sum over K; registers of a thread."""

    ROWS: int = 16
    num_warps: int = 4
    maxnreg: int | None = None


@lru_cache(maxsize=4096)
def pick_stream(M: int, N: int, K: int, two_four: bool, facts: DeviceFacts) -> StreamConfig:
    """Return the tiles for M tokens: some 24 warps a multiprocessor, as many as fit at once."""
    wanted = 24 * facts.processors / triton.cdiv(N, 16)
    most = min(16 if M <= 16 else 8, triton.cdiv(K, 128))
    warps = 2
    while warps < min(wanted, most):
        warps *= 2
    if facts.arch != "sm90":
        return StreamConfig(num_warps=warps)
    if 8 < M <= 16 and N >= 8192:
        # every x that is loaded serves two blocks of features
        return StreamConfig(ROWS=32, num_warps=warps)
    # so many registers do not spill, and all warps are there at once
    registers = 72 if M <= 8 else 80 if M <= 16 else None
    return StreamConfig(num_warps=warps, maxnreg=registers if two_four else None)


@lru_cache(maxsize=64)
def _lanes(rows: int, warps: int) -> gl.DistributedLinearLayout:
    """Return the layout of (warps, rows, 4) in which four lanes hold a row of a block of columns."""
    doubled = lambda start, end: [1 << i for i in range(start.bit_length() - 1, end.bit_length() - 1)]  # noqa: E731
    return gl.DistributedLinearLayout(
        reg_bases=[[0, i, 0] for i in doubled(8, rows)],
        lane_bases=[[0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        warp_bases=[[i, 0, 0] for i in doubled(1, warps)],
        block_bases=[],
        shape=[warps, rows, 4],
    )


def _prepare(
    x: Tensor, h: Tensor | None, b: Tensor | None, bias: Tensor | None, y: Tensor, *rest: object
) -> Launch:
    *packed, config = rest
    (M, K), N = x.shape, y.shape[1]
    R = 0 if h is None else h.shape[1]
    pointers, across, constants = packed_args(tuple(packed), y.dtype, device_facts(y.device))
    h_strides, b_strides = (0, 0) if h is None else h.stride(), (0, 0) if b is None else b.stride()
    limit = {} if config.maxnreg is None else {"maxnreg": config.maxnreg}
    return Launch.of(stream_kernel, (triton.cdiv(N, config.ROWS),))(
        x, *pointers, h, b, bias, y, M, N, K, R, across,
        *x.stride(), *h_strides, *b_strides, 0 if bias is None else bias.stride(0),
        TWO_FOUR=constants["TWO_FOUR"], DTYPE=tl_type(y.dtype), HAS_UPDATE=R > 0, HAS_BIAS=bias is not None,
        BLOCK_M=max(8, triton.next_power_of_2(M)), ROWS=config.ROWS,
        LANES=_lanes(config.ROWS, config.num_warps), num_warps=config.num_warps,
        enable_fp_fusion=True, **limit,
    )  # fmt: skip


def pruned_stream(
    x: Tensor,
    packed: list[Tensor],
    N: int,
    h: Tensor | None,
    b: Tensor | None,
    bias: Tensor | None,
    *,
    config: StreamConfig | None = None,
) -> Tensor:
    """Return ``y = x wᵀ + h bᵀ + bias``, (M, N), for few tokens; N and K positive."""
    M, K = x.shape
    config = config or pick_stream(M, N, K, len(packed) == 2, device_facts(x.device))
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    launch(_prepare, (x, h, b, bias, y, *packed), config)
    return y

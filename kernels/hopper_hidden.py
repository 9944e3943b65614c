"""Launcher of the Hopper kernel that makes the hidden factor and the mask of a layer with dropout."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from ._config import block_rank
from ._gluon import TensorDescriptor
from ._hopper_hidden import hopper_hidden_kernel
from ._launch import Launch, launch
from ._ragged import wide_rank
from .hopper import MOST_PROJECTIONS, _box, _padded, _serves

__all__ = ["HiddenConfig", "hidden_config", "hopper_hidden"]


@dataclass(frozen=True, kw_only=True)
class HiddenConfig:
    """Sizes of one launch: rows of a program, 64-column panels of a step, steps in flight, shares of K."""

    ROWS: int = 64
    PANELS: int = 2
    STAGES: int = 2
    SHARES: int = 2

    def __post_init__(self) -> None:
        # a config is part of the key of every launch
        object.__setattr__(self, "_hash", hash(tuple(vars(self).values())))

    def __hash__(self) -> int:
        return self._hash


@lru_cache(maxsize=4096)
def hidden_config(M: int) -> HiddenConfig:
    """Return the sizes for M rows: about two programs a multiprocessor."""
    return HiddenConfig(SHARES=max(1, min(8, round(256 / triton.cdiv(max(M, 1), 64)))))


def _slots(a_list: Sequence[Tensor]) -> int:
    return triton.next_power_of_2(len(a_list))


def _shares(K: int, c: HiddenConfig) -> tuple[int, int]:
    """Return the columns of one share, and the number of shares."""
    step = 64 * c.PANELS
    each = triton.cdiv(triton.cdiv(K, c.SHARES), step) * step
    return each, triton.cdiv(K, each)


def _prepare(*everything: object) -> Launch | None:
    x, seed, *a_list, hidden, words, shares, counters, threshold, scales, c = everything
    if not _serves([x, *a_list], x.dtype):
        return None
    (M, K), P = x.shape, len(a_list)
    R, BLOCK_R = hidden.shape[1] // P, block_rank(a_list[0].shape[0], 128)
    each, count = _shares(K, c)

    def box(tensor: Tensor, rows: int) -> TensorDescriptor:
        return _box(tensor, [rows, 64])

    factors = [box(a, BLOCK_R) for a in a_list]
    return Launch.of(hopper_hidden_kernel, (triton.cdiv(M, c.ROWS), count))(
        box(x, c.ROWS), *factors, *[factors[0]] * (MOST_PROJECTIONS - P),
        hidden, words, seed, hidden if shares is None else shares, hidden if counters is None else counters,
        threshold, words.shape[1], M, K, R, each, *_padded(scales, 0.0),
        P=P, SLOTS=_slots(a_list), SHARES=count, ROWS=c.ROWS, PANELS=c.PANELS, BLOCK_R=BLOCK_R,
        STAGES=c.STAGES, num_warps=c.ROWS // 16, enable_fp_fusion=True,
    )  # fmt: skip


def hopper_hidden(
    x: Tensor,
    a_list: Sequence[Tensor],
    seed: Tensor,
    threshold: int,
    scales: tuple[float, ...],
    *,
    config: HiddenConfig,
) -> tuple[Tensor, Tensor] | None:
    """Return all ``h = scale·(mask ∘ x) aᵀ`` side by side, and the bits of ``dropout_mask``.

    h is (M, P·R), with an R that is no multiple of 8 rounded up to one of 16, zeros in what was added; then P
    is 1. None, and nothing done, where the copy engine does not take x and ``a_list`` as they are. The mask's
    factor belongs into ``scales``.
    """
    (M, K), R, P = x.shape, a_list[0].shape[0], len(a_list)
    hidden = x.new_empty(M, P * (R if R % 8 == 0 else wide_rank(R)))
    words = x.new_empty((M, -(-K // 32)), dtype=torch.int32)
    shares = counters = None
    _, count = _shares(K, config)
    if count > 1:
        wide = _slots(a_list) * block_rank(R, 128)
        shares = x.new_empty((count, M, wide), dtype=torch.float32)
        counters = torch.zeros(-(-M // config.ROWS), dtype=torch.int32, device=x.device)
    fresh = (hidden, words, shares, counters)
    done = launch(_prepare, (x, seed, *a_list), threshold, scales, config, fresh=fresh)
    return (hidden, words) if done else None

"""LoRA layers on Hopper: when the kernels of ``hopper`` serve them, with which sizes, and in which order."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch.nn.functional as F
import triton
from torch import Tensor

from ._config import DeviceFacts, block_rank, device_facts, measured_rows
from ._launch import Part
from ._sum_parts import sum_parts
from .dropout_mask import dropout_mask
from .hopper import (
    MOST_PROJECTIONS,
    HopperConfig,
    hopper_backward_input,
    hopper_forward,
    hopper_matmul,
    hopper_outputs,
)
from .hopper_hidden import hidden_config, hopper_hidden
from .lora_backward_factors import factor_counters, factor_gradients
from .lora_forward import drop_threshold

__all__ = ["backward_config", "forward_config", "lora_backward", "lora_forward", "update_matmul"]

# microseconds, measured on one H100: a step of a tile's sum, what a tile costs beside its steps, and 32 KiB
# through a side program: plain, of 128 ranks, with a mask, and with a mask and more than 32 ranks
_STEP, _TILE = 0.69, 1.5
_SIDE, _SIDE_WIDE, _SIDE_MASKED, _SIDE_MASKED_WIDE = 0.62, 0.86, 0.78, 0.95
# a skinny pass of its own: what it costs beside its bytes, with a mask too, and bytes a microsecond
_PASS, _PASS_MASKED, _BYTES = 5.0, 15.0, 2.6e6
# the part of the multiprocessors that must have a tile, over all waves
_FILLED = 0.7
_SIDES = 4
# with dropout, from so many rows or ranks on, h and the mask have a launch of their own
_MANY_ROWS, _MANY_RANKS = 4096, 32


def table_key(op: str, M: int, N: int, K: int) -> str:
    """Return the key of a launch in the tables, which hold M by powers of two."""
    return f"{op} M={1 << max(M - 1, 0).bit_length()} N={N} K={K}"


def _as_measured(
    picked: HopperConfig | None, op: str, M: int, N: int, K: int, like_measured: bool, facts: DeviceFacts
) -> HopperConfig | None:
    """Return ``picked`` as the tables have it; where the launch differs from theirs, in tile order alone."""
    row = measured_rows(facts.arch).get(table_key(op, M, N, K))
    if row is None or picked is None:
        return picked
    measured = HopperConfig(**row)
    return measured if like_measured else replace(picked, GROUP_M=measured.GROUP_M)


def _pick(
    tiles: int, steps: int, M: int, side_steps: int, side_step: float, dropout: bool, facts: DeviceFacts
) -> HopperConfig | None:
    """Return the sizes of a launch: with side programs if they are done in time, else without.

    Beside ``_SIDES`` of them a GEMM has as many waves of tiles as without, or one more in many.
    """
    if not tiles or tiles < _FILLED * triton.cdiv(tiles, facts.processors) * facts.processors:
        return None
    tile = steps * _STEP + _TILE
    apart = _PASS_MASKED if dropout else _PASS
    without = triton.cdiv(tiles, facts.processors) * tile + apart + M * side_steps * 128 / _BYTES
    block, blocks = side_steps * side_step, triton.cdiv(M, 256)
    # the first wave of tiles needs the first eight rows of tiles, four blocks
    late = max(0.0, block - tile)
    beside = max(
        triton.cdiv(tiles, facts.processors - _SIDES) * tile + late, triton.cdiv(blocks, _SIDES) * block
    )
    return HopperConfig(SIDES=_SIDES if beside <= 1.02 * without else 0)


def _side_step(R: int, P: int, dropout: bool) -> float:
    wide = block_rank(R, 128) * triton.next_power_of_2(P)
    if dropout:
        return _SIDE_MASKED if wide <= 32 else _SIDE_MASKED_WIDE
    return _SIDE if wide <= 64 else _SIDE_WIDE


@lru_cache(maxsize=4096)
def forward_config(
    M: int, Ns: tuple[int, ...], K: int, R: int, dropout: bool, facts: DeviceFacts
) -> HopperConfig | None:
    """Return the sizes of a forward launch, or None where other kernels should serve it."""
    wide = triton.next_power_of_2(len(Ns)) * block_rank(R, 128)
    if facts.arch != "sm90" or R > 128 or wide > 128:
        return None
    tiles = triton.cdiv(M, 128) * sum(triton.cdiv(N, 256) for N in Ns)
    steps = triton.cdiv(K, 64) + triton.cdiv(R, 64)
    picked = _pick(tiles, steps, M, triton.cdiv(K, 64), _side_step(R, len(Ns), dropout), dropout, facts)
    if dropout and picked is not None and (M >= _MANY_ROWS or wide > _MANY_RANKS):
        picked = replace(picked, SIDES=0)
    like_measured = len(Ns) == 1 and R <= 16 and not dropout
    return _as_measured(picked, "hopper_forward", M, sum(Ns), K, like_measured, facts)


@lru_cache(maxsize=4096)
def backward_config(M: int, Ns: tuple[int, ...], K: int, R: int, facts: DeviceFacts) -> HopperConfig | None:
    """Return the sizes of a launch for dx, or None where other kernels should serve it."""
    if facts.arch != "sm90" or R > 128:
        return None
    tiles = triton.cdiv(M, 128) * triton.cdiv(K, 256)
    depth = sum(triton.cdiv(N, 64) for N in Ns)
    steps = depth + len(Ns) * triton.cdiv(R, 64)
    picked = _pick(tiles, steps, M, depth, _side_step(R, 1, False), False, facts)
    like_measured = len(Ns) == 1 and R <= 16
    return _as_measured(picked, "hopper_backward_input", M, sum(Ns), K, like_measured, facts)


def _one_rank(a_list: Sequence[Tensor]) -> bool:
    """Whether ranks are one number, and a box of the hidden factor holds those of one projection alone.

    Or infinities in one projection's h would reach the others.
    """
    R = a_list[0].shape[0]
    return len(a_list) == 1 or (
        len(a_list) <= MOST_PROJECTIONS and block_rank(R, 128) == R and all(a.shape[0] == R for a in a_list)
    )


def _padded(t: Tensor) -> Tensor:
    """Return ``t`` with rows that start on 16 bytes: zeros beside them if need be."""
    return t if t.stride(0) % 8 == 0 and t.stride(1) == 1 else F.pad(t, (0, -t.shape[1] % 8))


def _scaled(scales: Sequence[float], seed: Tensor | None, dropout_p: float) -> tuple[float, ...]:
    """Return the scales with the factor of the mask in them."""
    if seed is None:
        return tuple(map(float, scales))
    factor = 65536 / (65536 - drop_threshold(dropout_p, seed))
    return tuple(scale * factor for scale in scales)


def lora_forward(
    x: Tensor,
    ws: Sequence[Tensor],
    a_list: Sequence[Tensor],
    b_list: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scales: Sequence[float],
    seed: Tensor | None,
    dropout_p: float,
) -> tuple[list[Tensor], Tensor, Tensor | None] | None:
    """As ``kernels.lora_group_forward``, or None where other kernels should serve; a mask is kept as bits."""
    (M, K), R = x.shape, a_list[0].shape[0]
    Ns = tuple([w.shape[0] for w in ws])
    config = forward_config(M, Ns, K, R, seed is not None, device_facts(x.device))
    if config is None or not (config.SIDES or seed is not None) or not _one_rank(a_list):
        return None
    if R % 8:
        b_list = [_padded(b_list[0])]
    given = [bias for bias in biases if bias is not None]
    if given and len(given) < len(ws):
        return None
    mask, scales = None, _scaled(scales, seed, dropout_p)
    if not config.SIDES:
        return _forward_with_mask(x, ws, a_list, b_list, given, scales, seed, dropout_p, config)
    if seed is not None:
        mask = dropout_mask(seed, M, K, drop_threshold(dropout_p, seed))
    done = hopper_forward(x, ws, a_list, b_list, given, scales, mask, config=config)
    if done is None:
        return None
    ys, h = done
    return ys, h if R % 8 == 0 else h[:, :R], mask


def _forward_with_mask(
    x: Tensor,
    ws: Sequence[Tensor],
    a_list: Sequence[Tensor],
    b_list: Sequence[Tensor],
    biases: Sequence[Tensor],
    scales: tuple[float, ...],
    seed: Tensor,
    dropout_p: float,
    config: HopperConfig,
) -> tuple[list[Tensor], Tensor, Tensor] | None:
    """As :func:`lora_forward`, h and the mask by one launch, y by another."""
    threshold = drop_threshold(dropout_p, seed)
    done = hopper_hidden(x, a_list, seed, threshold, scales, config=hidden_config(x.shape[0]))
    if done is None:
        return None
    h, mask = done
    ys = hopper_outputs(x, ws, h, b_list, biases, config=config)
    R = a_list[0].shape[0]
    return None if ys is None else (ys, h if R % 8 == 0 else h[:, :R], mask)


def lora_backward(
    dys: Sequence[Tensor | None],
    x: Tensor | None,
    ws: Sequence[Tensor],
    a_list: Sequence[Tensor],
    b_list: Sequence[Tensor],
    h: Tensor | None,
    mask: Tensor | None,
    scales: Sequence[float],
    seed: Tensor | None,
    dropout_p: float,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor | None, Sequence[Tensor | None]] | None:
    """Return dx, da of all projections one above the other, and each db; None as in :func:`lora_forward`.

    A db that is None though it is needed is left to the caller: dyᵀ h, a pass of its own above 16 ranks.
    """
    if any(dy is None for dy in dys) or not _one_rank(a_list):
        return None
    (M, R), P, K = (dys[0].shape[0], a_list[0].shape[0]), len(ws), ws[0].shape[1]
    Ns = tuple([w.shape[0] for w in ws])
    config = backward_config(M, Ns, K, R, device_facts(dys[0].device))
    if config is None or not config.SIDES or (need_a and x.stride(1) != 1):
        return None
    if R % 8:
        b_list, h = [_padded(b_list[0])], None if h is None else _padded(h)
    if seed is not None and mask is None:
        mask = dropout_mask(seed, M, K, drop_threshold(dropout_p, seed))
    done = hopper_backward_input(
        dys, ws, a_list, b_list, h if need_b and R <= 16 else None, _scaled(scales, seed, dropout_p), mask,
        factor_counters(K, P * R) if need_a else 0, config=config,
    )  # fmt: skip
    if done is None:
        return None
    dx, dh, parts, zeros = done
    da, db = _gradients_of_factors(x, dh if R % 8 == 0 else dh[:, :R], mask, parts, zeros, need_a)
    if db is not None and R % 8:
        db = db[:, :R].contiguous()
    return dx, da, [db] if P == 1 else [None] * P if db is None else db.split(Ns)


def _gradients_of_factors(
    x: Tensor | None, dh: Tensor, mask: Tensor | None, parts: Part | None, zeros: Part, need_a: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return da, and db if there are parts of it."""
    db = None if parts is None else dh.new_empty(parts.shape[1:])
    if need_a:
        return factor_gradients(x, dh, mask, zeros, parts, db), db
    if parts is not None:
        sum_parts((parts.tensor(), db))
    return None, db


@lru_cache(maxsize=4096)
def _worthwhile(M: int, cols: int, facts: DeviceFacts) -> bool:
    """Whether tiles of 128 x 256 keep the multiprocessors busy."""
    tiles = triton.cdiv(M, 128) * triton.cdiv(cols, 256)
    if not tiles or facts.arch != "sm90":
        return False
    return tiles >= _FILLED * triton.cdiv(tiles, facts.processors) * facts.processors


def update_matmul(
    forward: bool,
    left: Tensor,
    w: Tensor,
    h: Tensor,
    b: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
) -> Tensor | None:
    """As ``hopper.hopper_matmul`` for factors of any dtype; None as in :func:`lora_forward`.

    ``seed``: not forward, of the mask on the update; then its factor is applied to ``h``.
    """
    M, (N, K) = h.shape[0], w.shape
    if left.dtype.itemsize != 2 or not _worthwhile(M, N if forward else K, device_facts(left.device)):
        return None
    mask = None
    if seed is not None:
        threshold = drop_threshold(dropout_p, seed)
        mask = dropout_mask(seed, M, K, threshold)
        h = h * (65536 / (65536 - threshold))
    h, b = _padded(h.to(left.dtype)), b.to(left.dtype)
    if forward:
        b = _padded(b)
    return hopper_matmul(forward, left, w, h, b, bias, mask, HopperConfig(SIDES=0))

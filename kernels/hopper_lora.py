"""LoRA layers on Hopper: when the kernels of ``hopper`` serve them, with which sizes, and in which order."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
import triton
from torch import Tensor

from ._cast import cast_pair
from ._config import DeviceFacts, block_rank, device_facts, measured_rows
from ._launch import Part
from ._ragged import filled_columns, wide_columns, wide_rank
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
# through a side program: plain, and of 128 ranks
_STEP, _TILE = 0.69, 1.5
_SIDE, _SIDE_WIDE = 0.62, 0.86
# the same with a mask that it draws, by ranks and for more projections than one, and a part of the GEMM's
# time: both with some room, for a late side program costs more than one that was done early
_DRAWN_SIDE, _DRAWN_SIDE_MANY, _IN_TIME = {16: 1.25, 32: 1.35, 64: 1.5, 128: 2.8}, 1.85, 0.95
# what two launches of side programs and their first rows must save
_WORTH = 5.0
# a skinny pass of its own: what it costs beside its bytes, and bytes a microsecond, without and with a mask
_PASS, _BYTES, _PASS_DRAWN, _BYTES_DRAWN = 5.0, 2.6e6, 6.0, 2.6e6
# the part of the multiprocessors that must have a tile, over all waves
_FILLED = 0.7
_SIDES = 4


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
    tiles: int, steps: int, M: int, side_steps: int, side_step: float, facts: DeviceFacts
) -> HopperConfig | None:
    """Return the sizes of a launch: with side programs if they are done in time, else without.

    Beside ``_SIDES`` of them a GEMM has as many waves of tiles as without, or one more in many.
    """
    if not tiles or tiles < _FILLED * triton.cdiv(tiles, facts.processors) * facts.processors:
        return None
    tile = steps * _STEP + _TILE
    without = triton.cdiv(tiles, facts.processors) * tile + _PASS + M * side_steps * 128 / _BYTES
    block, blocks = side_steps * side_step, triton.cdiv(M, 256)
    # the first wave of tiles needs the first eight rows of tiles, four blocks
    late = max(0.0, block - tile)
    beside = max(
        triton.cdiv(tiles, facts.processors - _SIDES) * tile + late, triton.cdiv(blocks, _SIDES) * block
    )
    return HopperConfig(SIDES=_SIDES if beside <= 1.02 * without else 0)


def _side_step(R: int, P: int) -> float:
    return _SIDE if block_rank(R, 128) * triton.next_power_of_2(P) <= 64 else _SIDE_WIDE


def _drawn(
    config: HopperConfig, M: int, columns: int, K: int, steps: int, side_step: float, facts: DeviceFacts
) -> HopperConfig:
    """Return ``config`` for a launch with dropout, of so many ``columns`` of tiles.

    Side programs draw the mask more slowly than tiles use it up. So the first blocks of rows have a launch
    of their own, as many as keeps the last block from being late; or all of them; or none.
    """
    tile, tiles, count = steps * _STEP + _TILE, triton.cdiv(M, 128) * columns, triton.cdiv(M, 256)
    block, most, group = max(1, triton.cdiv(K, 64)) * side_step, facts.processors - _SIDES, config.GROUP_M
    # when the first tile that needs a block ends, if none waits
    some = [*range(0, count, triton.cdiv(count, 256)), count - 1]
    waves = {b: (2 * b // group * group * columns + 2 * b % group) // most + 1 for b in some}
    due = {b: _IN_TIME * tile * waves[b] for b in some}

    def cost(first: int) -> float:
        apart = _PASS_DRAWN + first * 512 * K / _BYTES_DRAWN if first else 0.0
        done = [((b - first) // _SIDES + 1) * block - due[b] for b in some if b >= first]
        return apart + max([0.0, *done])

    need = max([0, *(b + 1 - _SIDES * int(due[b] / block) for b in some)])
    first = min({0, need} - {count}, key=cost)
    alone = triton.cdiv(tiles, facts.processors) * tile + cost(count)
    if alone < triton.cdiv(tiles, most) * tile + cost(first) + _WORTH:
        return replace(config, SIDES=0)
    return replace(config, SIDES=_SIDES, FIRST=first)


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
    picked = _pick(tiles, steps, M, triton.cdiv(K, 64), _side_step(R, len(Ns)), facts)
    like_measured = len(Ns) == 1 and R <= 16 and not dropout
    picked = _as_measured(picked, "hopper_forward", M, sum(Ns), K, like_measured, facts)
    if not dropout or picked is None:
        return picked
    side_step = _DRAWN_SIDE[wide] if len(Ns) == 1 else max(_DRAWN_SIDE_MANY, _DRAWN_SIDE[wide])
    return _drawn(picked, M, sum(triton.cdiv(N, 256) for N in Ns), K, steps, side_step, facts)


@lru_cache(maxsize=4096)
def backward_config(M: int, Ns: tuple[int, ...], K: int, R: int, facts: DeviceFacts) -> HopperConfig | None:
    """Return the sizes of a launch for dx, or None where other kernels should serve it."""
    if facts.arch != "sm90" or R > 128:
        return None
    tiles = triton.cdiv(M, 128) * triton.cdiv(K, 256)
    depth = sum(triton.cdiv(N, 64) for N in Ns)
    steps = depth + len(Ns) * triton.cdiv(R, 64)
    picked = _pick(tiles, steps, M, depth, _side_step(R, 1), facts)
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
    return t if t.stride(0) % 8 == 0 and t.stride(1) == 1 else filled_columns(t.contiguous())


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
    config = None
    if a_list[0].dtype == x.dtype:
        config = forward_config(M, Ns, K, R, seed is not None, device_facts(x.device))
    if config is None or not (config.SIDES or seed is not None) or not _one_rank(a_list):
        return None
    if R % 8:
        if a_list[0].dtype != x.dtype or any(size % 8 for size in (*Ns, K)):
            return None
        b_list = [_padded(b_list[0])]
    given = [bias for bias in biases if bias is not None]
    if given and len(given) < len(ws):
        return None
    scales = _scaled(scales, seed, dropout_p)
    if seed is not None:
        return _forward_with_mask(x, ws, a_list, b_list, given, scales, seed, dropout_p, config)
    done = hopper_forward(x, ws, a_list, b_list, given, scales, None, config=config)
    if done is None:
        return None
    ys, h = done
    return ys, h if R % 8 == 0 else h[:, :R], None


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
    """As :func:`lora_forward`; h and the mask of all rows, the first or none by a launch of their own."""
    (M, K), R, h = x.shape, a_list[0].shape[0], None
    threshold = drop_threshold(dropout_p, seed)
    rows = min(M, config.FIRST * config.SIDE_ROWS) if config.SIDES else M
    if rows:
        made = hopper_hidden(x, a_list, seed, threshold, scales, rows, config=hidden_config(rows))
        if made is None:
            return None
        h, mask = made
    else:
        mask = x.new_empty((M, -(-K // 32)), dtype=torch.int32)
    if config.SIDES:
        done = hopper_forward(x, ws, a_list, b_list, biases, scales, mask, seed, threshold, h, config=config)
        if done is None:
            return None
        ys, h = done
    else:
        ys = hopper_outputs(x, ws, h, b_list, biases, config=config)
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
    config = None
    if a_list[0].dtype == dys[0].dtype:
        config = backward_config(M, Ns, K, R, device_facts(dys[0].device))
    if config is None or not config.SIDES or (need_a and x.stride(1) != 1):
        return None
    if R % 8:
        if a_list[0].dtype != dys[0].dtype or any(size % 8 for size in (*Ns, K)):
            return None
        b_list, h = [_padded(b_list[0])], None if h is None else wide_columns(h)
    if seed is not None and mask is None:
        mask = dropout_mask(seed, M, K, drop_threshold(dropout_p, seed))
    scales = _scaled(scales, seed, dropout_p)
    done = hopper_backward_input(
        dys, ws, a_list, b_list, h if need_b and R <= 16 else None, scales, mask,
        factor_counters(K, P * R) if need_a else 0, width=wide_rank(R) if P == 1 else None, config=config,
    )  # fmt: skip
    if done is None:
        return None
    dx, dh, parts, zeros = done
    da, db = _gradients_of_factors(x, dh, mask, parts, zeros, need_a, P * R)
    return dx, da, [db] if P == 1 else [None] * P if db is None else db.split(Ns)


def _gradients_of_factors(
    x: Tensor | None,
    dh: Tensor,
    mask: Tensor | None,
    parts: Part | None,
    zeros: Part,
    need_a: bool,
    R: int | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return da, and db if there are parts of it; with ``R`` of so many ranks, of which dh may have more."""
    db = None
    if parts is not None:
        *_, last = parts.shape
        db = dh.new_empty(*parts.shape[1:-1], last if R is None else last - dh.shape[1] + R)
    if need_a:
        return factor_gradients(x, dh, mask, zeros, parts, db, rank=R), db
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
    if (
        left.dtype.itemsize != 2
        or N % 8
        or K % 8
        or not _worthwhile(M, N if forward else K, device_facts(left.device))
    ):
        return None
    mask, factor = None, 1.0
    if seed is not None:
        threshold = drop_threshold(dropout_p, seed)
        mask, factor = dropout_mask(seed, M, K, threshold), 65536 / (65536 - threshold)
    if forward and b.shape[1] % 8:
        b = filled_columns(b, left.dtype)
    h, b = cast_pair(h, b, left.dtype, factor)
    b = _padded(b) if forward else b
    return hopper_matmul(forward, left, w, _padded(h), b, bias, mask, HopperConfig(SIDES=0))

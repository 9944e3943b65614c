"""LoRA layers on Hopper: when the kernels of ``hopper`` serve them, with which sizes, and in which order."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import triton
from torch import Tensor

from ._cast import cast_pair
from ._config import DeviceFacts, block_rank, device_facts, measured_rows
from ._costs import fills, hopper_time, plain_time
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
from .hopper_apart import backward_apart, hidden_and_mask, masked_hidden
from .lora_backward_factors import factor_counters, factor_gradients
from .lora_forward import drop_threshold

__all__ = [
    "backward_config",
    "forward_config",
    "given_config",
    "lora_backward",
    "lora_forward",
    "masked_hidden",
    "serves",
    "table_key",
    "update_matmul",
]

# microseconds, measured on one H100: a step of a tile's sum, and what a tile costs beside its steps
_STEP, _TILE = 0.69, 1.5
# 32 KiB through a side program, by ranks of all projections: forward without a mask and with one, backward
_SIDE = {16: 0.50, 32: 0.54, 64: 0.62, 128: 1.25}
_MASKED_SIDE = {16: 0.60, 32: 0.65, 64: 0.74}
_SIDE_BACK = {16: 0.62, 32: 0.62, 64: 0.62, 128: 1.25}
# dropout_mask: what it costs beside its elements, and elements a microsecond
_MASK, _MASK_ELEMENTS = 1.4, 9.2e6
# a skinny pass of its own: what it costs beside its bytes, and bytes a microsecond; then one with a mask,
# which it draws, by ranks
_PASS, _BYTES = 5.0, 2.6e6
_PASS_DRAWN, _BYTES_DRAWN = {16: 3.5, 32: 5.5, 64: 8.5, 128: 14.5}, 2.57e6
_SIDES = 4
# of the time of cuBLAS and an update, what a launch may take that spares other passes, and one that does not
_ALIKE, _SURE = 1.05, 0.97


def table_key(op: str, M: int, Ns: Sequence[int], K: int) -> str:
    """Return the key of a launch of one projection or more in the tables, which hold M by powers of two."""
    return f"{op} M={1 << max(M - 1, 0).bit_length()} N={'+'.join(map(str, Ns))} K={K}"


def _measured(op: str, M: int, Ns: tuple[int, ...], K: int, facts: DeviceFacts) -> HopperConfig | None:
    """Return the sizes that tables have of a launch without dropout, of 16 ranks."""
    row = measured_rows(facts).get(table_key(op, M, Ns, K))
    return None if row is None else HopperConfig(**row)


@lru_cache(maxsize=4096)
def given_config(op: str, M: int, Ns: tuple[int, ...], K: int, facts: DeviceFacts) -> HopperConfig:
    """Return the sizes of a launch whose hidden factor exists: the order of tiles alone is measured."""
    measured = _measured(op, M, Ns, K, facts)
    return HopperConfig(SIDES=0) if measured is None else replace(measured, SIDES=0)


def _due(M: int, columns: int, tile: float, group: int, most: int) -> dict[int, float]:
    """Return for blocks of SIDE_ROWS rows, or some of many, when the first tile of them ends if none waits.

    ``columns``: of tiles, whose order is that of ``_hopper_gemm._tile_at``; ``most`` of them at a time.
    """
    count, head = triton.cdiv(M, 256), min(group, 8)

    def first_tile(row: int) -> int:
        past = row - head
        return row if past < 0 else (head + past // group * group) * columns + past % group

    some = [*range(0, count, triton.cdiv(count, 256)), count - 1]
    return {b: tile * (first_tile(2 * b) // most + 1) for b in some}


def _pick(
    M: int,
    columns: int,
    steps: int,
    side_steps: int,
    side_step: float,
    group: int,
    facts: DeviceFacts,
    apart: float | None = None,
    before: float = 0.0,
    plain: float = float("inf"),
) -> HopperConfig:
    """Return the sizes of a launch: with side programs if they are done in time, else without.

    Beside ``_SIDES`` of them a GEMM has as many waves of tiles as without, or one more in many. ``group``:
    rows of tiles in a group, of which it gets fewer where side programs would be late. ``apart``: what a pass
    of its own takes for the hidden factor, ``before``: what precedes side programs, ``plain``: what cuBLAS
    and updates take, which serve where that is less than the launch without side programs.
    """
    tiles, most = triton.cdiv(M, 128) * columns, facts.processors - _SIDES
    tile, block = steps * _STEP + _TILE, side_steps * side_step
    apart = _PASS + M * side_steps * 128 / _BYTES if apart is None else apart
    without = min(triton.cdiv(tiles, facts.processors) * tile, plain) + apart

    def late(rows: int) -> float:
        due = _due(M, columns, tile, rows, most)
        return max([0.0, *((b // _SIDES + 1) * block - due[b] for b in due)])

    # in low groups of tiles rows are due later
    low = min(group, 8)
    beside = triton.cdiv(tiles, most) * tile + min(late(group), late(low)) + before
    if beside > 1.02 * without:
        return HopperConfig(SIDES=0, GROUP_M=group)
    return HopperConfig(SIDES=_SIDES, GROUP_M=group if late(group) <= late(low) else low)


def _pick_masked(
    M: int, columns: int, K: int, steps: int, wide: int, group: int, facts: DeviceFacts
) -> HopperConfig:
    """Return the sizes of a launch with dropout, of factors of so many ranks side by side.

    Either the mask has a launch of its own and side programs read it, or one pass makes it and h before.
    """
    side_steps = triton.cdiv(K, 64)
    apart = _PASS_DRAWN[wide] + M * side_steps * 128 / _BYTES_DRAWN
    before = _MASK + M * side_steps * 64 / _MASK_ELEMENTS
    side_step = _MASKED_SIDE.get(wide, float("inf"))
    return _pick(M, columns, steps, side_steps, side_step, group, facts, apart, before)


@lru_cache(maxsize=4096)
def forward_config(
    M: int, Ns: tuple[int, ...], K: int, R: int, dropout: bool, facts: DeviceFacts
) -> HopperConfig | None:
    """Return the sizes of a forward launch, or None where other kernels should serve it."""
    wide = triton.next_power_of_2(len(Ns)) * block_rank(R, 128)
    if R > 128 or wide > 128 or not _worthwhile(M, Ns, (K,), facts):
        return None
    columns, steps = sum(triton.cdiv(N, 256) for N in Ns), triton.cdiv(K, 64) + triton.cdiv(R, 64)
    measured = _measured("hopper_forward", M, Ns, K, facts)
    group = (measured or HopperConfig()).GROUP_M
    if dropout:
        return _pick_masked(M, columns, K, steps, wide, group, facts)
    plain = plain_time(M, Ns, (K,), facts.processors)
    picked = _pick(M, columns, steps, triton.cdiv(K, 64), _SIDE[wide], group, facts, plain=plain)
    return measured if measured is not None and R <= 16 else picked


@lru_cache(maxsize=4096)
def backward_config(M: int, Ns: tuple[int, ...], K: int, R: int, facts: DeviceFacts) -> HopperConfig | None:
    """Return the sizes of a launch for dx, or None where other kernels should serve it."""
    if R > 128 or not _worthwhile(M, (K,), Ns, facts):
        return None
    depth = sum(triton.cdiv(N, 64) for N in Ns)
    steps = depth + len(Ns) * triton.cdiv(R, 64)
    measured = _measured("hopper_backward_input", M, Ns, K, facts)
    group = (measured or HopperConfig()).GROUP_M
    # of so many ranks cuBLAS makes dh and da in little more time than da takes beside side programs
    apart = None if R <= 64 else M * depth * 128 / _BYTES
    step, plain = _SIDE_BACK[block_rank(R, 128)], plain_time(M, (K,), Ns, facts.processors)
    picked = _pick(M, triton.cdiv(K, 256), steps, depth, step, group, facts, apart, plain=plain)
    return measured if measured is not None and R <= 16 else picked


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
    """As :func:`lora_forward`; the mask is made before, with h where there are no side programs."""
    (M, K), R = x.shape, a_list[0].shape[0]
    threshold = drop_threshold(dropout_p, seed)
    if config.SIDES:
        mask = dropout_mask(seed, M, K, threshold)
        done = hopper_forward(x, ws, a_list, b_list, biases, scales, mask, config=config)
    else:
        made = hidden_and_mask(x, a_list, seed, threshold, scales)
        if made is None:
            return None
        h, mask = made
        ys = hopper_outputs(x, ws, h, b_list, biases, config=config)
        done = None if ys is None else (ys, h)
    if done is None:
        return None
    ys, h = done
    return ys, h if R % 8 == 0 else h[:, :R], mask


def _backward_served(
    dys: Sequence[Tensor | None], Ns: tuple[int, ...], a_list: Sequence[Tensor], seed: Tensor | None
) -> HopperConfig | None:
    """Return the sizes of the launch for dx, or None where other kernels should serve the backward pass."""
    R, K = a_list[0].shape
    if any(dy is None for dy in dys) or not _one_rank(a_list) or a_list[0].dtype != dys[0].dtype:
        return None
    config = backward_config(dys[0].shape[0], Ns, K, R, device_facts(dys[0].device))
    # with neither side programs nor a mask, cuBLAS makes all but dx
    return None if config is None or not (config.SIDES or seed is not None) else config


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
    Ns = tuple([w.shape[0] for w in ws])
    config = _backward_served(dys, Ns, a_list, seed)
    if config is None or (need_a and x.stride(1) != 1):
        return None
    (M, R), P, K = (dys[0].shape[0], a_list[0].shape[0]), len(ws), ws[0].shape[1]
    if R % 8:
        if any(size % 8 for size in (*Ns, K)):
            return None
        b_list, h = [_padded(b_list[0])], None if h is None else wide_columns(h)
    if seed is not None and mask is None:
        mask = dropout_mask(seed, M, K, drop_threshold(dropout_p, seed))
    scales = _scaled(scales, seed, dropout_p)
    if not config.SIDES:
        return backward_apart(dys, x, ws, a_list, b_list, mask, scales, need_a, config)
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
def _worthwhile(
    M: int, cols: tuple[int, ...], depths: tuple[int, ...], facts: DeviceFacts, limit: float = _ALIKE
) -> bool:
    """Whether products of these sizes, in one launch, keep the multiprocessors busy.

    That is as fast as cuBLAS, which has smaller tiles, with an update to each: several columns or depths.
    ``limit``: the part of that time which the launch may take.
    """
    tiles, most = triton.cdiv(M, 128) * sum(triton.cdiv(own, 256) for own in cols), facts.processors
    if facts.arch != "sm90" or not fills(tiles, most):
        return False
    return hopper_time(M, cols, depths, most) <= limit * plain_time(M, cols, depths, most)


def serves(forward: bool, M: int, K: int, N: int, R: int, facts: DeviceFacts) -> bool:
    """Whether y or dx of a layer without dropout, of 16 bits, is made here: with h or dh, or after."""
    if N % 8 or K % 8:
        return False
    config = forward_config(M, (N,), K, R, False, facts) if forward else backward_config(M, (N,), K, R, facts)
    if config is not None and config.SIDES:
        return True
    return _worthwhile(M, *(((N,), (K,)) if forward else ((K,), (N,))), facts, _SURE)


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
    M, (N, K), facts = h.shape[0], w.shape, device_facts(left.device)
    if left.dtype.itemsize != 2 or N % 8 or K % 8:
        return None
    # an update with a mask, or of float32, is none of cuBLAS's and takes longer
    limit = _SURE if seed is None and h.dtype == left.dtype else _ALIKE
    if not _worthwhile(M, *(((N,), (K,)) if forward else ((K,), (N,))), facts, limit):
        return None
    mask, factor = None, 1.0
    if seed is not None:
        threshold = drop_threshold(dropout_p, seed)
        mask, factor = dropout_mask(seed, M, K, threshold), 65536 / (65536 - threshold)
    if forward and b.shape[1] % 8:
        b = filled_columns(b, left.dtype)
    h, b = cast_pair(h, b, left.dtype, factor)
    b = _padded(b) if forward else b
    op = "hopper_forward" if forward else "hopper_backward_input"
    config = given_config(op, M, (N,), K, facts)
    return hopper_matmul(forward, left, w, _padded(h), b, bias, mask, config)

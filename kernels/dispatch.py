"""What ``impl="auto"`` runs on a GPU: for each product the Triton kernel or cuBLAS, as ``pick`` says.

The functions are those of the package, with the same arguments; nothing here measures anything.
"""

from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ._config import TileConfig, device_facts, pick_for
from ._left import is_left as _is_left
from ._matmul import extended_matmul
from ._ragged import (
    cut_columns,
    cut_rows,
    filled_columns,
    filled_parts,
    filled_rows,
    is_ragged,
    wide_columns,
    wide_rank,
)
from .bitmap_codec import bitmap_decode, bitmap_encode, pruned_decode, two_four_decode, two_four_encode
from .dense_dispatch import DispatchPasses
from .dense_dispatch import output as dense_output
from .dropout_mask import drop_some, is_few
from .joint_dispatch import beside, joint_input, joint_outputs
from .lora_backward import lora_backward_a as triton_a
from .lora_backward import lora_backward_b as triton_b
from .lora_backward import lora_backward_hidden as triton_backward_hidden
from .lora_backward import lora_backward_input as triton_input
from .lora_backward_hidden_b import lora_backward_hidden_b as triton_hidden_b
from .lora_forward import drop_threshold
from .lora_forward import lora_hidden as triton_hidden
from .lora_group import Passes
from .masked_dispatch import masked_passes
from .masked_values import pack_sum, unpack_values
from .nearest_neighbors import nearest_neighbors
from .pruned import PrunedPasses

__all__ = [
    "bitmap_decode",
    "bitmap_encode",
    "dense_lora_backward",
    "dense_lora_forward",
    "known_passes",
    "lora_backward",
    "lora_backward_a",
    "lora_backward_b",
    "lora_backward_hidden",
    "lora_backward_hidden_b",
    "lora_backward_input",
    "lora_forward",
    "lora_group_backward",
    "lora_group_forward",
    "lora_hidden",
    "masked_lora_backward",
    "masked_lora_forward",
    "nearest_neighbors",
    "pack_sum",
    "pruned_backward",
    "pruned_decode",
    "pruned_matmul",
    "two_four_decode",
    "two_four_encode",
    "unpack_values",
]

ADD_UPDATE = TileConfig(BLOCK_ROWS=32, BLOCK_COLS=128, BLOCK_DEPTH=64, num_stages=1)


def _scaled_mm(left: Tensor, right: Tensor, scale: float) -> Tensor:
    out = left.new_empty(left.shape[0], right.shape[1])
    return torch.addmm(out, left, right, beta=0, alpha=scale, out=out)


def _add_update(out: Tensor, h: Tensor, b: Tensor, seed: Tensor | None, threshold: int) -> Tensor:
    """Add ``drop(h bᵀ)`` to ``out`` in place; b (cols, R)."""
    if seed is None and h.dtype == out.dtype:
        return out.addmm_(h, b.T)
    return extended_matmul(None, None, h, b, None, seed, threshold, out, ADD_UPDATE)


@cache
def _hopper(device: torch.device) -> ModuleType | None:
    """Return the passes made for this device's architecture alone, if there are any."""
    if device_facts(device).arch != "sm90":
        return None
    from . import hopper_lora

    return hopper_lora


@cache
def known_passes(device: torch.device) -> ModuleType | None:
    """Return the functions of passes that the host has seen before, where there are any."""
    if _hopper(device) is None:
        return None
    from . import hopper_passes

    return hopper_passes


def lora_hidden(x: Tensor, a: Tensor, scale: float, seed: Tensor | None, dropout_p: float) -> Tensor:
    """See ``kernels.lora_hidden``."""
    return _wide_hidden(x, a, scale, seed, dropout_p, None)


def _dropped(x: Tensor, scale: float, seed: Tensor, dropout_p: float) -> tuple[Tensor, float]:
    """Return ``x`` with zeros where it is dropped, and ``scale`` with the factor of the mask."""
    threshold = drop_threshold(dropout_p, seed)
    return drop_some(x, seed, threshold)[0], scale * 65536 / (65536 - threshold)


def _wide_hidden(
    x: Tensor, a: Tensor, scale: float, seed: Tensor | None, dropout_p: float, width: int | None
) -> Tensor:
    config = pick_for("lora_hidden", x, a, 0, x.shape[1], width or a.shape[0], seed)
    few = seed is not None and is_few(*x.shape, a.shape[0])
    if config.CUBLAS and (seed is None or few) and a.dtype == x.dtype:
        x, scale = (x, scale) if seed is None else _dropped(x, scale, seed, dropout_p)
        return _scaled_mm(x, (a if width is None else filled_rows(a)).T, scale)
    return triton_hidden(x, a, scale, seed, dropout_p, config=config, width=width)


def lora_forward(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scale: float,
    seed: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See ``kernels.lora_forward``."""
    if seed is None and a.dtype == x.dtype and _is_left(True, x.device, *x.shape, *b.shape, x.dtype):
        h = _scaled_mm(x, a.T, scale)
        return F.linear(x, w, bias).addmm_(h, b.T), h, None
    hopper = _hopper(x.device)
    if hopper is not None:
        done = hopper.lora_forward(x, [w], [a], [b], [bias], [scale], seed, dropout_p)
        if done is not None:
            return done[0][0], *done[1:]
        made = hopper.masked_hidden(x, a, scale, seed, dropout_p)
        if made is not None:
            return _output(x, w, made[0], b, bias), *made
    R = a.shape[0]
    if is_ragged([R], x.numel()):
        h = _wide_hidden(x, a, scale, seed, dropout_p, wide_rank(R))
        return _output(x, w, h, b, bias), h[:, :R], None
    h = lora_hidden(x, a, scale, seed, dropout_p)
    return _output(x, w, h, b, bias), h, None


def _output(x: Tensor, w: Tensor, h: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    hopper = _hopper(x.device)
    y = None if hopper is None else hopper.update_matmul(True, x, w, h, b, bias, None, 0.0)
    if y is not None:
        return y
    b = b if h.shape[1] == b.shape[1] else filled_columns(b)
    config = pick_for("lora_forward", x, b, w.shape[0], x.shape[1], b.shape[1])
    if config.CUBLAS:
        return _add_update(F.linear(x, w, bias), h, b, None, 0)
    return extended_matmul(x, w, h, b, bias, None, 0, x.new_empty(x.shape[0], w.shape[0]), config)


def lora_backward_hidden(dy: Tensor, b: Tensor, scale: float) -> Tensor:
    """See ``kernels.lora_backward_hidden``."""
    config = pick_for("lora_hidden", dy, b, 0, dy.shape[1], b.shape[1])
    if config.CUBLAS and b.dtype == dy.dtype:
        return _scaled_mm(dy, b, scale)
    return triton_backward_hidden(dy, b, scale, config=config)


def lora_backward_b(dy: Tensor, h: Tensor) -> Tensor:
    """See ``kernels.lora_backward_b``."""
    return _first_of_b(dy, h, None)


def _first_of_b(dy: Tensor, h: Tensor, rank: int | None) -> Tensor:
    config = pick_for("lora_backward_a", dy, h, 0, dy.shape[1], h.shape[1])
    if config.CUBLAS and h.dtype == dy.dtype:
        return dy.T @ h if rank is None else (dy.T @ h)[:, :rank].contiguous()
    return triton_b(dy, h, config=config, rank=rank)


def _gradient_of_b(dy: Tensor, h: Tensor) -> Tensor:
    R = h.shape[1]
    return _first_of_b(dy, wide_columns(h), R) if is_ragged([R], dy.numel()) else lora_backward_b(dy, h)


def lora_backward_hidden_b(dy: Tensor, b: Tensor, h: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See ``kernels.lora_backward_hidden_b``."""
    config = pick_for("lora_backward_hidden_b", dy, b, dy.shape[1], 0, h.shape[1])
    if config.CUBLAS and h.shape[1] != b.shape[1]:
        return lora_backward_hidden(dy, filled_columns(b), scale), _first_of_b(dy, h, b.shape[1])
    if config.CUBLAS:
        return lora_backward_hidden(dy, b, scale), lora_backward_b(dy, h)
    return triton_hidden_b(dy, b, h, scale, config=config)


def lora_backward_a(dh: Tensor, x: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    """See ``kernels.lora_backward_a``."""
    return _first_of_a(dh, x, seed, dropout_p, None)


def _first_of_a(dh: Tensor, x: Tensor, seed: Tensor | None, dropout_p: float, rank: int | None) -> Tensor:
    config = pick_for("lora_backward_a", x, dh, 0, x.shape[1], dh.shape[1], seed)
    few = seed is not None and is_few(*x.shape, dh.shape[1])
    if config.CUBLAS and (seed is None or few) and dh.dtype == x.dtype:
        da = dh.T @ x if seed is None else _scaled_mm(dh.T, *_dropped(x, 1.0, seed, dropout_p))
        # cut afterwards: with rows that are no multiple of 8, cuBLAS takes kernels of half the speed
        return da if rank is None else da[:rank]
    return triton_a(dh, x, seed, dropout_p, config=config, rank=rank)


def lora_backward_input(
    dy: Tensor, w: Tensor, dh: Tensor, a: Tensor, seed: Tensor | None, dropout_p: float
) -> Tensor:
    """See ``kernels.lora_backward_input``."""
    hopper = _hopper(dy.device)
    dx = None if hopper is None else hopper.update_matmul(False, dy, w, dh, a, None, seed, dropout_p)
    if dx is not None:
        return dx
    a = a if dh.shape[1] == a.shape[0] else filled_rows(a)
    config = pick_for("lora_backward_input", dy, a, dy.shape[1], a.shape[1], a.shape[0], seed)
    if config.CUBLAS:
        return _add_update(dy @ w, dh, a.T, seed, drop_threshold(dropout_p, seed))
    return triton_input(dy, w, dh, a, seed, dropout_p, config=config)


def lora_backward(
    dy: Tensor,
    x: Tensor | None,
    w: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    h: Tensor | None,
    mask: Tensor | None,
    scale: float,
    seed: Tensor | None,
    dropout_p: float,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See ``kernels.lora_backward``."""
    if need_x and need_a and need_b and seed is None and a.dtype == dy.dtype:
        if _is_left(False, dy.device, *x.shape, *b.shape, dy.dtype):
            dh = _scaled_mm(dy, b, scale)
            return torch.mm(dy, w).addmm_(dh, a), torch.mm(dh.T, x), torch.mm(dy.T, h)
    hopper = _hopper(dy.device)
    if need_x and hopper is not None:
        done = hopper.lora_backward([dy], x, [w], [a], [b], h, mask, [scale], seed, dropout_p, need_a, need_b)
        if done is not None:
            dx, da, (db,) = done
            return dx, da, _gradient_of_b(dy, h) if need_b and db is None else db
    return _backward_in_passes(dy, x, w, a, b, h, scale, seed, dropout_p, need_x, need_a, need_b)


def _backward_in_passes(
    dy: Tensor,
    x: Tensor | None,
    w: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    h: Tensor | None,
    scale: float,
    seed: Tensor | None,
    dropout_p: float,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    # of ragged ranks dh has zeros beside it, and gradients are cut
    dx = da = db = dh = None
    R = (h if b is None else b).shape[1]
    ragged = is_ragged([R], dy.numel())
    rank = R if ragged else None
    if ragged and need_b:
        h = wide_columns(h)
    if need_b and (need_x or need_a):
        dh, db = lora_backward_hidden_b(dy, b, h, scale)
    elif need_b:
        db = _first_of_b(dy, h, rank)
    elif need_x or need_a:
        dh = lora_backward_hidden(dy, filled_columns(b) if ragged else b, scale)
    if need_x:
        dx = lora_backward_input(dy, w, dh, a, seed, dropout_p)
    if need_a:
        da = _first_of_a(dh, x, seed, dropout_p, rank)
    return dx, da, db


# a link of the chain without an update is a plain product, where nothing is faster than cuBLAS
_GROUP = Passes(
    lora_hidden,
    _output,
    lora_backward_hidden,
    lora_backward_b,
    lora_backward_hidden_b,
    lora_backward_a,
    lora_backward_input,
    Tensor.addmm_,
    joint_outputs,
    joint_input,
    beside,
)

_MASKED = masked_passes(lora_hidden, lora_forward, lora_backward_hidden, lora_backward_a, lora_backward_input)
masked_lora_forward, masked_lora_backward = _MASKED.forward, _MASKED.backward

_DENSE = DispatchPasses(lora_hidden, dense_output, lora_backward_b, lora_backward_a, lora_backward_input)
dense_lora_forward, dense_lora_backward = _DENSE.forward, _DENSE.backward


def lora_group_forward(
    x: Tensor,
    ws: list[Tensor],
    a_list: list[Tensor],
    b_list: list[Tensor],
    biases: list[Tensor | None],
    scales: list[float],
    seed: Tensor | None,
    dropout_p: float,
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """See ``kernels.lora_group_forward``."""
    if len(ws) == 1:
        y, *kept = lora_forward(x, ws[0], a_list[0], b_list[0], biases[0], scales[0], seed, dropout_p)
        return [y], *kept
    hopper = _hopper(x.device)
    if hopper is not None:
        done = hopper.lora_forward(x, ws, a_list, b_list, biases, scales, seed, dropout_p)
        if done is not None:
            return done
    ranks = [a.shape[0] for a in a_list]
    if not is_ragged(ranks, x.numel()):
        return _GROUP.forward(x, ws, a_list, b_list, biases, scales, seed, dropout_p)
    a_list = [filled_rows(a) for a in a_list]
    ys, h, mask = _GROUP.forward(x, ws, a_list, b_list, biases, scales, seed, dropout_p)
    parts = zip(h.split([a.shape[0] for a in a_list], 1), ranks, strict=True)
    return ys, torch.cat([part[:, :rank] for part, rank in parts], 1), mask


def lora_group_backward(
    dys: list[Tensor | None],
    x: Tensor | None,
    ws: list[Tensor],
    a_list: list[Tensor],
    b_list: list[Tensor],
    h: Tensor | None,
    mask: Tensor | None,
    scales: list[float],
    seed: Tensor | None,
    dropout_p: float,
    need_x: bool,
    need_a: list[bool],
    need_b: list[bool],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """See ``kernels.lora_group_backward``."""
    if len(dys) == 1:
        own = [column[0] if column else None for column in (ws, a_list, b_list)]
        needs = (need_x, need_a[0], need_b[0])
        dx, da, db = lora_backward(dys[0], x, *own, h, mask, scales[0], seed, dropout_p, *needs)
        return dx, [da], [db]
    hopper = _hopper(b_list[0].device)
    if need_x and hopper is not None:
        done = hopper.lora_backward(
            dys, x, ws, a_list, b_list, h, mask, scales, seed, dropout_p, any(need_a), any(need_b)
        )
        if done is not None:
            (dx, da, dbs), R = done, a_list[0].shape[0]
            das = [None] * len(ws) if da is None else da.split(R)
            if any(need_b) and dbs[0] is None:
                dbs = [lora_backward_b(dy, h[:, i * R : i * R + R]) for i, dy in enumerate(dys)]
            das = [grad if need else None for grad, need in zip(das, need_a, strict=True)]
            return dx, das, [grad if need else None for grad, need in zip(dbs, need_b, strict=True)]
    needs, ranks = (need_x, need_a, need_b), [b.shape[1] for b in b_list]
    if not is_ragged(ranks, max(dy.numel() for dy in dys if dy is not None)):
        return _GROUP.backward(dys, x, ws, a_list, b_list, h, mask, scales, seed, dropout_p, *needs)
    a_list, h = [filled_rows(a) for a in a_list], filled_parts(h, ranks)
    # the pass that makes dh and db at once takes b as it is; without need_x there is no a
    b_list = [b if need and need_x else filled_columns(b) for b, need in zip(b_list, need_b, strict=True)]
    dx, das, dbs = _GROUP.backward(dys, x, ws, a_list, b_list, h, mask, scales, seed, dropout_p, *needs)
    return dx, cut_rows(das, ranks), cut_columns(dbs, ranks)


_PRUNED = PrunedPasses(lora_hidden, lora_forward, lora_backward, F.linear, torch.mm, widest_few=2)
pruned_matmul = _PRUNED.pruned_matmul
pruned_backward = _PRUNED.pruned_backward

"""Passes with a mask on Hopper where the GEMM does not make its hidden factor itself."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._ragged import filled_columns
from .dropout_mask import drop_some, is_few
from .hopper import HopperConfig, hopper_input
from .hopper_hidden import hidden_config, hopper_hidden
from .lora_backward_factors import factor_counters, factor_gradients
from .lora_forward import drop_threshold

__all__ = ["backward_apart", "hidden_and_mask", "masked_hidden"]

# from so many rows on, one pass makes h and its mask faster than the portable kernel makes h alone
_MASKED_ROWS = 1024


def masked_hidden(
    x: Tensor, a: Tensor, scale: float, seed: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor] | None:
    """Return ``h = scale·drop(x) aᵀ`` and its mask as bits; None as in ``hopper``."""
    (M, K), R = x.shape, a.shape[0]
    if seed is None or a.dtype != x.dtype or R > 128 or R % 8:
        return None
    if M < _MASKED_ROWS and not is_few(M, K, R):
        return None
    threshold = drop_threshold(dropout_p, seed)
    return hidden_and_mask(x, [a], seed, threshold, (float(scale) * 65536 / (65536 - threshold),))


def hidden_and_mask(
    x: Tensor, a_list: Sequence[Tensor], seed: Tensor, threshold: int, scales: tuple[float, ...]
) -> tuple[Tensor, Tensor] | None:
    """Return h of all projections side by side and the mask as bits; ``scales`` with the mask's factor.

    Of many ranks and few elements x is copied with zeros in it, for cuBLAS. None as in ``hopper``.
    """
    (M, K), R = x.shape, sum(a.shape[0] for a in a_list)
    if len(a_list) == 1 and R % 8 == 0 and is_few(M, K, R):
        dropped, mask = drop_some(x, seed, threshold)
        h = x.new_empty(M, R)
        return torch.addmm(h, dropped, a_list[0].T, beta=0, alpha=scales[0], out=h), mask
    return hopper_hidden(x, a_list, seed, threshold, scales, config=hidden_config(M))


def backward_apart(
    dys: Sequence[Tensor],
    x: Tensor | None,
    ws: Sequence[Tensor],
    a_list: Sequence[Tensor],
    b_list: Sequence[Tensor],
    mask: Tensor,
    scales: tuple[float, ...],
    need_a: bool,
    config: HopperConfig,
) -> tuple[Tensor, Tensor | None, list[None]] | None:
    """Return dx, da of all projections one above the other, and no db; None as in ``hopper``.

    dh is made before the launch that makes dx. The mask's factor belongs into ``scales``.
    """
    P, K = len(ws), ws[0].shape[1]
    if P == 1:
        # of other ranks rows of dh would take more loads
        b_list = [filled_columns(b_list[0])]
    R = b_list[0].shape[1]
    dh = dys[0].new_empty(dys[0].shape[0], P * R)
    for dy, b, scale, out in zip(dys, b_list, scales, dh.split(R, 1), strict=True):
        torch.addmm(out, dy, b, beta=0, alpha=scale, out=out)
    dx = hopper_input(dys, ws, dh, a_list, mask, config=config)
    if dx is None:
        return None
    da = None
    if need_a:
        counters = torch.zeros(factor_counters(K, P * R), dtype=torch.int32, device=dh.device)
        da = factor_gradients(x, dh, mask, counters, rank=sum(a.shape[0] for a in a_list))
    return dx, da, [None] * P

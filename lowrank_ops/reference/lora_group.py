"""LoRA: projections that share one input."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import drop
from .lora import lora_backward_b, lora_backward_hidden

__all__ = ["lora_group_backward", "lora_group_forward"]


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
    """Return ``y = x wᵀ + h bᵀ + bias``, (M, N), of several projections of one x, and every h side by side.

    A list holds one entry a projection. All see x under one dropout mask; h is (M, sum of R), dtype of a. The
    third value is what an implementation keeps of its mask for :func:`lora_group_backward`; None here.
    """
    dropped = drop(x.to(a_list[0].dtype), seed, dropout_p)
    hs = [scale * (dropped @ a.T) for a, scale in zip(a_list, scales, strict=True)]
    each = zip(hs, ws, b_list, biases, strict=True)
    ys = [(F.linear(x, w, bias) + h @ b.T).to(x.dtype) for h, w, b, bias in each]
    return ys, torch.cat(hs, 1), None


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
    """Return ``dx = sum of dy w + drop(sum of dh a)``, (M, K), all ``da`` and all ``db``; None if not needed.

    A dy may be None, for a y that nobody used: its da and db must not be needed then. ``h`` and ``mask`` are
    what :func:`lora_group_forward` returned. dx needs ws and a_list, any da x, any db h: what is not needed
    may be None, or an empty list. Tensors of one list may share their memory's owner, but no memory.
    """
    used = [dy is not None and (need_x or need) for dy, need in zip(dys, need_a, strict=True)]
    each = zip(dys, b_list, scales, used, strict=True)
    dhs = [lora_backward_hidden(dy, b, scale) if use else None for dy, b, scale, use in each]
    dx, das, dbs = None, [None] * len(dys), [None] * len(dys)
    if need_x:
        first, *rest = (dy @ w for dy, w in zip(dys, ws, strict=True) if dy is not None)
        dh, a = zip(*[pair for pair in zip(dhs, a_list, strict=True) if pair[0] is not None], strict=True)
        update = drop(torch.cat(dh, 1) @ torch.cat(a), seed, dropout_p).to(first.dtype)
        dx = sum(rest, first) + update
    if any(need_a):
        dropped = drop(x.to(b_list[0].dtype), seed, dropout_p)
        das = [dh.T @ dropped if need else None for dh, need in zip(dhs, need_a, strict=True)]
    if any(need_b):
        hs = h.split([b.shape[1] for b in b_list], 1)
        dbs = [lora_backward_b(*pair) if need else None for *pair, need in zip(dys, hs, need_b, strict=True)]
    return dx, das, dbs

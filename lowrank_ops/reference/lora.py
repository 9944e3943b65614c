"""LoRA: one projection."""

import torch.nn.functional as F
from torch import Tensor

from .dropout import drop

__all__ = [
    "lora_backward",
    "lora_backward_a",
    "lora_backward_b",
    "lora_backward_hidden",
    "lora_backward_hidden_b",
    "lora_backward_input",
    "lora_forward",
    "lora_hidden",
]


def lora_hidden(x: Tensor, a: Tensor, scale: float, seed: Tensor | None, dropout_p: float) -> Tensor:
    """Return ``h = scale · drop(x) aᵀ``, (M, R), dtype of ``a``. No seed, no dropout."""
    return scale * (drop(x.to(a.dtype), seed, dropout_p) @ a.T)


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
    """Return ``y = x wᵀ + h bᵀ + bias``, (M, N), dtype of ``x``, and ``h = scale · drop(x) aᵀ``, (M, R).

    The third value is what an implementation keeps of its dropout mask for :func:`lora_backward`; None here.
    Source: Hu et al. 2021, LoRA, eq. 3 (arXiv:2106.09685).
    """
    h = lora_hidden(x, a, scale, seed, dropout_p)
    return (F.linear(x, w, bias) + h @ b.T).to(x.dtype), h, None


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
    """Return ``dx``, (M, K), ``da``, (R, K), and ``db``, (N, R), each None unless needed.

    ``h`` and ``mask`` are what :func:`lora_forward` returned. dx needs w, a and b; da needs x and b; db
    needs h: what is not needed may be None.
    """
    dh = lora_backward_hidden(dy, b, scale) if need_x or need_a else None
    dx = lora_backward_input(dy, w, dh, a, seed, dropout_p) if need_x else None
    da = lora_backward_a(dh, x, seed, dropout_p) if need_a else None
    return dx, da, lora_backward_b(dy, h) if need_b else None


def lora_backward_hidden(dy: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return ``dh = scale · dy b``, (M, R), dtype of ``b``: the gradient of ``drop(x) aᵀ``."""
    return scale * (dy.to(b.dtype) @ b)


def lora_backward_b(dy: Tensor, h: Tensor) -> Tensor:
    """Return ``db = dyᵀ h``, (N, R), dtype of ``h``, which already holds the scale."""
    return dy.to(h.dtype).T @ h


def lora_backward_hidden_b(dy: Tensor, b: Tensor, h: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return ``(dh, db)`` as :func:`lora_backward_hidden` and :func:`lora_backward_b` do."""
    return lora_backward_hidden(dy, b, scale), lora_backward_b(dy, h)


def lora_backward_a(dh: Tensor, x: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    """Return ``da = dhᵀ drop(x)``, (R, K), dtype of ``dh``."""
    return dh.T @ drop(x.to(dh.dtype), seed, dropout_p)


def lora_backward_input(
    dy: Tensor, w: Tensor, dh: Tensor, a: Tensor, seed: Tensor | None, dropout_p: float
) -> Tensor:
    """Return ``dx = dy w + drop(dh a)``, (M, K), dtype of ``dy``, with the mask of the forward pass."""
    return dy @ w + drop(dh @ a, seed, dropout_p).to(dy.dtype)

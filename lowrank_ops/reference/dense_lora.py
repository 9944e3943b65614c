"""DenseLoRA: encoder, core and decoder, with an activation after the first and the last."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import drop
from .lora import lora_backward_a, lora_backward_input

__all__ = ["dense_lora_backward", "dense_lora_forward"]


def _seeds(seed: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the seeds of the three masks: of x, of what follows the encoder, of the update."""
    return (None, None, None) if seed is None else seed.split(1)


def _activate(t: Tensor, gelu: bool) -> Tensor:
    return F.gelu(t) if gelu else t


def _through(grad: Tensor, t: Tensor, gelu: bool) -> Tensor:
    """Return ``grad`` of the activation of ``t`` as the gradient of ``t``."""
    return torch.ops.aten.gelu_backward(grad, t) if gelu else grad


def dense_lora_forward(
    x: Tensor,
    w: Tensor,
    encoder: Tensor,
    core: Tensor,
    decoder: Tensor,
    bias: Tensor | None,
    scale: float,
    gelu: bool,
    seed: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return ``y = x wᵀ + bias + scale · drop₃(g(h coreᵀ decoderᵀ))``, (M, N), u and h.

    With u = drop₁(x) encoderᵀ and h = drop₂(g(u)), both (M, R) in the dtype of ``encoder``; g is the exact
    GELU, or nothing. ``seed``, (3,), has a seed for each mask. The fourth value is what an implementation
    keeps of drop₁ for :func:`dense_lora_backward`; None here.
    Source: DenseLoRA, section 3 (arXiv:2505.23808).
    """
    first, second, third = _seeds(seed)
    u = drop(x.to(encoder.dtype), first, dropout_p) @ encoder.T
    h = drop(_activate(u, gelu), second, dropout_p)
    update = scale * drop(_activate(h @ core.T @ decoder.T, gelu), third, dropout_p)
    return (F.linear(x, w, bias) + update).to(x.dtype), u, h, None


def dense_lora_backward(
    dy: Tensor,
    x: Tensor | None,
    w: Tensor | None,
    encoder: Tensor | None,
    core: Tensor,
    decoder: Tensor,
    u: Tensor | None,
    h: Tensor,
    mask: Tensor | None,
    scale: float,
    gelu: bool,
    seed: Tensor | None,
    dropout_p: float,
    need_x: bool,
    need_encoder: bool,
    need_core: bool,
    need_decoder: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return ``dx``, (M, K), and the gradients of encoder, core and decoder, each None unless needed.

    ``u``, ``h`` and ``mask`` are what :func:`dense_lora_forward` returned. dx needs w, encoder and u; that of
    the encoder x and u: what is not needed may be None.
    """
    first, second, third = _seeds(seed)
    v = h @ core.T
    dz = _through(scale * drop(dy.to(h.dtype), third, dropout_p), v @ decoder.T, gelu)
    dv = dz @ decoder
    dx = d_encoder = None
    if need_x or need_encoder:
        du = _through(drop(dv @ core, second, dropout_p), u, gelu)
        dx = lora_backward_input(dy, w, du, encoder, first, dropout_p) if need_x else None
        d_encoder = lora_backward_a(du, x, first, dropout_p) if need_encoder else None
    return dx, d_encoder, dv.T @ h if need_core else None, dz.T @ v if need_decoder else None

"""DenseLoRA layers on Hopper: when the kernels made for it serve them, and with which sizes."""

import torch
from torch import Tensor

from ._config import device_facts
from .dropout_mask import dropout_mask
from .hopper import HopperConfig, _serves, hopper_matmul
from .hopper_dense import hopper_dense_forward
from .hopper_lora import _worthwhile, forward_config
from .lora_backward_factors import factor_counters, factor_gradients
from .lora_forward import drop_threshold

__all__ = ["forward", "masked_encoder", "masked_input", "output", "serves"]


def _fits(x: Tensor, R: int) -> bool:
    return x.element_size() == 2 and R <= 64 and R % 8 == 0


def serves(x: Tensor, w: Tensor, R: int, seed: Tensor | None) -> bool:
    """Whether :func:`forward` is worthwhile: side programs make the thin tensors in time."""
    (M, K), N = x.shape, w.shape[0]
    if not _fits(x, R) or not _serves([x, w], x.dtype):
        return False
    facts = device_facts(x.device)
    config = forward_config(M, (N,), K, R, seed is not None, facts)
    # a mask that is kept must serve the backward pass too
    return config is not None and config.SIDES > 0 and (seed is None or _worthwhile(M, (K,), (N,), facts))


def forward(
    x: Tensor,
    w: Tensor,
    encoder: Tensor,
    factor: Tensor,
    bias: Tensor | None,
    scale: float,
    gelu: bool,
    seed: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None] | None:
    """As ``kernels.dense_lora_forward``, of factor = decoder core; keeps drop₁ as bits. None: not served."""
    (M, K), (N, R) = x.shape, factor.shape
    config = forward_config(M, (N,), K, R, seed is not None, device_facts(x.device))
    threshold, mask = drop_threshold(dropout_p, seed), None
    if seed is not None:
        mask = dropout_mask(seed[:1], M, K, threshold)
    done = hopper_dense_forward(
        x, w, encoder, factor, bias, scale, gelu, seed, mask, threshold, config=config
    )
    return None if done is None else (*done, mask)


def output(
    x: Tensor,
    w: Tensor,
    h: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scale: float,
    gelu: bool,
    seed: Tensor | None,
    threshold: int,
) -> Tensor | None:
    """Return ``y = x wᵀ + bias + scale · drop₃(g(h bᵀ))``; None where other kernels should serve."""
    N, K = w.shape
    if not _fits(x, h.shape[1]) or not _worthwhile(x.shape[0], (N,), (K,), device_facts(x.device)):
        return None
    done = hopper_dense_forward(
        x, w, None, b, bias, scale, gelu, seed, None, threshold, h, config=HopperConfig(SIDES=0)
    )
    return None if done is None else done[0]


def masked_input(dy: Tensor, w: Tensor, du: Tensor, encoder: Tensor, mask: Tensor) -> Tensor:
    """Return ``dx = dy w + mask ∘ (du encoder)``, (M, K)."""
    if not _serves([dy], dy.dtype):
        dy = dy.contiguous()
    return hopper_matmul(False, dy, w, du, encoder, None, mask, HopperConfig(SIDES=0))


def masked_encoder(du: Tensor, x: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``duᵀ (mask ∘ x)``, (R, K), rounded to ``dtype`` alone."""
    counters = torch.zeros(factor_counters(x.shape[1], du.shape[1]), dtype=torch.int32, device=x.device)
    return factor_gradients(x, du, mask, counters, dtype=dtype)

"""What ``impl="auto"`` runs on a GPU: for each product the Triton kernel or cuBLAS, as ``pick`` says.

The functions are those of the package, with the same arguments; nothing here measures anything.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import lora_backward as triton_backward
from . import lora_forward as triton_forward
from ._config import TileConfig, pick_for
from ._matmul import extended_matmul
from .lora_backward_hidden_b import lora_backward_hidden_b as triton_hidden_b

__all__ = [
    "lora_backward_a",
    "lora_backward_b",
    "lora_backward_hidden",
    "lora_backward_hidden_b",
    "lora_backward_input",
    "lora_forward",
    "lora_hidden",
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


def lora_hidden(x: Tensor, a: Tensor, scale: float, seed: Tensor | None, dropout_p: float) -> Tensor:
    """See ``kernels.lora_hidden``."""
    config = pick_for("lora_hidden", x, a, 0, x.shape[1], a.shape[0], seed)
    if config.CUBLAS and seed is None and a.dtype == x.dtype:
        return _scaled_mm(x, a.T, scale)
    return triton_forward.lora_hidden(x, a, scale, seed, dropout_p, config=config)


def lora_forward(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scale: float,
    seed: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """See ``kernels.lora_forward``."""
    config = pick_for("lora_forward", x, a, w.shape[0], x.shape[1], a.shape[0])
    h = lora_hidden(x, a, scale, seed, dropout_p)
    if config.CUBLAS:
        return _add_update(F.linear(x, w, bias), h, b, None, 0), h
    y = x.new_empty(x.shape[0], w.shape[0])
    return extended_matmul(x, w, h, b, bias, None, 0, y, config), h


def lora_backward_hidden(dy: Tensor, b: Tensor, scale: float) -> Tensor:
    """See ``kernels.lora_backward_hidden``."""
    config = pick_for("lora_hidden", dy, b, 0, dy.shape[1], b.shape[1])
    if config.CUBLAS and b.dtype == dy.dtype:
        return _scaled_mm(dy, b, scale)
    return triton_backward.lora_backward_hidden(dy, b, scale, config=config)


def lora_backward_b(dy: Tensor, h: Tensor) -> Tensor:
    """See ``kernels.lora_backward_b``."""
    config = pick_for("lora_backward_a", dy, h, 0, dy.shape[1], h.shape[1])
    if config.CUBLAS and h.dtype == dy.dtype:
        return dy.T @ h
    return triton_backward.lora_backward_b(dy, h, config=config)


def lora_backward_hidden_b(dy: Tensor, b: Tensor, h: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See ``kernels.lora_backward_hidden_b``."""
    config = pick_for("lora_backward_hidden_b", dy, b, dy.shape[1], 0, b.shape[1])
    if config.CUBLAS:
        return lora_backward_hidden(dy, b, scale), lora_backward_b(dy, h)
    return triton_hidden_b(dy, b, h, scale, config=config)


def lora_backward_a(dh: Tensor, x: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    """See ``kernels.lora_backward_a``."""
    config = pick_for("lora_backward_a", x, dh, 0, x.shape[1], dh.shape[1], seed)
    if config.CUBLAS and seed is None and dh.dtype == x.dtype:
        return dh.T @ x
    return triton_backward.lora_backward_a(dh, x, seed, dropout_p, config=config)


def lora_backward_input(
    dy: Tensor, w: Tensor, dh: Tensor, a: Tensor, seed: Tensor | None, dropout_p: float
) -> Tensor:
    """See ``kernels.lora_backward_input``."""
    config = pick_for("lora_backward_input", dy, a, dy.shape[1], a.shape[1], a.shape[0], seed)
    if config.CUBLAS:
        threshold = triton_forward.drop_threshold(dropout_p, seed)
        return _add_update(dy @ w, dh, a.T, seed, threshold)
    return triton_backward.lora_backward_input(dy, w, dh, a, seed, dropout_p, config=config)

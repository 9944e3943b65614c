"""The forward pass: h from one pass over x, then y from one GEMM that starts at h bᵀ."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._config import TileConfig, pick_for
from ._matmul import extended_matmul
from ._project import project
from .dropout_mask import dropout_mask

# of float32 up to so many tokens have so few numbers in h that the error of the worst is a matter of chance
_FEW = 4


def drop_threshold(dropout_p: float, seed: Tensor | None) -> int:
    """Return T: an element is dropped where its 16 random bits are below T (reference.keep_threshold)."""
    return 0 if seed is None else min(round(dropout_p * 65536), 65535)


def lora_hidden(
    x: Tensor,
    a: Tensor,
    scale: float,
    seed: Tensor | None,
    dropout_p: float,
    *,
    config: TileConfig | None = None,
    width: int | None = None,
) -> Tensor:
    """Return ``h = scale · drop(x) aᵀ``, (M, R), dtype of ``a``; zeros beside it, to ``width`` if given."""
    K, R = x.shape[1], width or a.shape[0]
    if x.dtype is torch.float32 and 0 < x.shape[0] <= _FEW:
        h = exact_hidden(x, a, seed, drop_threshold(dropout_p, seed), scale)
        return h if width is None else F.pad(h, (0, R - h.shape[1]))
    config = config or pick_for("lora_hidden", x, a, 0, K, R, seed)
    return project(x, a, scale, seed, drop_threshold(dropout_p, seed), config, width)


def exact_hidden(x: Tensor, a: Tensor, seed: Tensor | None, threshold: int, scale: float = 1.0) -> Tensor:
    """Return ``scale · drop(x) aᵀ``, (M, R), summed in float64 and rounded once."""
    wide = x.double()
    if seed is not None:
        words = dropout_mask(seed, *x.shape, threshold)
        bits = words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=x.device) & 1
        keep = bits.flatten(1)[:, : x.shape[1]] != 0
        wide = torch.where(keep, wide * (65536 / (65536 - threshold)), 0.0)
    return (scale * (wide @ a.T.double())).to(x.dtype)


def lora_forward(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scale: float,
    seed: Tensor | None,
    dropout_p: float,
    *,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor, None]:
    """Return ``y = x wᵀ + h bᵀ + bias``, (M, N), ``h = scale · drop(x) aᵀ``, (M, R), and no mask."""
    (M, K), (N, R) = x.shape, b.shape
    h = lora_hidden(x, a, scale, seed, dropout_p)
    config = config or pick_for("lora_forward", x, a, N, K, R)
    return extended_matmul(x, w, h, b, bias, None, 0, x.new_empty(M, N), config), h, None

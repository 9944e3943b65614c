"""The definitions in stock PyTorch: what every kernel computes, under the kernel's own name.

Written to be read: no fusion, dtype of the inputs throughout, 2-D tensors. In float64 these are the
truth that errors are measured from; on a CPU they are what runs. Letters: x (M, K), w (N, K), a (R, K),
b (N, R), h (M, R), y (M, N); a gradient is ``d`` + name. Adapters (a, b, h, dh) may be float32 beside
16-bit x, w and dy: then their products are taken in float32, as PEFT takes them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "dropout_keep",
    "keep_threshold",
    "lora_backward_a",
    "lora_backward_b",
    "lora_backward_hidden",
    "lora_backward_hidden_b",
    "lora_backward_input",
    "lora_forward",
    "lora_hidden",
    "philox",
]

_LOW = 0xFFFFFFFF


def philox(seed: Tensor, c0: Tensor, c1: Tensor, rounds: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four 32-bit words of Philox-4x32 at counter (c0, c1, 0, 0), as int64.

    Args:
        seed: (1,), int64; its low and high halves are the key.
        c0, c1: int64 tensors in [0, 2³²) of shapes that broadcast.
        rounds: 7 passes BigCrush; 10 is the paper's default.

    Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3, section 3.3.
    """
    c0, c1 = torch.broadcast_tensors(c0, c1)
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(rounds):
        # products wrap modulo 2**64, which leaves both halves of an unsigned product intact
        left, right = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((right >> 32) & _LOW) ^ c1 ^ k0, right & _LOW
        c2, c3 = ((left >> 32) & _LOW) ^ c3 ^ k1, left & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def keep_threshold(dropout_p: float) -> int:
    """Return T in [0, 65535]: an element is dropped where its 16 random bits are below T.

    The probability is thus exact to 2⁻¹⁶, and survivors are scaled by 65536 / (65536 - T), which makes
    the expectation exact.
    """
    return min(round(dropout_p * 65536), 65535)


def dropout_keep(seed: Tensor, M: int, K: int, dropout_p: float) -> Tensor:
    """Return the dropout mask, (M, K) bool, True where an element is kept.

    The mask depends on the seed and on the element alone. One Philox call gives eight half-words to the
    eight elements of a row that one thread of a tensor-core tile holds: columns {2t, 2t + 1} + 8 j, j < 4,
    of a block of 32. So element (m, k) takes half-word 2 (k % 32 // 8) + k % 2, low half of a word first,
    of the call at counter (4 (k // 32) + k % 8 // 2, m).
    """
    groups = torch.arange((K + 31) // 32 * 4, device=seed.device)
    words = torch.stack(philox(seed, groups[None, :], torch.arange(M, device=seed.device)[:, None]), -1)
    halves = torch.stack([words & 0xFFFF, words >> 16], -1)  # (M, K / 8, 4, 2)
    halves = halves.unflatten(1, (-1, 4)).transpose(2, 3).flatten(1)  # (M, K / 32, j, t, 2)
    return halves[:, :K] >= keep_threshold(dropout_p)


def _drop(t: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    if seed is None:
        return t
    keep = dropout_keep(seed, *t.shape, dropout_p)
    return torch.where(keep, t, 0) * (65536 / (65536 - keep_threshold(dropout_p)))


def lora_hidden(x: Tensor, a: Tensor, scale: float, seed: Tensor | None, dropout_p: float) -> Tensor:
    """Return ``h = scale · drop(x) aᵀ``, (M, R), dtype of ``a``. No seed, no dropout."""
    return scale * (_drop(x.to(a.dtype), seed, dropout_p) @ a.T)


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
    """Return ``y = x wᵀ + h bᵀ + bias``, (M, N), dtype of ``x``, and ``h = scale · drop(x) aᵀ``, (M, R).

    Source: Hu et al. 2021, LoRA, eq. 3 (arXiv:2106.09685).
    """
    h = lora_hidden(x, a, scale, seed, dropout_p)
    return (F.linear(x, w, bias) + h @ b.T).to(x.dtype), h


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
    return dh.T @ _drop(x.to(dh.dtype), seed, dropout_p)


def lora_backward_input(
    dy: Tensor, w: Tensor, dh: Tensor, a: Tensor, seed: Tensor | None, dropout_p: float
) -> Tensor:
    """Return ``dx = dy w + drop(dh a)``, (M, K), dtype of ``dy``, with the mask of the forward pass."""
    return dy @ w + _drop(dh @ a, seed, dropout_p).to(dy.dtype)

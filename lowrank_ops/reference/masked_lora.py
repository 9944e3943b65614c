"""A LoRA layer whose b has values at the entries of a mask alone. See :class:`lowrank_ops.SparseMask`.

``words`` (N, ceil(R / 32)) and ``offsets`` (N + 1,) are those of the mask; ``values`` (nnz,) are the entries
of b, row by row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .lora import lora_backward, lora_forward

__all__ = [
    "mask_bits",
    "masked_lora_backward",
    "masked_lora_forward",
    "nonzero",
    "pack_sum",
    "unpack_values",
]


def mask_bits(words: Tensor) -> Tensor:
    """Return the bits of ``words``, (rows, W) int32, least significant first: (rows, 32 W), uint8."""
    octets = words.contiguous().view(torch.uint8)
    places = torch.arange(8, dtype=torch.uint8, device=words.device)
    return (octets[:, :, None] >> places & 1).flatten(1)


def unpack_values(values: Tensor, words: Tensor, offsets: Tensor, cols: int) -> Tensor:
    """Return (rows, cols), dtype of ``values``: them at the mask's entries, zero elsewhere."""
    places = _places(words, cols, values.shape[0])
    dense = values.new_zeros(words.shape[0] * cols)
    return dense.scatter_(0, places, values).view(words.shape[0], cols)


def pack_sum(
    parts: Tensor, words: Tensor, offsets: Tensor, train_words: Tensor | None, out: Tensor
) -> Tensor:
    """Write the sum of ``parts``, (S, rows, cols), at the mask's entries to ``out``, (nnz,), and return it.

    Zero at entries that ``train_words``, a mask inside the first, lacks.
    """
    total = parts.sum(0)
    rows, cols = total.shape
    if train_words is not None:
        total = total * mask_bits(train_words)[:, :cols]
    return out.copy_(total.reshape(-1)[_places(words, cols, out.shape[0])])


def nonzero(flags: Tensor, count: int) -> Tensor:
    """Return the places of the ``count`` set ``flags``, (L,): (count,), int64, ascending.

    As the number is known, the host does not wait for the device.
    """
    if not count:
        return torch.empty(0, dtype=torch.int64, device=flags.device)
    return torch.nonzero_static(flags, size=count).squeeze(1)


def _places(words: Tensor, cols: int, count: int) -> Tensor:
    return nonzero(mask_bits(words)[:, :cols].reshape(-1), count)


def masked_lora_forward(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    values: Tensor,
    words: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    scale: float,
    seed: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what :func:`lora_forward` does of the b that ``values`` are the entries of.

    With no entry at all y is that of the base, and h, which nothing needs, is zero.
    Source: LoRI (arXiv:2504.07448), section 3; b as it is trained, not masked again.
    """
    if not values.shape[0]:
        return F.linear(x, w, bias), a.new_zeros(x.shape[0], a.shape[0]), None
    b = unpack_values(values, words, offsets, a.shape[0])
    return lora_forward(x, w, a, b, bias, scale, seed, dropout_p)


def masked_lora_backward(
    dy: Tensor,
    x: Tensor | None,
    w: Tensor | None,
    a: Tensor | None,
    values: Tensor,
    words: Tensor,
    offsets: Tensor,
    train_words: Tensor | None,
    train_offsets: Tensor | None,
    train_count: int,
    h: Tensor | None,
    mask: Tensor | None,
    scale: float,
    seed: Tensor | None,
    dropout_p: float,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return ``dx``, (M, K), ``da``, (R, K), and the gradient of ``values``, (nnz,); None unless needed.

    As :func:`lora_backward`, which see, with ``a`` for da too. The train mask, of ``train_count`` entries, is
    inside the first, or that if it is None; values outside it have a gradient of zero.
    """
    if not values.shape[0]:
        return (
            dy @ w if need_x else None,
            torch.zeros_like(a) if need_a else None,
            torch.zeros_like(values) if need_b else None,
        )
    trains = need_b and train_count > 0
    b = unpack_values(values, words, offsets, a.shape[0]) if need_x or need_a else None
    dx, da, db = lora_backward(dy, x, w, a, b, h, mask, scale, seed, dropout_p, need_x, need_a, trains)
    dvalues = torch.zeros_like(values) if need_b else None
    if trains:
        pack_sum(db[None], words, offsets, train_words, dvalues)
    return dx, da, dvalues

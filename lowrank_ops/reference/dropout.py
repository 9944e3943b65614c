"""The dropout mask: a function of one seed and the element."""

import torch
from torch import Tensor

__all__ = ["drop", "dropout_keep", "keep_threshold", "philox"]

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

    The mask depends on the seed and on the element alone. Columns 32 j to 32 j + 31 of row m are the bits
    of a word, and have 16 random bits each. The upper eight are an element's own: bit q of them is that of
    its column in word q % 4 of the Philox call at counter (2 j + q // 4, m). The lower eight, which decide
    only where the upper ones equal those of T, are shared by the word: the top byte of a Weyl sequence in
    j and m whose phase comes from the seed. So over seeds every element is dropped with probability
    T / 65536 exactly, and any two are correlated by at most 2⁻¹⁸ / (p (1 - p)), 4e-5 at p = 0.1.
    """
    threshold = keep_threshold(dropout_p)
    words = torch.arange((K + 31) // 32, device=seed.device)[None, :]
    rows = torch.arange(M, device=seed.device)[:, None]
    key = (seed ^ (seed >> 32)) & _LOW
    shared = (words * 0x9E3779B9 + rows * 0xBB67AE85 + key * 0xD2511F53 & _LOW) >> 24
    keep = -(shared >= threshold & 255).long()
    planes = [plane for i in range(2) for plane in philox(seed, 2 * words + i, rows)]
    for q, plane in enumerate(planes):
        # from the lowest bit up: kept where a bit is above T's, or equal and kept so far
        keep = plane & keep if threshold >> 8 + q & 1 else plane | keep
    columns = torch.arange(32, device=seed.device)
    return (keep[:, :, None] >> columns & 1).flatten(1)[:, :K] == 1


def drop(t: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    """Return ``t``, (M, K), with its dropped elements zero and the rest scaled by 1 / keep probability.

    No seed, no dropout.
    """
    if seed is None:
        return t
    keep = dropout_keep(seed, *t.shape, dropout_p)
    return torch.where(keep, t, 0) * (65536 / (65536 - keep_threshold(dropout_p)))

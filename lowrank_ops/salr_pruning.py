"""Magnitude pruning with exact counts, the residual of what was dropped, and how to know a weight again."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .salr_config import SALRConfig

__all__ = [
    "Cut",
    "checksum",
    "count_to_drop",
    "global_cuts",
    "layer_cut",
    "prune_weight",
    "residual_factors",
    "work_dtype",
]

_DIGIT = 16  # bits of a magnitude that one pass of the selection settles
_EXACT = 512  # the smaller side up to which "auto" takes the exact decomposition
_ROUNDS = 8  # of the subspace iteration
_MULTIPLIER = 0x9E3779B97F4A7C15 - 2**64  # the golden ratio's fraction, as a signed number


class Cut(NamedTuple):
    """What of a weight is dropped: magnitudes below ``threshold``, and the first ``ties`` that equal it."""

    threshold: float
    ties: int


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float32, or float64 for float64: in which a weight of ``dtype`` is measured and decomposed."""
    return torch.promote_types(dtype, torch.float32)


def count_to_drop(total: int, sparsity: float) -> int:
    """Return how many of ``total`` weights are dropped."""
    return round(total * sparsity)


def layer_cut(w: Tensor, config: SALRConfig) -> Cut:
    """Return the cut that drops exactly the share of ``w`` that the config asks for."""
    if config.structure == "2:4":
        return Cut(0.0, 0)
    threshold, ties = _select([w], count_to_drop(w.numel(), config.sparsity), work_dtype(w.dtype))
    return Cut(threshold, ties)


def global_cuts(weights: Mapping[str, Tensor], sparsity: float) -> dict[str, Cut]:
    """Return the cuts that drop exactly a share of all ``weights``; ties go in their order.

    Reads every weight three times, float64 ones five times, and holds one of them in float32 at a time.
    """
    total = sum(w.numel() for w in weights.values())
    dtype = torch.float32
    for w in weights.values():
        dtype = torch.promote_types(dtype, w.dtype)
    threshold, left = _select(weights.values(), count_to_drop(total, sparsity), dtype)
    cuts = {}
    for name, w in weights.items():
        ties = min(left, int((_magnitude(w, threshold) == threshold).sum()))
        cuts[name] = Cut(threshold, ties)
        left -= ties
    return cuts


def _select(weights: Iterable[Tensor], count: int, dtype: torch.dtype) -> tuple[float, int]:
    """Return the magnitude of rank ``count``, and how many that equal it are among the ``count`` smallest.

    Magnitudes compare as their bits do: a histogram of their first digit says which one the rank lies in, and
    so on, digit by digit. Integers only, so exact and the same on every device.
    """
    weights = list(weights)
    if not count:
        return 0.0, 0
    integers = torch.int64 if dtype is torch.float64 else torch.int32
    width = 64 if dtype is torch.float64 else 32
    prefix, left = 0, count
    for shift in range(width - _DIGIT, -1, -_DIGIT):
        histogram = torch.zeros(1 << _DIGIT, dtype=torch.int64)
        for w in weights:
            bits = w.detach().abs().to(dtype).flatten().view(integers)
            if shift < width - _DIGIT:
                bits = bits[(bits >> (shift + _DIGIT)) == prefix]
            digits = (bits >> shift) & ((1 << _DIGIT) - 1)
            histogram += torch.bincount(digits, minlength=1 << _DIGIT).cpu()
        ends = histogram.cumsum(0)
        digit = int(torch.searchsorted(ends, left))
        left -= int(ends[digit - 1]) if digit else 0
        prefix = prefix << _DIGIT | digit
    return torch.tensor(prefix, dtype=integers).view(dtype).item(), left


def prune_weight(w: Tensor, cut: Cut, structure: str) -> Tensor:
    """Return ``w`` with zeros for what is dropped, positive ones."""
    magnitude = _magnitude(w, cut.threshold)
    if structure == "2:4":
        dropped = _two_of_four(magnitude)
    else:
        dropped = magnitude < cut.threshold
        if cut.ties:
            equal = (magnitude == cut.threshold).flatten().nonzero().squeeze(1)
            dropped.view(-1)[equal[: cut.ties]] = True
    # -0.0 + 0.0 is 0.0
    return w.detach().masked_fill(dropped, 0.0) + 0.0


def _magnitude(w: Tensor, threshold: float) -> Tensor:
    """Return |w| in a dtype that holds ``threshold``: its own, unless another weight's has more digits."""
    magnitude = w.detach().abs()
    held = torch.tensor(threshold, dtype=w.dtype).item() == threshold
    return magnitude if held else magnitude.double()


def _two_of_four(magnitude: Tensor) -> Tensor:
    """Return the two smallest of each four columns, the first of equals; of the last few all but two."""
    N, K = magnitude.shape
    # what is beside the last column goes first
    groups = F.pad(magnitude, (0, -K % 4), value=-1.0).view(N, math.ceil(K / 4), 4)
    smallest = groups.argsort(dim=-1, stable=True)[..., :2]
    dropped = torch.zeros(groups.shape, dtype=torch.bool, device=magnitude.device)
    return dropped.scatter_(-1, smallest, True).flatten(1)[:, :K].contiguous()


def residual_factors(dropped: Tensor, q: int, svd: str) -> tuple[Tensor, Tensor]:
    """Return Ar (q, K) = √S Vᵀ and Br (N, q) = U √S of the truncated decomposition of ``dropped`` (N, K).

    Br Ar is the best approximation of rank q, or within a thousandth of its error for "randomized".
    q is at most the smaller side.
    """
    N, K = dropped.shape
    if not q:
        return dropped.new_zeros(0, K), dropped.new_zeros(N, 0)
    exact = svd == "exact" or (svd == "auto" and min(N, K) <= _EXACT)
    u, s, vh = torch.linalg.svd(dropped, full_matrices=False) if exact else _randomized_svd(dropped, q)
    root = s[:q].sqrt()
    return (root[:, None] * vh[:q]).contiguous(), (u[:, :q] * root).contiguous()


def _randomized_svd(e: Tensor, q: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular vectors and values of ``e`` (N, K): subspace iteration on 2 q + 8 vectors.

    Source: Halko, Martinsson, Tropp 2011 (arXiv:0909.4061), algorithms 4.4 and 5.1.
    """
    width = min(2 * q + 8, *e.shape)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(e.shape[1], width, generator=generator, dtype=e.dtype).to(e.device)
    columns = torch.linalg.qr(e @ start).Q  # (N, width)
    for _ in range(_ROUNDS):
        columns = torch.linalg.qr(e @ torch.linalg.qr(e.T @ columns).Q).Q
    rows, small = torch.linalg.qr(e.T @ columns)  # (K, width) and (width, width)
    u, s, vh = torch.linalg.svd(small.T)
    return columns @ u, s, vh @ rows.T


def checksum(w: Tensor) -> int:
    """Return 64 bits that tell the values of ``w`` (N, K) from others, in whichever dtype holds them."""
    dtype = work_dtype(w.dtype)
    columns, rows = (_multipliers(size, w.device) for size in (w.shape[1], w.shape[0]))
    total = 0
    chunk = max(1, (1 << 24) // max(w.shape[1], 1))
    for part, factors in zip(w.detach().split(chunk), rows.split(chunk), strict=True):
        bits = part.to(torch.float64 if dtype is torch.float64 else torch.float32).contiguous()
        words = bits.view(torch.int64 if dtype is torch.float64 else torch.int32).long()
        total += int(((words * columns).sum(1) * factors).sum())
    return (total + 2**63) % 2**64 - 2**63


def _multipliers(count: int, device: torch.device) -> Tensor:
    """Return odd 64-bit numbers, different for each place; integers wrap."""
    return (torch.arange(1, count + 1, device=device) * _MULTIPLIER) | 1

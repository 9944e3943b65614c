"""The entries of largest magnitude among those of many tensors, by a radix select on the bits of floats."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

__all__ = ["largest_entries"]

_DIGIT = 16  # bits a pass


def largest_entries(tensors: Mapping[str, Tensor], count: int) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor's name and a bool tensor of its shape: True at the ``count`` largest of all entries.

    Magnitudes are compared, exactly; at the last one equal entries are taken in the order of ``tensors``, and
    row by row inside one. Zeros are never taken: where fewer than ``count`` entries are not zero, those are.

    Magnitudes sort as their bits do. Each pass counts one digit of 16 bits of those that share all higher
    digits with the threshold; every tensor is read on its own device, three times in all, five if one is
    float64. Nothing is concatenated or sorted.

    Args:
        tensors: floating and finite; any shapes, devices and dtypes. Half-precision numbers are compared as
            float32, which holds them.
        count: at least 0.

    Memory: a few copies of one tensor, 2¹⁶ counts.
    """
    wide = torch.float64 if any(t.dtype is torch.float64 for t in tensors.values()) else torch.float32
    count = min(count, sum(int(t.count_nonzero()) for t in tensors.values()))
    threshold, ties = _threshold(tensors, count, wide) if count else (torch.iinfo(torch.int64).max, 0)
    for name, t in tensors.items():
        keys = _keys(t, wide)
        taken = keys > threshold
        equal = (keys == threshold).nonzero().squeeze(1)[:ties]
        taken[equal] = True
        ties -= len(equal)
        yield name, taken.view(t.shape)


def _threshold(tensors: Mapping[str, Tensor], count: int, wide: torch.dtype) -> tuple[int, int]:
    """Return the bits of the ``count``-th largest magnitude, and how many entries of it are taken."""
    prefix = 0
    for shift in range(8 * wide.itemsize - _DIGIT, -1, -_DIGIT):
        counts = torch.zeros(1 << _DIGIT, dtype=torch.int64)
        for t in tensors.values():
            keys = _keys(t, wide)
            # the first digit has none above it
            keys = keys[keys >> shift >> _DIGIT == prefix]
            counts += torch.bincount(keys >> shift & (1 << _DIGIT) - 1, minlength=1 << _DIGIT).cpu()
        above = counts.flip(0).cumsum(0).flip(0)  # entries of this digit or a larger one
        digit = int((above >= count).nonzero()[-1])
        count -= int(above[digit] - counts[digit])
        prefix = prefix << _DIGIT | digit
    return prefix, count


def _keys(t: Tensor, wide: torch.dtype) -> Tensor:
    bits = torch.int64 if wide is torch.float64 else torch.int32
    return t.detach().to(wide).abs().flatten().view(bits).long()

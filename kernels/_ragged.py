"""Ranks that are no multiple of 16, filled up with zeros where a pass over x or dy is long.

A row of h, dh or b then starts on 16 bytes; without, every element of it takes a load of its own, and a pass
costs up to five times as much.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

__all__ = ["cut_columns", "cut_rows", "filled_columns", "filled_rows", "is_ragged"]

_LONG = 2**22  # elements of x or dy


def is_ragged(ranks: Sequence[int], elements: int) -> bool:
    """Whether to fill up these ranks, for passes over an operand of this many elements."""
    return elements >= _LONG and any(rank % 16 for rank in ranks)


def filled_rows(a: Tensor | None) -> Tensor | None:
    """Return ``a``, (R, K) or None, with zeros below."""
    return a if a is None or a.shape[0] % 16 == 0 else F.pad(a, (0, 0, 0, -a.shape[0] % 16))


def filled_columns(t: Tensor | None, ranks: Sequence[int] | None = None) -> Tensor | None:
    """Return ``t``, (rows, sum of ranks) or None, with zeros beside those of each rank; one rank if None."""
    if t is None:
        return None
    if ranks is None or len(ranks) == 1:
        return F.pad(t, (0, -t.shape[1] % 16)) if t.shape[1] % 16 else t
    out = t.new_zeros(t.shape[0], sum(rank + -rank % 16 for rank in ranks))
    at = 0
    for part in t.split(list(ranks), 1):
        out[:, at : at + part.shape[1]] = part
        at += part.shape[1] + -part.shape[1] % 16
    return out


def cut_rows(grads: Sequence[Tensor | None], ranks: Sequence[int]) -> list[Tensor | None]:
    """Return the first rows of gradients of a, as many as the rank of each."""
    return [None if da is None else da[:rank] for da, rank in zip(grads, ranks, strict=True)]


def cut_columns(grads: Sequence[Tensor | None], ranks: Sequence[int]) -> list[Tensor | None]:
    """Return the first columns of gradients of b, as many as the rank of each."""
    return [None if db is None else db[:, :rank].contiguous() for db, rank in zip(grads, ranks, strict=True)]

"""A pruned weight kept compressed: its two encodings, and the layer that reads them.

``packed`` is what an encoder returned, in a list. The bitmap's: ``values`` (nnz,), entries in the order of
tiles of TILE x TILE (along K first), rows and columns; ``mask`` (N tiles, K tiles, TILE, 2) int32, whose bit
c % 32 of word c // 32 tells whether column c of a row of a tile is there; ``row_offset`` (N tiles, K tiles,
TILE) int16, where a row starts among the values of its tile; ``tile_start`` (tiles + 1,), where a tile does
among all. For 2:4: ``values`` (N, K' / 2), two of every four columns, K' = K rounded up to 16; ``index``
(N, K' / 16) int16, four bits a group: the column of its first entry, then that of its second.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .lora import lora_backward, lora_forward

__all__ = [
    "TILE",
    "bitmap_decode",
    "bitmap_encode",
    "pruned_backward",
    "pruned_decode",
    "pruned_matmul",
    "two_four_decode",
    "two_four_encode",
]

TILE = 64
# by the bits of a group, which are set: first column | second column << 2
_PAIRS = (4, 4, 4, 4, 8, 8, 9, 4, 12, 12, 13, 4, 14, 4, 4, 4)


def bitmap_encode(w: Tensor) -> list[Tensor]:
    """Return values, mask, row_offset and tile_start of ``w``, (N, K); what is equal to zero is left out."""
    tiles = _tiles(w)
    present = tiles != 0
    counts = present.sum(-1, dtype=torch.int32)
    row_offset = (counts.cumsum(-1) - counts).to(torch.int16)
    ends = counts.sum(-1).flatten().cumsum(0)
    tile_start = F.pad(ends, (1, 0))
    weights = (1 << torch.arange(32, device=w.device)).to(torch.int32)  # the last wraps to -2³¹
    words = (present.unflatten(-1, (2, 32)) * weights).sum(-1, dtype=torch.int32)
    few = w.numel() < 2**31 or int(ends[-1]) < 2**31
    return [tiles[present], words, row_offset, tile_start.to(torch.int32 if few else torch.int64)]


def bitmap_decode(
    values: Tensor, mask: Tensor, row_offset: Tensor, tile_start: Tensor, N: int, K: int
) -> Tensor:
    """Return the dense (N, K) that :func:`bitmap_encode` was given."""
    shifts = torch.arange(32, dtype=torch.int32, device=mask.device)
    present = ((mask[..., None] >> shifts) & 1).bool().flatten(-2)
    tiles = values.new_zeros(present.shape).masked_scatter(present, values)
    return tiles.transpose(1, 2).flatten(2).flatten(0, 1)[:N, :K].contiguous()


def two_four_encode(w: Tensor, lost: Tensor | None = None) -> list[Tensor]:
    """Return values and index of ``w``, (N, K).

    Of more than two entries in a group some are left out: their number is added to ``lost``, () int64.
    """
    padded = F.pad(w, (0, -w.shape[1] % 16))
    groups = padded.view(w.shape[0], padded.shape[1] // 4, 4)
    present = groups != 0
    if lost is not None:
        lost += (present.sum(-1) - 2).clamp_(min=0).sum()
    bits = (present * (1 << torch.arange(4, device=w.device))).sum(-1)
    pairs = torch.tensor(_PAIRS, dtype=torch.int64, device=w.device)[bits]
    columns = torch.stack([pairs & 3, pairs >> 2], -1)
    zero = torch.zeros((), dtype=w.dtype, device=w.device)
    values = torch.where(present, groups, zero).gather(-1, columns).flatten(1)
    shifts = torch.arange(0, 16, 4, device=w.device)
    # the last group's second column may set the sign
    return [values, (pairs.view(w.shape[0], padded.shape[1] // 16, 4) << shifts).sum(-1).to(torch.int16)]


def two_four_decode(values: Tensor, index: Tensor, N: int, K: int) -> Tensor:
    """Return the dense (N, K) that :func:`two_four_encode` was given."""
    shifts = torch.arange(0, 16, 2, device=index.device)
    columns = ((index[..., None].long() >> shifts) & 3).view(N, values.shape[1] // 2, 2)
    groups = values.new_zeros(N, columns.shape[1], 4)
    return groups.scatter(-1, columns, values.view(columns.shape)).flatten(1)[:, :K].contiguous()


def pruned_decode(packed: list[Tensor], N: int, K: int) -> Tensor:
    """Return the dense weight, (N, K), of either encoding."""
    return (bitmap_decode if len(packed) == 4 else two_four_decode)(*packed, N, K)


def pruned_matmul(
    x: Tensor,
    packed: list[Tensor],
    N: int,
    a: Tensor | None,
    b: Tensor | None,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor | None]:
    """Return ``y = x wᵀ + h bᵀ + bias``, (M, N), and ``h = scale · x aᵀ``, (M, R), None without a."""
    w = pruned_decode(packed, N, x.shape[1])
    if a is None:
        return F.linear(x, w, bias), None
    return lora_forward(x, w, a, b, bias, scale, None, 0.0)[:2]


def pruned_backward(
    dy: Tensor,
    x: Tensor | None,
    packed: list[Tensor],
    K: int,
    a: Tensor | None,
    b: Tensor | None,
    h: Tensor | None,
    scale: float,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return ``dx``, (M, K), ``da``, (R, K), and ``db``, (N, R), each None unless needed.

    dx needs packed, and a and b where there is an adapter; da needs x and b; db needs h: what is not needed
    may be None, packed an empty list.
    """
    w = pruned_decode(packed, dy.shape[1], K) if need_x else None
    if b is None and h is None:
        return dy @ w if need_x else None, None, None
    return lora_backward(dy, x, w, a, b, h, None, scale, None, 0.0, need_x, need_a, need_b)


def _tiles(w: Tensor) -> Tensor:
    """Return ``w`` padded with zeros, as (N tiles, K tiles, TILE, TILE)."""
    N, K = w.shape
    padded = F.pad(w, (0, -K % TILE, 0, -N % TILE))
    N, K = padded.shape
    return padded.view(N // TILE, TILE, K // TILE, TILE).transpose(1, 2)

"""Distances to the nearest neighbours."""

import torch
from torch import Tensor

__all__ = ["nearest_neighbors"]


def nearest_neighbors(points: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distances from each of ``points``, (M, K), to its nearest and second nearest other, (M,).

    By differences, so that near-duplicates lose nothing; float32, or float64 for float64 points. M ≥ 3.
    Memory: a copy of the points, and blocks of 2²⁴ distances.
    """
    points, M = points.to(torch.promote_types(points.dtype, torch.float32)), points.shape[0]
    # coordinates near 1, by a power of two: else squares of very large or small ones leave float32
    _, exponent = torch.frexp(points.abs().max())
    exponent = exponent.clamp(-126, 126)
    points = torch.ldexp(points, -exponent)
    nearest = []
    for rows in torch.arange(M, device=points.device).split(max(1, 2**24 // M)):
        block = torch.cdist(points[rows], points, compute_mode="donot_use_mm_for_euclid_dist")
        block[torch.arange(rows.numel(), device=rows.device), rows] = torch.inf
        nearest.append(block.topk(2, dim=1, largest=False).values)
    first, second = torch.ldexp(torch.cat(nearest), exponent).unbind(1)
    return first, second

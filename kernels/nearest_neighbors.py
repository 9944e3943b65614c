"""Distances to the two nearest neighbours of every point: screened on tensor cores, then measured exactly."""

import math

import torch
from torch import Tensor

from ._config import device_facts
from ._exact_neighbors import measure_candidates, search_all
from ._screen_neighbors import pick_screen, round_points, screen


def _centre(points: Tensor) -> tuple[Tensor, float]:
    """Return a centre, (K,) float32, and a power of two that brings all coordinates around it below 256."""
    low, high = (bound.float() for bound in torch.aminmax(points, dim=0))
    centre = points.mean(0, dtype=torch.float32)
    # any centre will do, and the sum behind a mean may overflow
    centre = torch.where(centre.isfinite(), centre, low / 2 + high / 2)
    largest = torch.maximum(high.double() - centre, centre - low.double()).max().item()
    # float32 holds powers up to 127; the centre is rounded, so a margin of two is left
    return centre, 2.0 ** max(-126, min(126, 7 - math.frexp(largest)[1])) if largest > 0 else 1.0


def nearest_neighbors(points: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distances from each of ``points``, (M, K), to its nearest and second nearest other.

    Distances are (M,), float32, with a relative error below 2⁻¹⁶ for K up to 16,384 whatever the points are:
    near-duplicates far from the origin lose nothing. Tensor cores only rank candidates, in float16
    around the mean, eight of each share of the points. A point's candidates are measured by differences, the
    nearest first, until a bound on what rounding could have hidden says that no other is nearer. Points whose
    candidates do not suffice, few unless they lie in dense clusters, are compared with all points by
    differences, at many times the cost. Waits for the device twice. Two runs give the same bits.

    Memory: 2 M·K bytes, and 64 bytes a point and share, of which there are fewer the more points there are.
    Source: the bound is derived in ``_exact_neighbors._is_beyond``.
    """
    facts = device_facts(points.device)
    config = pick_screen(facts.arch)
    centre, factor = _centre(points)
    M = points.shape[0]
    rounded, square, error = round_points(points, centre, factor, config)
    keys = screen(rounded, square, M, config, facts)
    first, second, certain = measure_candidates(points, keys, square, error, rounded.shape[1], config, factor)
    rows = (~certain).nonzero().flatten()
    if rows.numel():
        first[rows], second[rows] = search_all(points, rows, factor, facts)
    return first / factor, second / factor

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


def _is_certain(keys: Tensor, second: Tensor, square: Tensor, error: Tensor, depth: int) -> Tensor:
    """Return whether nothing outside the candidates can be nearer than ``second``, (M,) bool.

    Let q be a rounded point, e what rounding took, t = second. A point j nearer than t has
    |q_j| <= near := |q| + t + e, and rounding took at most e_j <= 2⁻¹¹ near + 2⁻²⁵ √K of it. Its computed
    squared distance is off by the sums' errors: of q·q_j, each step of 16 products may lose 2⁻²⁰ |q| near on
    tensor cores, which truncate. So if the squared distances of the candidates end at D, then j is one of
    them, unless √(D - loss) < t + e + e_j.
    """
    last = (keys[:, -1] >> 32).to(torch.int32).view(torch.float32).double()
    second, length = second.double(), square.double().sqrt()
    # float32 rounds a centred point too, before float16 does
    error = error.double() + 2**-23 * length
    near = length + second + error
    loss = 2 * (depth / 16) * 2**-20 * length * near + 2**-18 * (length**2 + near**2)
    error_other = 2**-11 * near + 2**-25 * depth**0.5
    reach = (last - loss).clamp_min(0).sqrt() - error - error_other
    # the last factor is for the rounding of second itself
    return (reach >= second * (1 + 2**-16)) | (second == 0)


def nearest_neighbors(points: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distances from each of ``points``, (M, K), to its nearest and second nearest other.

    Distances are (M,), float32, with a relative error below 2⁻¹⁶ for K up to 16,384 whatever the points are:
    near-duplicates far from the origin lose nothing. Tensor cores only choose eight candidates a point, in
    float16 around the mean; these are measured by differences, and a bound on what rounding could have hidden
    says for which points a ninth might be nearer. Those, few unless they lie in dense clusters, are compared
    with all points by differences, at many times the cost. Waits for the device twice. Two runs give the same
    bits.

    Memory: 2 M·K bytes, and 64 bytes a point and share of at most 8 per multiprocessor.
    Source: the bound is derived in ``_is_certain``.
    """
    facts = device_facts(points.device)
    config = pick_screen(facts.arch)
    centre, factor = _centre(points)
    M = points.shape[0]
    rounded, square, error = round_points(points, centre, factor, config)
    keys = screen(rounded, square, M, config, facts)
    first, second = measure_candidates(points, keys, factor)
    certain = _is_certain(keys, second, square[:M], error[:M], rounded.shape[1])
    rows = (~certain).nonzero().flatten()
    if rows.numel():
        first[rows], second[rows] = search_all(points, rows, factor, facts)
    return first / factor, second / factor

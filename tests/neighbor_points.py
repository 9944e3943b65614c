"""Point sets that are hard on a search for neighbours, and the criterion that every search must meet."""

import torch
from torch import Tensor

from lowrank_ops import reference

__all__ = ["SETS", "assert_exact", "make_points"]

SETS = ["gaussian", "near_duplicates", "far_cluster", "tight_clusters", "duplicates", "line", "huge", "tiny"]


def make_points(name: str, M: int, K: int, device: str = "cpu") -> Tensor:
    """Return (M, K) float32 points; M at least 40."""
    generator = torch.Generator().manual_seed(M + K)
    points = torch.randn(M, K, generator=generator)
    if name == "near_duplicates":
        points[: M // 4] = points[M // 4 : 2 * (M // 4)] + 1e-5 * points[: M // 4]
        points += 1000
    elif name == "far_cluster":
        points = 1e-4 * points + 100 * torch.randn(1, K, generator=generator)
    elif name == "tight_clusters":
        # more points lie closer together than screening keeps, or can tell apart
        points = 1e-5 * points + torch.randn(4, K, generator=generator)[torch.arange(M) % 4]
    elif name == "duplicates":
        points[: M // 4] = points[M // 4 : 2 * (M // 4)]
        points[-20:] = points[0]
    elif name == "line":
        points = torch.rand(M, 1, generator=generator) * torch.ones(1, K)
    elif name in ("huge", "tiny"):
        points *= 1e30 if name == "huge" else 1e-30
    return points.to(device)


def assert_exact(found: tuple[Tensor, Tensor], points: Tensor) -> None:
    """Fail unless both distances are within a relative 2⁻¹⁶ of float64 differences of ``points``."""
    truth = reference.nearest_neighbors(points.double())
    for name, got, true in zip(("first", "second"), found, truth, strict=True):
        assert got.dtype == torch.float32
        assert got.shape == (len(points),)
        worst = ((got.double() - true).abs() - 2**-16 * true).max().item()
        assert worst <= 0, f"{name}: {worst} too far from float64"

"""The accuracy criterion that the tests and the benchmarks' gate share."""

import torch
from torch import Tensor

__all__ = ["assert_as_accurate", "error_ratio"]


def error_ratio(actual: Tensor, baseline: Tensor, truth: Tensor) -> float:
    """Return how many times further from ``truth`` than stock PyTorch ``actual`` lies, dimensionless.

    Both errors are largest absolute errors; the baseline's is at least one unit of rounding of the
    largest entry, so that a lucky baseline does not ask for the impossible. NaN or infinity in
    ``actual`` where ``truth`` is finite gives ``inf``. Empty tensors give 0.

    Args:
        actual: what is judged, any shape and floating dtype.
        baseline: the same in unfused PyTorch, dtype of ``actual``.
        truth: the same in float64.
    """
    if actual.numel() == 0:
        return 0.0
    truth = truth.double()
    error = (actual.double() - truth).abs().max()
    floor = torch.finfo(actual.dtype).eps * truth.abs().max()
    allowed = torch.maximum((baseline.double() - truth).abs().max(), floor)
    if error == 0:
        return 0.0
    ratio = (error / allowed).item()
    return ratio if ratio == ratio else float("inf")


def assert_as_accurate(actual: Tensor, baseline: Tensor, truth: Tensor, factor: float = 1.5) -> None:
    """Fail if ``actual`` is over ``factor`` times as far from ``truth`` as stock PyTorch in its dtype."""
    if actual.shape != truth.shape or actual.dtype != baseline.dtype:
        raise AssertionError(
            f"expected {tuple(truth.shape)} {baseline.dtype}, got {tuple(actual.shape)} {actual.dtype}"
        )
    ratio = error_ratio(actual, baseline, truth)
    if not ratio <= factor:
        raise AssertionError(
            f"max error is {ratio:.2f} x that of stock PyTorch in {actual.dtype}, allowed {factor}"
        )

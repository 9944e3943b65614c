"""The accuracy gate: who is less accurate than unfused PyTorch in the same dtype is not timed."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from lowrank_ops.testing import error_ratio

from .case import Case, Cell, Layer, Provider
from .step_case import StepCase, StepCell

__all__ = ["FACTOR", "Gate", "outputs", "rms_ratio", "verdict"]

FACTOR = 1.5
_SEED = 20_000


def outputs(
    forward: Callable[[], Tensor], leaves: Mapping[str, Tensor], dy: Tensor, forward_only: bool
) -> dict[str, Tensor]:
    """Run one pass and return ``y`` and, unless ``forward_only``, the gradients ``dx``, ``da``, …"""
    if forward_only:
        with torch.no_grad():
            return {"y": Layer.joined(forward())}
    y = forward()
    whole = Layer.joined(y)
    gradients = torch.autograd.grad(y, list(leaves.values()), Layer.gradients(y, dy.to(whole.dtype)))
    return {"y": whole.detach(), **{f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}}


@contextmanager
def poisoned(enabled: bool) -> Iterator[None]:
    """Have PyTorch fill memory that it hands out uninitialised with NaN, so that unwritten outputs show."""
    before = torch.are_deterministic_algorithms_enabled()
    before_warn = torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if enabled:
            torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=before_warn)


def rms_ratio(actual: Tensor, baseline: Tensor, truth: Tensor) -> float:
    """Return the root mean square error of ``actual`` over that of ``baseline``, dimensionless.

    For the end of a long chain of roundings, where the largest error is a matter of chance and the mean
    is not. The baseline's error counts as at least a quarter unit of rounding, what one rounding loses.
    NaN or infinity in ``actual`` gives ``inf``.
    """
    truth = truth.double()
    floor = torch.finfo(actual.dtype).eps / 4 * truth.square().mean().sqrt()
    error, allowed = ((t.double() - truth).square().mean().sqrt() for t in (actual, baseline))
    if error == 0:
        return 0.0
    ratio = (error / torch.maximum(allowed, floor)).item()
    return ratio if ratio == ratio else float("inf")


def verdict(ratios: dict[str, float]) -> dict[str, object]:
    """Return the columns of a row that follow from ``Gate.judge``: gate, and where that is over, why."""
    name, worst = max(ratios.items(), key=lambda item: item[1], default=("", 0.0))
    columns = {"gate": {key: ratio if ratio < float("inf") else None for key, ratio in ratios.items()}}
    if worst <= FACTOR:
        return columns
    reason = f"error of {name} is {worst:.2f} x that of unfused PyTorch, at most {FACTOR} passes"
    return columns | {"status": "wrong", "reason": reason}


class Gate:
    """Judges providers of one cell on one set of inputs.

    Truth and baseline are ``case.baseline`` in ``case.exact`` and in the cell's dtype, made once for each
    mask: with dropout, a provider whose mask can be reproduced is judged under it, any other without dropout.
    Of a layer the largest errors are compared, of a training step the root mean squares.
    """

    def __init__(self, case: Case | StepCase, cell: Cell | StepCell, tensors: dict[str, Tensor]):
        self.case, self.cell, self.tensors = case, cell, tensors
        self._known: dict[float, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}

    def _expected(self, cell: Cell | StepCell) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if cell.dropout_p not in self._known:
            results = []
            for dtype in (None, self.case.exact):
                # a cast to the dtype that it has returns the tensor itself
                tensors = {
                    name: t.detach().to(dtype or t.dtype).requires_grad_(t.requires_grad)
                    for name, t in self.tensors.items()
                }
                layer = self.case.baseline(cell, tensors)
                torch.manual_seed(_SEED)
                results.append(outputs(layer.forward, layer.leaves, tensors["dy"], cell.forward_only))
            self._known[cell.dropout_p] = results[0], results[1]
        return self._known[cell.dropout_p]

    def cell_of(self, provider: Provider) -> Cell | StepCell:
        """Return the cell that a provider is judged at: its own, or that without dropout."""
        return self.cell if provider.same_mask else replace(self.cell, dropout_p=0.0)

    def judge(self, provider: Provider, layer: Layer | None = None) -> dict[str, float]:
        """Return the error of each output over that of unfused PyTorch, both against the truth, by name.

        ``inf`` for NaN, a wrong shape or a wrong dtype of y. At most ``FACTOR`` passes.

        Args:
            layer: what ``provider`` built for ``cell_of(provider)``; None to have it built.
        """
        cell = self.cell_of(provider)
        baseline, truth = self._expected(cell)
        layer = layer or provider.build(cell, self.tensors)
        torch.manual_seed(_SEED)
        with poisoned(provider.poison):
            actual = outputs(layer.forward, layer.leaves, self.tensors["dy"], cell.forward_only)
        if actual["y"].dtype != self.cell.dtype:
            return {"y": float("inf")}
        measure = rms_ratio if self.case.kind == "step" else error_ratio
        fits = {name: t.shape == truth[name].shape for name, t in actual.items()}
        return {
            name: measure(t, baseline[name], truth[name]) if fits[name] else float("inf")
            for name, t in actual.items()
        }

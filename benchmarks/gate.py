"""The accuracy gate: who is less accurate than unfused PyTorch in the same dtype is not timed."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from lowrank_ops.testing import error_ratio

from .case import Case, Cell, Provider

__all__ = ["FACTOR", "Gate", "outputs"]

FACTOR = 1.5
_SEED = 20_000


def outputs(
    forward: Callable[[], Tensor], leaves: Mapping[str, Tensor], dy: Tensor, forward_only: bool
) -> dict[str, Tensor]:
    """Run one pass and return ``y`` and, unless ``forward_only``, the gradients ``dx``, ``da``, …"""
    if forward_only:
        with torch.no_grad():
            return {"y": forward()}
    y = forward()
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach(), **{f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}}


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


class Gate:
    """Judges providers of one cell on one set of inputs.

    Truth and baseline are ``Case.expected`` in float64 and in the cell's dtype, made once for each mask:
    with dropout, a provider whose mask can be reproduced is judged under it, any other without dropout.
    """

    def __init__(self, case: Case, cell: Cell, tensors: dict[str, Tensor]):
        self.case, self.cell, self.tensors = case, cell, tensors
        self._known: dict[float, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}

    def _expected(self, cell: Cell) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if cell.dropout_p not in self._known:
            results = []
            for exact in (False, True):
                tensors = {
                    name: (t.detach().double() if exact else t.detach()).requires_grad_(t.requires_grad)
                    for name, t in self.tensors.items()
                }
                leaves = {name: tensors[name] for name in self.case.leaves}
                torch.manual_seed(_SEED)
                results.append(
                    outputs(
                        lambda tensors=tensors: self.case.expected(cell, tensors),
                        leaves,
                        tensors["dy"],
                        cell.forward_only,
                    )
                )
            self._known[cell.dropout_p] = results[0], results[1]
        return self._known[cell.dropout_p]

    def judge(self, provider: Provider) -> dict[str, float]:
        """Return the error of each output over that of unfused PyTorch, both against float64, by name.

        ``inf`` for NaN, a wrong shape or a wrong dtype of y. At most ``FACTOR`` passes.
        """
        cell = self.cell if provider.same_mask else replace(self.cell, dropout_p=0.0)
        baseline, truth = self._expected(cell)
        layer = provider.build(cell, self.tensors)
        torch.manual_seed(_SEED)
        with poisoned(provider.poison):
            actual = outputs(layer.forward, layer.leaves, self.tensors["dy"], cell.forward_only)
        if actual["y"].dtype != self.cell.dtype:
            return {"y": float("inf")}
        fits = {name: t.shape == truth[name].shape for name, t in actual.items()}
        return {
            name: error_ratio(t, baseline[name], truth[name]) if fits[name] else float("inf")
            for name, t in actual.items()
        }

"""What a benchmark of whole training steps declares, beside what it shares with that of one layer."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .case import Layer, Provider, dtype_name, find_provider

__all__ = ["StepCase", "StepCell", "StepProvider"]


@dataclass(frozen=True)
class StepCell:
    """One measured situation: ``batch`` sequences of ``length`` tokens through ``model``, rank R."""

    shape: str
    model: str
    batch: int
    length: int
    R: int
    dropout_p: float
    dtype: torch.dtype
    device: str

    forward_only: ClassVar[bool] = False

    @property
    def M(self) -> int:
        """Tokens of the step."""
        return self.batch * self.length

    def as_row(self) -> dict[str, object]:
        """Return the fields as JSON values; two cells are the same where these are."""
        row = asdict(self) | {"M": self.M, "dtype": dtype_name(self.dtype)}
        del row["device"]
        return row


@dataclass(frozen=True)
class StepProvider(Provider):
    """One implementation of a step. ``compiled``: by torch.compile, which takes far longer than the step."""

    compiled: bool = False


@dataclass(frozen=True)
class StepCase:
    """A benchmark of training steps: one file in ``benchmarks/cases/`` that ends in ``CASE = StepCase(...)``.

    Args:
        name: the file's name.
        floor, compiled_floor: names of the providers that ratios are taken to: of all, of the compiled ones.
        model, quick_model: names of the sizes of the model, and of sizes small enough for a CPU.
        shapes, quick_shapes: (batch, length) by name, most important first.
        ranks, dropouts, seconds: what the command line leaves open; seconds is the budget of the run.
        providers: in the order of the table's columns, the floor first.
        make_inputs: by name "x", "dy" and all that the model holds, from a generator on the cell's device.
        baseline: the model in stock PyTorch, in the dtype of its inputs: in ``exact`` the truth, in that of
            the cell what errors are measured against. With dropout, under the mask of lowrank_ops.
        exact: dtype of the truth; float32 where float64 would not fit.
    """

    name: str
    floor: str
    compiled_floor: str
    model: str
    quick_model: str
    shapes: Mapping[str, tuple[int, int]]
    quick_shapes: Mapping[str, tuple[int, int]]
    ranks: tuple[int, ...]
    dropouts: tuple[float, ...]
    seconds: float
    providers: tuple[StepProvider, ...]
    make_inputs: Callable[[StepCell, torch.Generator], dict[str, Tensor]]
    baseline: Callable[[StepCell, dict[str, Tensor]], Layer]
    exact: torch.dtype = torch.float32

    kind: ClassVar[str] = "step"

    def provider(self, name: str) -> StepProvider:
        """Return a provider by name."""
        return find_provider(self.name, self.providers, name)

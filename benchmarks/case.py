"""What a benchmark case declares: its cells, its providers, and the work that none of them can avoid."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["Case", "Cell", "Layer", "Provider", "Work", "dtype_name", "find_provider"]


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Cell:
    """One measured situation: M tokens through a layer of in_features K, out_features N and rank R."""

    shape: str
    M: int
    N: int
    K: int
    R: int
    dropout_p: float
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    device: str

    @property
    def forward_only(self) -> bool:
        """One token is inference: there is no backward pass to time."""
        return self.M == 1

    def as_row(self) -> dict[str, object]:
        """Return the fields as JSON values; two cells are the same where these are."""
        row = asdict(self)
        del row["device"]
        return row | {key: dtype_name(row[key]) for key in ("dtype", "adapter_dtype")}


@dataclass(frozen=True, eq=False)
class Layer:
    """A provider bound to one set of inputs.

    ``forward()`` gives y, or several in a tuple, whose gradients then lie in ``dy`` one after the other.
    ``leaves`` are the tensors whose gradients are asked for, keyed by letter, in the order of
    ``Case.leaves``: their gradients are compared by that letter.
    """

    forward: Callable[[], Tensor | tuple[Tensor, ...]]
    leaves: Mapping[str, Tensor]

    @staticmethod
    def gradients(y: Tensor | tuple[Tensor, ...], dy: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return ``dy`` as views of the shapes of ``y``."""
        if isinstance(y, Tensor):
            return dy
        parts = dy.split([t.numel() for t in y])
        return tuple(part.view_as(t) for part, t in zip(parts, y, strict=True))

    @staticmethod
    def joined(y: Tensor | tuple[Tensor, ...]) -> Tensor:
        """Return ``y`` as one tensor."""
        return y if isinstance(y, Tensor) else torch.cat([t.flatten() for t in y])


@dataclass(frozen=True)
class Provider:
    """One implementation of a case.

    Args:
        name: as in tables and on the command line.
        build: binds the provider to the inputs that ``Case.make_inputs`` made; copies none of the large ones.
        same_mask: its dropout mask is the one of ``Case.expected`` under the same seed of torch's generator,
            so that it can be gated with dropout; others are gated without.
        poison: its uninitialised outputs are filled with NaN before gating.
        judged: whether it is gated. Not, if it computes another function and is there for its time alone.
        by_default: whether it takes part in a cell when the command line names no providers.
    """

    name: str
    build: Callable[[Cell, dict[str, Tensor]], Layer]
    same_mask: bool = False
    poison: bool = True
    judged: bool = True
    by_default: Callable[[Cell], bool] = lambda cell: True


@dataclass(frozen=True)
class Work:
    """What any implementation must do: bytes of device memory to move, floating-point operations."""

    bytes: float
    flops: float


@dataclass(frozen=True)
class Case:
    """A benchmark: one file in ``benchmarks/cases/`` that ends in ``CASE = Case(...)``.

    Args:
        name: the file's name.
        floor: name of the provider that all ratios are taken to.
        shapes: (N, K) of each layer by name, most important first.
        quick_shapes: the same, small enough for a CPU.
        leaves: letters of the inputs that train, a subset of what ``make_inputs`` gives.
        providers: in the order of the table's columns, the floor first.
        make_inputs: inputs of a cell by letter, ``dy`` among them, from a generator on the cell's device.
        expected: the definition in stock PyTorch, differentiable: in float64 the truth, in the cell's dtype
            the baseline that errors are measured against.
        work: least work of a cell, keyed "fwd" and "bwd".
        tokens, dropouts: what is measured by default, where it is not what other cases measure.
    """

    name: str
    floor: str
    shapes: Mapping[str, tuple[int, int]]
    quick_shapes: Mapping[str, tuple[int, int]]
    leaves: tuple[str, ...]
    providers: tuple[Provider, ...]
    make_inputs: Callable[[Cell, torch.Generator], dict[str, Tensor]]
    expected: Callable[[Cell, dict[str, Tensor]], Tensor]
    work: Callable[[Cell], dict[str, Work]]
    tokens: tuple[int, ...] | None = None
    dropouts: tuple[float, ...] | None = None

    kind: ClassVar[str] = "layer"
    exact: ClassVar[torch.dtype] = torch.float64

    def baseline(self, cell: Cell, tensors: dict[str, Tensor]) -> Layer:
        """Return the definition as a layer, in the dtype of ``tensors``."""
        leaves = {name: tensors[name] for name in self.leaves}
        return Layer(lambda: self.expected(cell, tensors), leaves)

    def provider(self, name: str) -> Provider:
        """Return a provider by name."""
        return find_provider(self.name, self.providers, name)


def find_provider(case: str, providers: Sequence[Provider], name: str) -> Provider:
    """Return the provider of ``case`` with this name.

    Raises:
        ValueError: there is none.
    """
    for provider in providers:
        if provider.name == name:
            return provider
    known = ", ".join(provider.name for provider in providers)
    raise ValueError(f"{case}: provider must be one of {known}, got {name}")

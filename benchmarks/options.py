"""What a run is asked to do."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .case import Case, dtype_name
from .step_case import StepCase

__all__ = ["Options", "chosen_shapes"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line decides. ``None`` stands for the case's own choice."""

    device: str = "cuda"
    shapes: tuple[str, ...] | None = None
    ranks: tuple[int, ...] = (16, 64, 8)
    tokens: tuple[int, ...] = (8192, 2048, 512, 1)
    dropouts: tuple[float, ...] = (0.0, 0.1)
    dtype: torch.dtype = torch.bfloat16
    adapter_dtype: torch.dtype | None = None
    impl: str | None = None
    providers: tuple[str, ...] | None = None
    out: Path = Path("benchmarks/results")
    seconds: float = 480.0
    quick: bool = False
    resume: Path | None = None
    commit: str | None = None

    def as_json(self, case: Case | StepCase) -> dict[str, object]:
        """Return the options that decide what is measured."""
        shared = {"ranks": self.ranks, "dropouts": self.dropouts, "dtype": dtype_name(self.dtype)}
        if isinstance(case, StepCase):
            return shared | {"shapes": list(chosen_shapes(case, self)), "quick": self.quick}
        adapter_dtype = dtype_name(self.adapter_dtype or self.dtype)
        return shared | {"tokens": self.tokens, "adapter_dtype": adapter_dtype, "quick": self.quick}


def chosen_shapes(case: Case | StepCase, options: Options) -> Mapping[str, tuple[int, int]]:
    """Return the shapes of a run by name: (N, K) of layers, (batch, length) of training steps.

    A shape that the case does not name is spelled KxN or BATCHxLENGTH.

    Raises:
        ValueError: no such shape.
    """
    known = case.quick_shapes if options.quick and options.device == "cpu" else case.shapes
    if options.shapes is None:
        return dict(list(known.items())[:1]) if options.quick and options.device == "cuda" else dict(known)
    spelled = "BATCHxLENGTH" if isinstance(case, StepCase) else "KxN"
    chosen = {}
    for name in options.shapes:
        custom = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name)
        if name in known:
            chosen[name] = known[name]
        elif custom:
            first, second = int(custom[1]), int(custom[2])
            chosen[name] = (first, second) if isinstance(case, StepCase) else (second, first)
        else:
            raise ValueError(f"benchmarks: shape must be one of {', '.join(known)} or {spelled}, got {name}")
    return chosen

"""Options of SALOR: how much of A and B is pruned while training, in which shapes, by what, and when."""

from collections.abc import Collection
from dataclasses import dataclass
from numbers import Integral
from typing import ClassVar

from .config import MethodConfig, _canonical_number, _check_number

__all__ = ["SALORConfig"]

_CHOICES = {
    "structure": ("unstructured", "2:4", "blocks", "rank"),
    "score": ("magnitude", "magnitude_gradient"),
}
# of A and of B, where the user names none
_SPARSITIES = {"unstructured": (0.5, 0.9), "blocks": (0.5, 0.9), "2:4": (0.5, 0.5), "rank": (0.5, 0.5)}
_BLOCK = 16


@dataclass(frozen=True)
class SALORConfig(MethodConfig):
    """Options of SALOR: a LoRA whose A and B lose their least entries while they train.

    ``inject`` makes dense factors; ``salor.PruningSchedule`` prunes them, along a cubic from nothing at the
    end of the warm-up to the full sparsities at ``end_ratio``; ``salor.compact`` makes the rest small.

    Args:
        r, lora_alpha, lora_dropout, target_modules: as in ``LoRAConfig``.
        sparsity_a: share of the units of all A together that is pruned in the end, in [0, 1). None is 0.5.
        sparsity_b: the same for B, ranked by itself: the two have different scales. None is 0.9, or 0.5 with
            "2:4" and "rank".
        structure: what is pruned as one unit. "unstructured": an entry. "2:4": an entry, two of every four
            neighbours along K of A and along R of B stay; both sparsities are 0.5 and r is a multiple of 4.
            "blocks": 16 x 16 entries; r is at least 16. "rank": a row of A with its column of B, which leaves
            a dense LoRA of smaller ranks; both sparsities are equal.
        score: what ranks entries: "magnitude" |θ|, or "magnitude_gradient", a running mean of |θ · ∂loss/∂θ|.
            A block counts by its mean, a component of the rank by the product of the norms of row and column.
        warmup_ratio: share of the steps before the first pruning, in [0.1, end_ratio): B starts at zero, and
            tells nothing before it has trained.
        end_ratio: share of the steps after which the masks stay, at most 1.
        every: steps between two prunings.
        total_steps: optimizer steps of the whole run; may be given to the schedule instead.

    Raises:
        ValueError: a value is out of range, or does not go with another. TypeError: one has the wrong type.

    Source: no paper; the cubic is that of Zhu and Gupta 2017 (arXiv:1710.01878).
    """

    sparsity_a: float | None = None
    sparsity_b: float | None = None
    structure: str = "unstructured"
    score: str = "magnitude"
    warmup_ratio: float = 0.1
    end_ratio: float = 0.7
    every: int = 100
    total_steps: int | None = None

    method: ClassVar[str] = "salor"

    def __post_init__(self) -> None:
        super().__post_init__()
        op = type(self).__name__
        _check_choices(op, self, _CHOICES)
        for name, default in zip(("sparsity_a", "sparsity_b"), _SPARSITIES[self.structure], strict=True):
            value = default if getattr(self, name) is None else getattr(self, name)
            _check_number(op, name, value)
            if not 0 <= value < 1:
                raise ValueError(f"{op}: {name} must be in [0, 1), got {value}")
            object.__setattr__(self, name, _canonical_number(value))
        for name in ("warmup_ratio", "end_ratio"):
            _check_number(op, name, getattr(self, name))
            object.__setattr__(self, name, _canonical_number(getattr(self, name)))
        if not 0.1 <= self.warmup_ratio < self.end_ratio <= 1:
            raise ValueError(
                f"{op}: warmup_ratio and end_ratio must be 0.1 <= warmup_ratio < end_ratio <= 1, "
                f"got {self.warmup_ratio} and {self.end_ratio}"
            )
        check_count(op, "every", self.every)
        if self.total_steps is not None:
            check_count(op, "total_steps", self.total_steps)
        self._check_structure(op)

    def _check_structure(self, op: str) -> None:
        sparsities = self.sparsity_a, self.sparsity_b
        shown = f"got {sparsities[0]} and {sparsities[1]}"
        if self.structure == "2:4" and sparsities != (0.5, 0.5):
            raise ValueError(f'{op}: sparsity_a and sparsity_b must be 0.5 with structure="2:4", {shown}')
        if self.structure == "2:4" and self.r % 4:
            raise ValueError(f'{op}: r must be a multiple of 4 with structure="2:4", got {self.r}')
        if self.structure == "blocks" and self.r < _BLOCK:
            raise ValueError(f'{op}: r must be at least {_BLOCK} with structure="blocks", got {self.r}')
        if self.structure == "rank" and sparsities[0] != sparsities[1]:
            raise ValueError(
                f'{op}: sparsity_a must be sparsity_b with structure="rank", which prunes both, {shown}'
            )


def check_count(op: str, name: str, value: object) -> None:
    """Raise unless ``value`` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{op}: {name} must be at least 1, got {value}")


def _check_choices(op: str, config: object, choices: dict[str, Collection[str]]) -> None:
    for name, known in choices.items():
        if getattr(config, name) not in known:
            spelled = " or ".join(f'"{choice}"' for choice in known)
            raise ValueError(f"{op}: {name} must be {spelled}, got {getattr(config, name)!r}")

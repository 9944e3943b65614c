"""Options of SALR: how the base is pruned, and how what was dropped comes back."""

from dataclasses import dataclass
from numbers import Integral
from typing import ClassVar

from .config import _MAX_RANK, MethodConfig, _canonical_number, _check_number

__all__ = ["SALRConfig"]

_CHOICES = {
    "scope": ("layer", "global"),
    "structure": ("unstructured", "2:4"),
    "svd": ("auto", "exact", "randomized"),
}


@dataclass(frozen=True)
class SALRConfig(MethodConfig):
    """A pruned, compressed base Ŵ, the best low-rank residual E_q of what was dropped, and LoRA on top.

    y = x Ŵᵀ + scale · (x Aᵀ) Bᵀ + (x Arᵀ) Brᵀ, where Br Ar starts as E_q: the truncated singular value
    decomposition of E = W - Ŵ, in float32.

    Args:
        r, lora_alpha: of the LoRA pair; ``scale`` is lora_alpha / r. The residual's scale is 1.
        lora_dropout: must be 0.
        target_modules: as in ``LoRAConfig``.
        sparsity: share of the weights to drop, those of least magnitude, in (0, 1).
        residual_rank: q of the residual, at least 0; a matrix whose smaller side is less takes that. r + q is
            at most 512.
        scope: "layer", the share is dropped of every matrix, or "global", of all of them together.
        structure: "unstructured", or "2:4": of each four columns of a row the two of least magnitude go.
            Sparsity is then 0.5 and scope "layer".
        svd: "exact", "randomized" (subspace iteration from a fixed seed), or "auto": exact up to 512 rows or
            columns, which takes a second for a matrix, then randomized.
        train_residual: whether the residual trains too, as in the paper. Frozen is its ablation.
        separate_residual: keep the residual that trains in parameters of its own, for an optimizer group of
            its own: see ``salr.parameter_groups``. Otherwise it shares the LoRA pair's two, which costs no
            copy at each step.

    Raises:
        ValueError: a value is out of range. TypeError: a value has the wrong type.

    Source: SALR (arXiv:2601.16991). That the threshold is a layer's own, and that E_q is split into equal
    halves, are choices made here: the paper's public text fixes neither.
    """

    sparsity: float = 0.5
    residual_rank: int = 64
    scope: str = "layer"
    structure: str = "unstructured"
    svd: str = "auto"
    train_residual: bool = True
    separate_residual: bool = False

    method: ClassVar[str] = "salr"

    def __post_init__(self) -> None:
        super().__post_init__()
        op = type(self).__name__
        if self.lora_dropout:
            raise ValueError(f"{op}: lora_dropout must be 0, got {self.lora_dropout}")
        _check_number(op, "sparsity", self.sparsity)
        if not 0 < self.sparsity < 1:
            raise ValueError(f"{op}: sparsity must be in (0, 1), got {self.sparsity}")
        q = self.residual_rank
        if isinstance(q, bool) or not isinstance(q, Integral):
            raise TypeError(f"{op}: residual_rank must be an int, got {type(q).__name__}")
        if not 0 <= q <= _MAX_RANK - self.r:
            most = _MAX_RANK - self.r
            raise ValueError(f"{op}: residual_rank must be in 0..{most}, {_MAX_RANK} - r, got {q}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                spelled = " or ".join(f'"{choice}"' for choice in choices)
                raise ValueError(f"{op}: {name} must be {spelled}, got {getattr(self, name)!r}")
        if self.structure == "2:4" and (self.sparsity, self.scope) != (0.5, "layer"):
            raise ValueError(
                f'{op}: sparsity and scope must be 0.5 and "layer" for structure "2:4", '
                f"got {self.sparsity} and {self.scope!r}"
            )
        for name in ("train_residual", "separate_residual"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{op}: {name} must be a bool, got {type(getattr(self, name)).__name__}")
        # frozen for its users; here the fields take their canonical form
        for name in ("sparsity", "residual_rank"):
            object.__setattr__(self, name, _canonical_number(getattr(self, name)))

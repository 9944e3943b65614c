"""Options of LoRI."""

from dataclasses import dataclass
from numbers import Integral
from typing import ClassVar

from .config import MethodConfig

__all__ = ["LoRIConfig"]


@dataclass(frozen=True)
class LoRIConfig(MethodConfig):
    """Options of a LoRI adapter, ΔW = scale · B A with a frozen random A, and B dense or sparse.

    The config is the same for both: ``inject`` makes B dense (LoRI-D), ``lori.sparsify`` sparse (LoRI-S).

    Args:
        r: rank, 1 ≤ r ≤ 512.
        lora_alpha: positive number; ``scale`` is lora_alpha / r, dimensionless. 2 r in the authors' runs.
        lora_dropout: probability in [0, 1) of dropping an element of the adapter's input while training. The
            authors' code says 0.05 and switches it off.
        target_modules: as in ``LoRAConfig``. "all-linear" takes what the authors take: in a Llama q, k, v,
            o, gate, up and down.
        seed: with the name of the module it determines A of each layer; in [0, 2⁶³).

    Raises:
        ValueError: a value is out of range. TypeError: a value has the wrong type.

    Source: Zhang et al. 2025, LoRI (arXiv:2504.07448).
    """

    r: int = 32
    lora_alpha: float = 64
    seed: int = 0

    method: ClassVar[str] = "lori"

    def __post_init__(self) -> None:
        super().__post_init__()
        op = type(self).__name__
        if isinstance(self.seed, bool) or not isinstance(self.seed, Integral):
            raise TypeError(f"{op}: seed must be an int, got {type(self.seed).__name__}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"{op}: seed must be in [0, 2**63), got {self.seed}")
        object.__setattr__(self, "seed", int(self.seed))

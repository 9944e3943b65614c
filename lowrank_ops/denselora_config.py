"""Options of DenseLoRA: which activation, and which layers share an encoder and a decoder."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from .config import MethodConfig

__all__ = ["DenseLoRAConfig"]


@dataclass(frozen=True)
class DenseLoRAConfig(MethodConfig):
    """Options of DenseLoRA: a trained R × R core a layer, between an encoder and a decoder that layers share.

    All layers of one projection type, as the q_proj of every block, share one encoder (R, K) and one decoder
    (N, R). The type of a layer is the last part of its name, or what ``projections`` says.

    Args:
        r: rank, 1 ≤ r ≤ 512; need not be a power of two.
        lora_alpha: positive number; ``scale`` is lora_alpha / r, dimensionless. The paper's code has 2 r.
        lora_dropout: probability in [0, 1) of dropping an element while training, with a mask of its own in
            each of three places: before the encoder, and after either activation. 0.05 in the paper's code.
        target_modules: as in ``LoRAConfig``; by default the five types that the paper adapts.
        activation: "gelu", exact, after the encoder and after the decoder; or None: the update is then
            linear in x, and can be merged.
        projections: names or ends of names after a dot, each of which makes one type, as
            "attention.output.dense" beside "intermediate.dense". A target that none of them names is an
            error; the longest wins where several do. Empty: the last part of a target's name is its type.

    Raises:
        ValueError: a value is out of range. TypeError: a value has the wrong type.

    Source: DenseLoRA (arXiv:2505.23808).
    """

    target_modules: str | Collection[str] = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    activation: str | None = "gelu"
    projections: Collection[str] = ()

    method: ClassVar[str] = "denselora"

    def __post_init__(self) -> None:
        super().__post_init__()
        op = type(self).__name__
        if self.activation not in ("gelu", None):
            raise ValueError(f'{op}: activation must be "gelu" or None, got {self.activation!r}')
        names = self.projections
        if not isinstance(names, (list, tuple, set, frozenset)):
            raise TypeError(f"{op}: projections must be a list of strings, got {type(names).__name__}")
        for name in names:
            if not isinstance(name, str):
                raise TypeError(f"{op}: projections must hold strings, got {type(name).__name__}")
            if not name:
                raise ValueError(f"{op}: projections must hold module names, got ''")
        # frozen for its users; here the field takes its hashable form, in which order means nothing
        object.__setattr__(self, "projections", tuple(sorted(set(names))))

    @property
    def mergeable(self) -> bool:
        """Whether a weight can hold the update."""
        return self.activation is None

    def projection(self, name: str) -> str:
        """Return the type of the layer called ``name``.

        Raises:
            ValueError: ``projections`` names other types only.
        """
        last = name.rpartition(".")[2]
        if not self.projections:
            return last
        found = [end for end in self.projections if name == end or name.endswith(f".{end}")]
        if not found:
            known = ", ".join(self.projections)
            raise ValueError(
                f"{type(self).__name__}: projection type of {name!r} must be one of {known}, got {last!r}"
            )
        return max(found, key=len)

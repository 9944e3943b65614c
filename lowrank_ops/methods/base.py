"""What every method provides: its parameters, their initialisation, and the factors of its update."""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..config import LoRAConfig

__all__ = ["Adapter", "Factors", "adapter_dtype", "parameter"]


class Factors(NamedTuple):
    """The update ΔW = scale · b a of one layer: a (R, K), b (N, R), scale dimensionless."""

    a: Tensor
    b: Tensor
    scale: float


class Adapter(nn.Module):
    """Parameters of one layer's update. A method is a subclass: ``__init__`` and ``factors``.

    Forward, merge, unmerge and files all follow from ``factors``, so that they cannot disagree.

    Args:
        config: the layer's own config, patterns already resolved.
        weight: the frozen base weight, (N, K); its shape, dtype and device are read, on "meta" too.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    config_class: ClassVar[type[LoRAConfig]]

    def __init__(self, config: LoRAConfig, weight: Tensor) -> None:
        super().__init__()
        self.rank = config.r
        self.scale = config.scale

    def factors(self, weight: Tensor) -> Factors:
        """Return the factors of the update, differentiable in every parameter.

        Args:
            weight: the frozen base weight, (N, K), for methods whose update depends on it.
        """
        raise NotImplementedError(f"{type(self).__name__}.factors must return Factors")


def adapter_dtype(base: torch.dtype) -> torch.dtype:
    """Return the dtype of an adapter beside a base of dtype ``base``: at least float32, as in PEFT."""
    return torch.float32 if base in (torch.float16, torch.bfloat16) else base


def parameter(module: nn.Module, name: str) -> Tensor | None:
    """Return ``getattr(module, name)``, sooner where it is a parameter: for what every forward pass reads."""
    own = module._parameters
    return own[name] if name in own else getattr(module, name)

"""Which layer class serves which method."""

from collections.abc import Mapping
from types import MappingProxyType

from .fused_linear import FusedLinear
from .layers import FusedLoRALinear

__all__ = ["LAYERS"]

_CLASSES = (FusedLoRALinear,)

LAYERS: Mapping[str, type[FusedLinear]] = MappingProxyType(
    {method: layer for layer in _CLASSES for method in layer.methods}
)

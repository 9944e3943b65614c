"""Which layer class serves which method."""

from collections.abc import Mapping
from types import MappingProxyType

from .fused_linear import FusedLinear
from .layer_dense import FusedDenseLoRALinear
from .layer_masked import FusedMaskedLoRALinear
from .layer_pruned import FusedPrunedLinear
from .layer_salor import FusedSALORLinear
from .layers import FusedLoRALinear

__all__ = ["FILE_LAYERS", "LAYERS"]

_CLASSES = (FusedLoRALinear, FusedDenseLoRALinear, FusedMaskedLoRALinear, FusedPrunedLinear)

LAYERS: Mapping[str, type[FusedLinear]] = MappingProxyType(
    {method: layer for layer in _CLASSES for method in layer.methods}
)

# of a plain model that is injected with a file: what was pruned is loaded in its compact form
FILE_LAYERS: Mapping[str, type[FusedLinear]] = MappingProxyType({**LAYERS, "salor": FusedSALORLinear})

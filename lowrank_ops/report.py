"""What an injected model trains, in numbers."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from .fused_linear import FusedLinear
from .inject import fused_layers, unwrapped

__all__ = ["Report", "report"]


@dataclass(frozen=True)
class Report:
    """Counts of one model. ``str()`` of it is a table of a few lines.

    Attributes:
        method: name of the method, "none" for a model without adapters.
        layers: number of fused layers.
        ranks: rank -> number of layers of that rank.
        trainable: parameters that require a gradient; tied ones count once.
        total: all parameters, adapters included; tied ones count once.
        impl: what the layers run on: "triton", "reference", or "auto" where that is open, on "meta".
        merged: number of merged layers.
    """

    method: str
    layers: int
    ranks: Mapping[int, int]
    trainable: int
    total: int
    impl: str
    merged: int

    @property
    def share(self) -> float:
        """Trainable part of all parameters, a fraction in [0, 1]."""
        return self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        ranks = ", ".join(f"{rank} ({count} layers)" for rank, count in self.ranks.items()) or "-"
        merged = f", {self.merged} merged" if self.merged else ""
        return (
            f"method     {self.method}\n"
            f"layers     {self.layers:,}{merged}\n"
            f"rank       {ranks}\n"
            f"trainable  {self.trainable:,} of {self.total:,} parameters ({100 * self.share:.4f} %)\n"
            f"impl       {self.impl}"
        )


def report(model: nn.Module) -> Report:
    """Describe what of ``model`` trains; works on "meta", and before ``inject`` as well.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"report: model must be an nn.Module, got {type(model).__name__}")
    model = unwrapped(model)
    layers = list(fused_layers(model).values())
    parameters = list(model.parameters())
    return Report(
        method=_join(layer.adapter.name for layer in layers),
        layers=len(layers),
        ranks=dict(sorted(Counter(layer.adapter.rank for layer in layers).items())),
        trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        total=sum(parameter.numel() for parameter in parameters),
        impl=_join(_impl(layer) for layer in layers),
        merged=sum(layer.merged for layer in layers),
    )


def _join(names: Iterable[str]) -> str:
    return ", ".join(sorted(set(names))) or "none"


def _impl(layer: FusedLinear) -> str:
    device = layer.weight.device.type
    if layer.impl != "auto" or device == "meta":
        return layer.impl
    return "triton" if device == "cuda" else "reference"

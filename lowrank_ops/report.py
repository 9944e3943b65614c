"""What an injected model trains, in numbers."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

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
        total: all parameters, adapters included; tied ones count once. Of a weight that is kept compressed,
            the entries that are kept count.
        impl: what the layers run on: "triton", "reference", or "auto" where that is open, on "meta".
        merged: number of merged layers.
        shared: parameters of adapters that several layers use.
        dense_bytes: bytes of the base weights that are kept compressed, if they were dense; 0 without any.
        compressed_bytes: bytes that they take.
        bits_per_weight: bits that each of them takes, zeros included; 0 without any.
    """

    method: str
    layers: int
    ranks: Mapping[int, int]
    trainable: int
    total: int
    impl: str
    merged: int
    shared: int = 0
    dense_bytes: int = 0
    compressed_bytes: int = 0
    bits_per_weight: float = 0.0

    @property
    def share(self) -> float:
        """Trainable part of all parameters, a fraction in [0, 1]."""
        return self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        ranks = ", ".join(f"{rank} ({count} layers)" for rank, count in self.ranks.items()) or "-"
        merged = f", {self.merged} merged" if self.merged else ""
        shared = f", {self.shared:,} of them shared" if self.shared else ""
        sizes = ""
        if self.dense_bytes:
            before, after = self.dense_bytes / 2**20, self.compressed_bytes / 2**20
            sizes = f"base       {before:,.1f} -> {after:,.1f} MiB, {self.bits_per_weight:.2f} bits each\n"
        return (
            f"method     {self.method}\n"
            f"layers     {self.layers:,}{merged}\n"
            f"rank       {ranks}\n"
            f"trainable  {self.trainable:,} of {self.total:,} parameters ({100 * self.share:.4f} %){shared}\n"
            f"{sizes}"
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
    weights = [weight for layer in layers if (weight := layer.compressed) is not None]
    count, taken = sum(w.shape.numel() for w in weights), sum(w.nbytes for w in weights)
    return Report(
        method=_join(layer.adapter.name for layer in layers),
        layers=len(layers),
        ranks=dict(sorted(Counter(layer.adapter.rank for layer in layers).items())),
        trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        total=sum(parameter.numel() for parameter in parameters) + sum(w.values.numel() for w in weights),
        impl=_join(_impl(layer) for layer in layers),
        merged=sum(layer.merged for layer in layers),
        shared=_shared(layers),
        dense_bytes=sum(w.shape.numel() * w.dtype.itemsize for w in weights),
        compressed_bytes=taken,
        bits_per_weight=8 * taken / count if count else 0.0,
    )


def _shared(layers: Iterable[FusedLinear]) -> int:
    uses: Counter[Tensor] = Counter()
    for layer in layers:
        uses.update(set(layer.adapter.parameters()))
    return sum(parameter.numel() for parameter, count in uses.items() if count > 1)


def _join(names: Iterable[str]) -> str:
    return ", ".join(sorted(set(names))) or "none"


def _impl(layer: FusedLinear) -> str:
    device = next(layer.parameters()).device.type
    if layer.impl != "auto" or device == "meta":
        return layer.impl
    return "triton" if device == "cuda" else "reference"

"""SALR layers: a pruned, compressed base and the pair of factors beside it."""

import struct
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bitmap_weight import BitmapWeight
from .fused_linear import FusedLinear, merged_weight
from .methods.base import parameter
from .methods.salr import SALR
from .pruned import pruned_linear
from .reference import TILE
from .salr_config import SALRConfig
from .salr_pruning import (
    Cut,
    checksum,
    count_to_drop,
    global_cuts,
    layer_cut,
    prune_weight,
    residual_factors,
    work_dtype,
)

if sys.version_info >= (3, 11):
    from typing import Self
else:
    from typing_extensions import Self  # comes with torch

__all__ = ["FusedPrunedLinear", "Pruned", "PrunedBase", "make_layer", "model_cuts", "prune_linear"]

# what an adapter file says of the base: the bits of the threshold, the ties, and the checksum of Ŵ
_ORIGIN = "origin"


class Pruned(NamedTuple):
    """What becomes of one weight: Ŵ, how it was made, and the residual Ar (q, K) and Br (N, q), or zeros."""

    weight: BitmapWeight
    origin: Tensor
    residual: tuple[Tensor, Tensor] | None


class PrunedBase(nn.Module):
    """The frozen base of a ``FusedPrunedLinear``: the tensors of a ``BitmapWeight`` as buffers, and the bias.

    ``origin`` is how the weight was made, (3,) int64: the bits of the threshold as a float64, how many equal
    to it were dropped, and the checksum of what is left. A state dict of a weight with another number of
    entries loads too. What is int16 is kept as bytes: process groups send no int16.
    """

    def __init__(self, weight: BitmapWeight, bias: nn.Parameter | None, origin: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.structure = weight.structure
        self.fields = tuple(weight.tensors)
        for name, tensor in weight.tensors.items():
            self.register_buffer(name, _as_bytes(tensor))
        self.register_buffer(_ORIGIN, origin)
        self.register_parameter("bias", bias)
        self._weight: BitmapWeight | None = weight

    @property
    def compressed(self) -> BitmapWeight:
        """The weight, (N, K)."""
        buffers = self._buffers
        weight = self._weight
        if torch.compiler.is_compiling() or weight is None or weight.values is not buffers["values"]:
            tensors = {name: _from_bytes(buffers[name]) for name in self.fields}
            weight = BitmapWeight(tensors, (self.out_features, self.in_features), self.structure)
            if torch.compiler.is_compiling():
                return weight
            self._weight = weight
        return weight

    def __getstate__(self) -> dict[str, Any]:
        # torch.save takes no tensor under two dtypes, and the weight is made of the buffers again
        return {**super().__getstate__(), "_weight": None}

    def extra_repr(self) -> str:
        bits = self.compressed.bits_per_weight
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"structure={self.structure}, bits_per_weight={bits:.2f}"
        )

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        given = {name: state[f"{prefix}{name}"] for name in self.fields if f"{prefix}{name}" in state}
        if given.keys() == set(self.fields):
            try:
                tensors = {name: _from_bytes(tensor) for name, tensor in given.items()}
                BitmapWeight(tensors, (self.out_features, self.in_features), self.structure)
            except (TypeError, ValueError) as error:
                args[-1].append(f"{prefix}: {error}")
                return
            for name, tensor in given.items():
                own = self._buffers[name]
                if own.shape != tensor.shape or (name != "values" and own.dtype != tensor.dtype):
                    dtype = own.dtype if name == "values" else tensor.dtype
                    self._buffers[name] = torch.empty(tensor.shape, dtype=dtype, device=own.device)
        super()._load_from_state_dict(state, prefix, *args)


class FusedPrunedLinear(FusedLinear):
    """A pruned linear layer in compressed form, and its adapters: y = x (Ŵ + Br Ar + scale · B A)ᵀ + bias.

    ``base`` holds the compressed weight and the bias, ``adapter`` the factors, ``config`` what the user
    chose. ``impl`` ("auto", "triton" or "reference") may be set at any time; there is no dropout.

    It starts as the linear layer less what pruning dropped and the residual did not bring back: neither the
    layer nor ``unmerge`` or ``eject`` gives the linear layer's own weight back. While merged, the layer holds
    the dense weight Ŵ + Br Ar + scale · B A, N·K numbers, beside the compressed one; ``eject`` gives a plain
    ``nn.Linear`` of that, or of Ŵ alone if not merged. ``state_dict`` holds the compressed weight, whole;
    files of ``save_adapter`` hold the factors and how to prune the pretrained weight again.

    Memory: at 50 % 9.26 bits a weight beside a 16-bit base (9 in 2:4), and (r + q)·(N+K) numbers.
    """

    methods = ("salr",)
    merged_weight: Tensor | None

    def __init__(self, base: PrunedBase, adapter: SALR, config: SALRConfig) -> None:
        super().__init__(base, adapter, config)
        self.register_buffer("merged_weight", None, persistent=False)

    @classmethod
    def build(cls, config: SALRConfig, linears: Mapping[str, nn.Linear]) -> dict[str, Self]:
        """Return the layers of a model by name, pruned; changes nothing about the linears."""
        cuts = model_cuts("inject", config, linears)
        return {
            name: make_layer(linear, config, prune_linear("inject", name, linear, config, cuts.get(name)))
            for name, linear in linears.items()
        }

    @classmethod
    def build_for_file(
        cls,
        config: SALRConfig,
        linears: Mapping[str, nn.Linear],
        tensors: Mapping[str, Mapping[str, Tensor]],
    ) -> dict[str, Self]:
        """As :meth:`build`, pruned as the files say: ``tensors`` of each layer; without the residual.

        Raises:
            ValueError: a pruned weight is not that of the files.
        """
        return {
            name: _prune_as_stored("load_adapter", name, linear, config, tensors[name])
            for name, linear in linears.items()
        }

    def file_tensors(self) -> dict[str, Tensor]:
        return {**super().file_tensors(), _ORIGIN: self.base.origin}

    def prepare_load(self, op: str, name: str, tensors: Mapping[str, Tensor]) -> Callable[[], None]:
        _check_origin(op, name, self.base.origin, _stored_origin(op, name, tensors))
        return super().prepare_load(op, name, {key: t for key, t in tensors.items() if key != _ORIGIN})

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., N) for x (..., K), in the dtype of x."""
        base = self._modules["base"]
        bias = parameter(base, "bias")
        if (merged := self._buffers["merged_weight"]) is not None:
            return F.linear(x, merged, bias)
        if self.dropout_p and self.training:
            raise ValueError(f"FusedPrunedLinear: dropout_p must be 0, got {self.dropout_p}")
        w = base.compressed
        a, b, scale = self._modules["adapter"].factors(w)
        return pruned_linear(x, w, a, b, bias, scale=scale, impl=self.impl)

    def plain(self) -> nn.Linear:
        """Return a plain layer of the merged weight, or of the pruned one alone; it shares the bias."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        linear.bias = self.base.bias
        return linear.train(self.training)

    @property
    def compressed(self) -> BitmapWeight:
        """The pruned weight, (N, K)."""
        return self.base.compressed

    @property
    def merged(self) -> bool:
        """Whether the layer computes with the dense weight that holds the update."""
        return self.merged_weight is not None

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge(self, *, name: str = "weight") -> None:
        """Make the dense weight Ŵ + Br Ar + scale · B A in float32, or float64, rounded once.

        A merged layer is left alone. The compressed weight stays.

        Raises:
            ValueError: the merged weight would not be finite in its dtype; the layer is as before.
        """
        if not self.merged:
            weight = _dense(self.compressed)
            self.merged_weight = merged_weight(weight, self.adapter.factors(weight), name)

    def unmerge(self) -> None:
        """Drop the dense weight. An unmerged layer is left alone."""
        self.merged_weight = None

    @property
    def weight(self) -> Tensor:
        """The dense weight, (N, K): decoded at each call, or the merged one while merged."""
        return _dense(self.compressed) if self.merged_weight is None else self.merged_weight

    def extra_repr(self) -> str:
        config = self.config
        return (
            f"{super().extra_repr()}, residual_rank={self.adapter.residual_rank}, "
            f"sparsity={config.sparsity:g}, structure={config.structure}"
        )


def model_cuts(op: str, config: SALRConfig, linears: Mapping[str, nn.Linear]) -> dict[str, Cut]:
    """Return what depends on all weights: with scope "global" each one's cut. On "meta" there is none."""
    weights = {name: linear.weight for name, linear in linears.items()}
    if config.scope == "layer" or any(w.is_meta for w in weights.values()):
        return {}
    for name, w in weights.items():
        _check_finite(op, name, w)
    return global_cuts(weights, config.sparsity)


@torch.inference_mode(False)
@torch.no_grad()
def prune_linear(op: str, name: str, linear: nn.Linear, config: SALRConfig, cut: Cut | None = None) -> Pruned:
    """Return what becomes of the weight of ``linear``, which stays as it is.

    Args:
        op, name: what errors call the operation and the layer.
        cut: what to drop; None for the layer's own share.

    Raises:
        ValueError: the weight is not finite.
    """
    w = linear.weight
    if w.is_meta:
        return Pruned(_planned(w, config), _origin(Cut(0.0, 0), 0, w), None)
    _check_finite(op, name, w)
    with torch.autocast(w.device.type, enabled=False):
        cut = layer_cut(w, config) if cut is None else cut
        kept = prune_weight(w, cut, config.structure)
        dropped = w.detach().to(work_dtype(w.dtype)) - kept
        residual = residual_factors(dropped, min(config.residual_rank, *w.shape), config.svd)
    del dropped
    origin = _origin(cut, checksum(kept), w)
    return Pruned(BitmapWeight.from_dense(kept, config.structure), origin, residual)


def make_layer(linear: nn.Linear, config: SALRConfig, pruned: Pruned) -> FusedPrunedLinear:
    """Return a layer of these parts in the mode of ``linear``, with its bias."""
    adapter = SALR(config, linear.weight, pruned.residual)
    base = PrunedBase(pruned.weight, linear.bias, pruned.origin).train(linear.training)
    return FusedPrunedLinear(base, adapter, config)


def _prune_as_stored(
    op: str, name: str, linear: nn.Linear, config: SALRConfig, tensors: Mapping[str, Tensor]
) -> FusedPrunedLinear:
    w, origin = linear.weight, _stored_origin(op, name, tensors)
    if w.is_meta:
        return make_layer(linear, config, Pruned(_planned(w, config), origin.to("meta"), None))
    bits, ties, _ = origin.tolist()
    cut = Cut(struct.unpack("<d", struct.pack("<q", bits))[0], ties)
    kept = prune_weight(w, cut, config.structure)
    _check_origin(op, name, _origin(cut, checksum(kept), w), origin)
    weight = BitmapWeight.from_dense(kept, config.structure)
    return make_layer(linear, config, Pruned(weight, origin.to(w.device), None))


def _as_bytes(t: Tensor) -> Tensor:
    return t.view(torch.uint8) if t.dtype is torch.int16 else t


def _from_bytes(t: Tensor) -> Tensor:
    return t.view(torch.int16) if t.dtype is torch.uint8 and t.dim() and t.shape[-1] % 2 == 0 else t


def _stored_origin(op: str, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    origin = tensors.get(_ORIGIN)
    if origin is None or origin.shape != (3,) or origin.dtype != torch.int64:
        found = "none" if origin is None else f"{tuple(origin.shape)} of {origin.dtype}"
        raise ValueError(f"{op}: {_ORIGIN} of {name!r} must be (3,) of torch.int64, got {found}")
    return origin


def _check_origin(op: str, name: str, own: Tensor, stored: Tensor) -> None:
    if not own.is_meta and own.tolist() != stored.tolist():
        raise ValueError(
            f"{op}: base weight of {name!r} must be the one that was pruned, got another; "
            "load the pretrained model that the adapter was made from"
        )


def _check_finite(op: str, name: str, w: Tensor) -> None:
    if not w.isfinite().all():
        count = int((~w.isfinite()).sum())
        raise ValueError(f"{op}: weight of {name!r} must be finite, got {count} values that are not")


def _origin(cut: Cut, total: int, w: Tensor) -> Tensor:
    bits = struct.unpack("<q", struct.pack("<d", cut.threshold))[0]
    return torch.tensor([bits, cut.ties, total], dtype=torch.int64, device=w.device)


def _planned(w: Tensor, config: SALRConfig) -> BitmapWeight:
    """Return a weight without data that has as many entries as one that is pruned by the config has."""
    N, K = w.shape
    groups, tiles_n, tiles_k = -(-K // 16), -(-N // TILE), -(-K // TILE)
    if config.structure == "2:4":
        sizes = {"values": ((N, 8 * groups), w.dtype), "index": ((N, groups), torch.int16)}
    else:
        left = w.numel() - count_to_drop(w.numel(), config.sparsity)
        sizes = {
            "values": ((left,), w.dtype),
            "mask": ((tiles_n, tiles_k, TILE, 2), torch.int32),
            "row_offset": ((tiles_n, tiles_k, TILE), torch.int16),
            "tile_start": ((tiles_n * tiles_k + 1,), torch.int32),
        }
    tensors = {n: torch.empty(size, dtype=dtype, device="meta") for n, (size, dtype) in sizes.items()}
    return BitmapWeight(tensors, (N, K), config.structure)


def _dense(weight: BitmapWeight) -> Tensor:
    if weight.values.is_meta:
        return torch.empty(weight.shape, dtype=weight.dtype, device="meta")
    return weight.to_dense()

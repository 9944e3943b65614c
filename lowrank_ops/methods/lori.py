"""LoRI: a frozen random A, and a trained B that is dense, or exists at the entries of a mask."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..lori_config import LoRIConfig
from ..seeded import draw_uniform, layer_seed
from ..sparse_factor import MaskedFactors, SparseFactor
from ..sparse_mask import SparseMask
from .base import Adapter, Factors, adapter_dtype, parameter

_SPARSE = {"b_values", "b_mask"}


class LoRI(Adapter):
    """ΔW = scale · B A: A (R, K) uniform in ±1/√K, frozen, a function of its seed; B (N, R) zero at first.

    ``b`` is a parameter, (N, R), or a ``SparseFactor``. Files and ``state_dict`` do not hold ``a``: they have
    ``a_seed``, (3,) int64, the seed, R and K, from which loading draws ``a`` again.
    """

    name, paper = "lori", "https://arxiv.org/abs/2504.07448"
    config_class = LoRIConfig

    def __init__(self, config: LoRIConfig, weight: Tensor, layer: str = "") -> None:
        super().__init__(config, weight)
        (N, K), R = weight.shape, config.r
        options = {"dtype": adapter_dtype(weight.dtype), "device": weight.device}
        self.seed = layer_seed(config.seed, layer)
        self.register_buffer("a_seed", torch.tensor([self.seed, R, K], device=weight.device))
        self.register_buffer("a", draw_uniform(self.seed, R, K, **options), persistent=False)
        self.b: nn.Parameter | SparseFactor = nn.Parameter(torch.zeros(N, R, **options))

    @classmethod
    def build(cls, config: LoRIConfig, weights: Mapping[str, Tensor]) -> dict[str, "LoRI"]:
        return {name: cls(config, weight, name) for name, weight in weights.items()}

    @property
    def is_sparse(self) -> bool:
        """Whether B exists at the entries of a mask alone (LoRI-S)."""
        return isinstance(self.b, SparseFactor)

    def factors(self, weight: Tensor) -> Factors:
        b = self._modules["b"].dense() if "b" in self._modules else parameter(self, "b")
        return Factors(self._buffers["a"], b, self.scale)

    def masked_factors(self, weight: Tensor) -> MaskedFactors | None:
        """Return the factors with B as values and mask, or None while B is dense."""
        b = self._modules.get("b")
        if b is None:
            return None
        return MaskedFactors(self._buffers["a"], b.all_values(), b.mask, self.scale, b.train_mask)

    def set_b(self, b: nn.Parameter | SparseFactor) -> None:
        """Put ``b`` in the place of B; it trains if B trained."""
        trains = (self.b.values if self.is_sparse else self.b).requires_grad
        del self.b
        self.b = b.requires_grad_(trains)

    def set_seed(self, seed: int) -> None:
        """Draw ``a`` from ``seed``."""
        R, K = self.a.shape
        self.seed = seed
        self.a_seed = torch.tensor([seed, R, K], device=self.a_seed.device)
        self.a = draw_uniform(seed, R, K, dtype=self.a.dtype, device=self.a_seed.device)

    def file_tensors(self) -> dict[str, Tensor]:
        """Return ``a_seed`` and ``b``, or ``b_values`` and the mask's words, and those of what trains."""
        if not self.is_sparse:
            return {"a_seed": self.a_seed, "b": self.b}
        tensors = {"a_seed": self.a_seed, "b_values": self.b.all_values(), "b_mask": self.b.words}
        return tensors if self.b.train_words is None else {**tensors, "b_train_mask": self.b.train_words}

    def prepare_load(self, op: str, layer: str, tensors: Mapping[str, Tensor]) -> Callable[[], None]:
        """As the base class; B becomes dense or sparse as it is in the files, with their masks.

        Where it is so already, values are copied into the parameter that is there. Otherwise there is a new
        one, which an optimizer must be told.
        """
        seed, b = read_factor(op, layer, tensors, tuple(self.a.shape), self.a_seed)
        N, R = self.b.shape
        if tuple(b.shape) != (N, R):
            raise ValueError(f"{op}: b of {layer!r} must be (N, R) = {(N, R)}, got {tuple(b.shape)}")
        b = b.to(self.a.device, self.a.dtype)

        @torch.no_grad()
        def copy() -> None:
            if seed != self.seed:
                self.set_seed(seed)
            if isinstance(b, Tensor) and not self.is_sparse:
                self.b.copy_(b)
            elif isinstance(b, SparseFactor) and self.is_sparse and _same_masks(b, self.b):
                self.b.values.copy_(b.values)
                if self.b.kept is not None:
                    self.b.kept.copy_(b.kept)
            else:
                self.set_b(nn.Parameter(b) if isinstance(b, Tensor) else b)

        return copy

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if not self.a_seed.is_meta:
            # also where the seed is the same: to_empty leaves no numbers, and on "meta" there were none
            self.set_seed(int(self.a_seed[0]))

    def extra_repr(self) -> str:
        return f"seed={self.seed}"


def read_factor(
    op: str, layer: str, tensors: Mapping[str, Tensor], a_shape: tuple[int, int] | None, like: Tensor
) -> tuple[int, Tensor | SparseFactor]:
    """Return the seed of A, and B, from what :meth:`LoRI.file_tensors` gave, on the device of ``like``.

    Args:
        op: what the errors call the caller.
        layer: the layer's name, for the errors.
        tensors: of one layer.
        a_shape: (R, K) that the layer has; None takes that of the files.
        like: a tensor on the device where the masks are needed.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape or type.
    """
    names = set(tensors)
    if names not in ({"a_seed", "b"}, {"a_seed", *_SPARSE}, {"a_seed", *_SPARSE, "b_train_mask"}):
        raise ValueError(
            f"{op}: adapter must hold a_seed and b, or a_seed, b_values and b_mask, of {layer!r}, "
            f"got {sorted(names)}"
        )
    if tensors["a_seed"].dtype is not torch.int64 or tensors["a_seed"].shape != (3,):
        actual = f"{tuple(tensors['a_seed'].shape)} of {tensors['a_seed'].dtype}"
        raise ValueError(f"{op}: a_seed of {layer!r} must be (3,) of torch.int64, got {actual}")
    seed, R, K = tensors["a_seed"].tolist()
    if a_shape is not None and (R, K) != a_shape:
        raise ValueError(f"{op}: a of {layer!r} must be (R, K) = {a_shape}, got {(R, K)}")
    if "b" in tensors:
        b = tensors["b"]
        if b.dim() != 2 or b.shape[1] != R:
            raise ValueError(f"{op}: b of {layer!r} must be (N, R) with R = {R}, got {tuple(b.shape)}")
        return seed, b
    return seed, _read_sparse(op, layer, tensors, R, like.device)


def _read_sparse(
    op: str, layer: str, tensors: Mapping[str, Tensor], R: int, device: torch.device
) -> SparseFactor:
    masks = []
    for name in ("b_mask", "b_train_mask"):
        if name not in tensors:
            masks.append(None)
            continue
        words = tensors[name]
        try:
            masks.append(SparseMask.from_words(words.to(device), (words.shape[0] if words.dim() else 0, R)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{op}: {name} of {layer!r} must be a mask's words, got {error}") from error
    (mask, train_mask), values = masks, tensors["b_values"].to(device)
    if values.shape != (mask.nnz,):
        expected = f"(nnz,) = ({mask.nnz},)"
        raise ValueError(f"{op}: b_values of {layer!r} must be {expected}, got {tuple(values.shape)}")
    if train_mask is not None and (train_mask.shape != mask.shape or not mask.contains(train_mask)):
        raise ValueError(f"{op}: b_train_mask of {layer!r} must lie inside b_mask, got one that does not")
    return SparseFactor(mask, values, train_mask)


def _same_masks(one: SparseFactor, other: SparseFactor) -> bool:
    return one.mask == other.mask and one.train_mask == other.train_mask

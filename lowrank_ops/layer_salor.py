"""The compact form of a SALOR layer: of A and B the entries that are left, and nothing else."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .expand import expand, word_offsets
from .fused_linear import Self
from .layer_masked import FusedMaskedLoRALinear
from .masked import masked_lora_linear
from .methods.base import Adapter, Factors, adapter_dtype
from .salor_config import SALORConfig
from .salor_files import FILE_NAMES, masks_from_file
from .sparse_factor import MaskedFactors, SparseFactor

__all__ = ["CompactSALOR", "FusedSALORLinear"]


class CompactSALOR(Adapter):
    """ΔW = scale · B A where A and B exist at the entries of a mask each; their values are what trains."""

    name, paper = "salor", "https://arxiv.org/abs/1710.01878"
    config_class = SALORConfig

    def __init__(self, config: SALORConfig, weight: Tensor, a: SparseFactor, b: SparseFactor) -> None:
        super().__init__(config, weight)
        self.a, self.b = a, b
        # A is wide: with these its entries are found without counting along a row
        self.register_buffer("a_word_offsets", _word_offsets(a), persistent=False)
        self.register_load_state_dict_post_hook(_count_again)

    def factors(self, weight: Tensor) -> Factors:
        return Factors(self.a.dense(), self.b.dense(), self.scale)

    def masked_factors(self, weight: Tensor, impl: str = "reference") -> MaskedFactors:
        """Return the factors with B as its values and their mask; A is expanded, R·K numbers."""
        a = expand(self.a.values, self.a.mask, self.a_word_offsets, impl=impl)
        return MaskedFactors(a, self.b.values, self.b.mask, self.scale)

    def file_tensors(self) -> dict[str, Tensor]:
        tensors = self.a.values.detach(), self.a.words, self.b.values.detach(), self.b.words
        return dict(zip(FILE_NAMES, tensors, strict=True))

    def prepare_load(self, op: str, layer: str, tensors: Mapping[str, Tensor]) -> Callable[[], None]:
        masks = masks_from_file(op, layer, tensors, self.a.shape, self.b.shape)
        copies = []
        for letter, factor, mask in (("a", self.a, masks[0]), ("b", self.b, masks[1])):
            if mask.to(factor.words.device) != factor.mask:
                raise ValueError(
                    f"{op}: {letter}_words of {layer!r} must be the mask of the model, got another; "
                    "load it into a plain model, or into one that is not compact"
                )
            values = tensors[f"{letter}_values"]
            copies.append((factor.values, values.to(factor.values.device, factor.values.dtype)))

        def copy() -> None:
            with torch.no_grad():
                for target, source in copies:
                    target.copy_(source)

        return copy


def _word_offsets(a: SparseFactor) -> Tensor | None:
    return None if a.words.is_meta else word_offsets(a.mask)


def _count_again(adapter: CompactSALOR, incompatible_keys: object) -> None:
    # the state may have brought another mask
    adapter.a_word_offsets = _word_offsets(adapter.a)


class FusedSALORLinear(FusedMaskedLoRALinear):
    """A ``FusedMaskedLoRALinear`` with a sparse A too, as ``salor.compact`` and ``load_adapter`` make it."""

    methods = ("salor",)

    def _update_forward(self, x: Tensor, w: Tensor, bias: Tensor | None, dropout_p: float) -> Tensor:
        sparse = self._modules["adapter"].masked_factors(w, self.impl)
        if sparse is None:
            return super()._update_forward(x, w, bias, dropout_p)
        a, b_values, b_mask, scale, _ = sparse
        options = {"scale": scale, "dropout_p": dropout_p, "impl": self.impl}
        return masked_lora_linear(x, w, a, b_values, b_mask, bias, **options)

    @classmethod
    def build_for_file(
        cls,
        config: SALORConfig,
        linears: Mapping[str, nn.Linear],
        tensors: Mapping[str, Mapping[str, Tensor]],
    ) -> dict[str, Self]:
        """As :meth:`build`, compact, with the masks of the file."""
        layers = {}
        for name, linear in linears.items():
            weight, factors = linear.weight, []
            (N, K), R = weight.shape, config.r
            masks = masks_from_file("load_adapter", name, tensors[name], (R, K), (N, R))
            for mask in masks:
                options = {"device": weight.device, "dtype": adapter_dtype(weight.dtype)}
                factors.append(SparseFactor(mask.to(weight.device), torch.zeros(mask.nnz, **options)))
            layers[name] = cls(linear, CompactSALOR(config, weight, *factors), config)
        return layers

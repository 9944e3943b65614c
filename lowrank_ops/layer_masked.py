"""Layers whose up-projection exists at the entries of a mask alone: LoRI, SALOR."""

from torch import Tensor

from .functional import lora_linear
from .fused_linear import FusedLinear
from .masked import masked_lora_linear

__all__ = ["FusedMaskedLoRALinear"]


class FusedMaskedLoRALinear(FusedLinear):
    """A frozen ``nn.Linear`` and an update with a sparse B in one operation: y = x (W + scale · B A)ᵀ + bias.

    Everything is as in ``FusedLoRALinear``, but for groups, which these layers do not form. While the
    adapter's B is dense, ``adapter.masked_factors(weight)`` is None, and the layer computes what
    ``lora_linear`` computes; later it computes ``masked_lora_linear`` of those factors.

    Memory: where A is frozen, as in LoRI, the forward pass keeps M·R numbers, and not its input.
    """

    methods = ("lori",)

    def _update_forward(self, x: Tensor, w: Tensor, bias: Tensor | None, dropout_p: float) -> Tensor:
        adapter = self._modules["adapter"]
        sparse = adapter.masked_factors(w)
        if sparse is None:
            a, b, scale = adapter.factors(w)
            return lora_linear(x, w, a, b, bias, scale=scale, dropout_p=dropout_p, impl=self.impl)
        a, b_values, b_mask, scale, train_mask = sparse
        return masked_lora_linear(
            x,
            w,
            a,
            b_values,
            b_mask,
            bias,
            scale=scale,
            dropout_p=dropout_p,
            train_mask=train_mask,
            impl=self.impl,
        )

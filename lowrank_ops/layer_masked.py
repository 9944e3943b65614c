"""Layers whose up-projection exists at the entries of a mask alone: LoRI, SALOR."""

from torch import Tensor

from .layers import FusedLoRALinear
from .masked import masked_lora_linear

__all__ = ["FusedMaskedLoRALinear"]


class FusedMaskedLoRALinear(FusedLoRALinear):
    """A frozen ``nn.Linear`` and an update with a sparse B in one operation: y = x (W + scale · B A)ᵀ + bias.

    All is as in ``FusedLoRALinear``. While the adapter's B is dense, ``adapter.masked_factors(weight)``
    is None, and the layer computes what that one computes, in a group too; later it computes
    ``masked_lora_linear`` of those factors, alone.

    Memory: where A is frozen, as in LoRI, the forward pass keeps M·R numbers, and not its input.
    """

    methods = ("lori",)

    def _update_forward(self, x: Tensor, w: Tensor, bias: Tensor | None, dropout_p: float) -> Tensor:
        adapter = self._modules["adapter"]
        sparse = adapter.masked_factors(w)
        if sparse is None:
            return super()._update_forward(x, w, bias, dropout_p)
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

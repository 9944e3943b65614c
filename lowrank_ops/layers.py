"""LoRA layers."""

from typing import Any

from torch import Tensor

from .functional import lora_linear
from .fused_linear import FusedLinear
from .layer_group import LayerGroup

__all__ = ["FusedLoRALinear"]


class FusedLoRALinear(FusedLinear):
    """A frozen ``nn.Linear`` and a low-rank update in one operation: y = x (W + scale · B A)ᵀ + bias.

    ``base`` is the linear layer itself, ``adapter`` holds the trained parameters, ``config`` what the user
    chose. ``impl`` ("auto", "triton" or "reference") and ``dropout_p`` may be set at any time. Dropout acts
    on the adapter's input, in training mode only.

    While merged, the forward pass is the base layer alone, in training mode too: no dropout, and the adapter
    gets no gradient. ``state_dict`` always describes the unmerged layer, merged or not, so that it loads into
    a fresh one. ``load_state_dict`` loads it into a merged layer too, and merges it again.

    ``group`` links the layers whose parent calls them on one tensor, as q, k and v: ``inject`` sets it, and
    the first of them, when it is called, computes all, reading x once. Set it to None to compute alone.
    """

    methods = ("lora", "salor")
    group: LayerGroup | None = None
    group_place = 0

    def _update_forward(self, x: Tensor, w: Tensor, bias: Tensor | None, dropout_p: float) -> Tensor:
        if self.group is not None and (y := self.group.output(self, x)) is not None:
            return y
        a, b, scale = self._modules["adapter"].factors(w)
        return lora_linear(x, w, a, b, bias, scale=scale, dropout_p=dropout_p, impl=self.impl)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.group is not None:
            self.group.join(self)

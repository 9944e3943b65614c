"""DenseLoRA layers."""

from torch import Tensor

from .dense import dense_lora_linear
from .fused_linear import FusedLinear

__all__ = ["FusedDenseLoRALinear"]


class FusedDenseLoRALinear(FusedLinear):
    """A frozen ``nn.Linear`` and DenseLoRA's update in one operation: y = base(x) + scale · g(D M g(E x)).

    ``base`` is the linear layer itself; ``adapter`` holds the trained core M (R, R), and encoder E (R, K) and
    decoder D (N, R), which are one Parameter each in all layers of a projection type. ``config`` is what the
    user chose. ``impl`` ("auto", "triton" or "reference") and ``dropout_p`` may be set at any time. Dropout
    acts on x, after either activation g, and in training mode only.

    Without an activation the layer merges as a LoRA layer does. With one it refuses: no weight holds such an
    update. ``state_dict`` names the shared pair in every layer; files hold it once.
    """

    methods = ("denselora",)

    def _update_forward(self, x: Tensor, w: Tensor, bias: Tensor | None, dropout_p: float) -> Tensor:
        adapter = self._modules["adapter"]
        encoder, core, decoder = adapter.tensors(x.device)
        return dense_lora_linear(
            x, w, encoder, core, decoder, bias,
            scale=adapter.scale, dropout_p=dropout_p, impl=self.impl, activation=adapter.activation,
        )  # fmt: skip

    def merge(self, *, name: str = "weight") -> None:
        """As ``FusedLinear.merge``, if the update is linear in x.

        Raises:
            ValueError: there is an activation, or the merged weight would not be finite in its dtype; the
                layer is as before.
        """
        if self.adapter.activation is not None:
            raise ValueError(
                f"merge: {name} must have an update that is linear in x, got DenseLoRA with "
                f"activation {self.adapter.activation!r}; only with activation=None can a weight hold it"
            )
        super().merge(name=name)

    def extra_repr(self) -> str:
        adapter = self.adapter
        return f"{super().extra_repr()}, activation={adapter.activation}, sharing={adapter.pair.count}"

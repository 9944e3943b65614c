"""SALOR: two trained factors that lose entries while they train; those stay zero."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..config import MethodConfig
from ..salor_config import SALORConfig
from ..salor_files import FILE_NAMES, masks_from_file
from ..sparse_mask import SparseMask
from .base import Factors, parameter
from .lora import LoRA


class SALOR(LoRA):
    """ΔW = scale · B A with A (R, K) and B (N, R), dense in memory, while their entries are being pruned.

    Starts as LoRA. ``a_pruned`` and ``b_pruned``, bool, tell which entries are gone: these are zero and get
    no gradient. Both are buffers, so a ``state_dict`` resumes a run.

    Memory: beside LoRA's, one byte an entry.
    """

    name, paper = "salor", "https://arxiv.org/abs/1710.01878"
    config_class = SALORConfig

    def __init__(self, config: MethodConfig, weight: Tensor) -> None:
        super().__init__(config, weight)
        self.structure = config.structure
        for letter in "ab":
            pruned = torch.zeros_like(getattr(self, letter), dtype=torch.bool)
            self.register_buffer(f"{letter}_pruned", pruned)

    def factors(self, weight: Tensor) -> Factors:
        a, b = parameter(self, "a"), parameter(self, "b")
        if torch.is_grad_enabled():
            buffers = self._buffers
            a, b = _MaskGradient.apply(a, buffers["a_pruned"]), _MaskGradient.apply(b, buffers["b_pruned"])
        return Factors(a, b, self.scale)

    def masked_factors(self, weight: Tensor, impl: str = "reference") -> None:
        """Return None: the factors are dense."""
        return None

    def pairs(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Return A and B, each with the flags of its pruned entries."""
        return [(self.a, self.a_pruned), (self.b, self.b_pruned)]

    def file_tensors(self) -> dict[str, Tensor]:
        tensors = []
        for factor, pruned in self.pairs():
            mask = SparseMask.from_dense(~pruned)
            tensors += [mask.pack(factor.detach()), mask.words]
        return dict(zip(FILE_NAMES, tensors, strict=True))

    def prepare_load(self, op: str, layer: str, tensors: Mapping[str, Tensor]) -> Callable[[], None]:
        masks = masks_from_file(op, layer, tensors, self.a.shape, self.b.shape)
        copies = []
        for (factor, pruned), mask, name in zip(self.pairs(), masks, ("a_values", "b_values"), strict=True):
            copies.append((factor, mask.unpack(tensors[name]).to(factor.device, factor.dtype)))
            copies.append((pruned, ~mask.to_dense().to(pruned.device)))

        def copy() -> None:
            with torch.no_grad():
                for target, source in copies:
                    target.copy_(source)

        return copy

    def extra_repr(self) -> str:
        if self.a_pruned.is_meta:
            return f"structure={self.structure}"
        a, b = (pruned.float().mean().item() if pruned.numel() else 0.0 for _, pruned in self.pairs())
        return f"structure={self.structure}, pruned={100 * a:.1f} % of a, {100 * b:.1f} % of b"


class _MaskGradient(torch.autograd.Function):
    """The factor itself; its gradient is zero at what is pruned, also where it would not be finite."""

    @staticmethod
    def forward(ctx, factor: Tensor, pruned: Tensor) -> Tensor:
        ctx.save_for_backward(pruned)
        return factor.view_as(factor)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (pruned,) = ctx.saved_tensors
        return grad.masked_fill(pruned, 0), None

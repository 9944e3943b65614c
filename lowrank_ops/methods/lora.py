"""LoRA: two trained factors, the second zero at the start."""

import math

import torch
from torch import Tensor, nn

from ..config import LoRAConfig
from .base import Adapter, Factors, adapter_dtype, parameter


class LoRA(Adapter):
    """ΔW = scale · B A: A (R, K) starts uniform in ±1/√K, from torch's generator, B (N, R) zero."""

    name, paper = "lora", "https://arxiv.org/abs/2106.09685"
    config_class = LoRAConfig

    def __init__(self, config: LoRAConfig, weight: Tensor) -> None:
        super().__init__(config, weight)
        (N, K), R = weight.shape, config.r
        options = {"dtype": adapter_dtype(weight.dtype), "device": weight.device}
        self.a = nn.Parameter(torch.empty(R, K, **options))
        self.b = nn.Parameter(torch.zeros(N, R, **options))
        if K > 0:
            nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    @classmethod
    def from_factors(cls, config: LoRAConfig, a: nn.Parameter, b: nn.Parameter) -> "LoRA":
        """Return an adapter that holds ``a`` (R, K) and ``b`` (N, R) themselves; draws no random numbers."""
        adapter = cls(config, torch.empty(b.shape[0], a.shape[1], device="meta"))
        adapter.a, adapter.b = a, b
        return adapter

    def factors(self, weight: Tensor) -> Factors:
        own = self._parameters
        if "a" in own and "b" in own:
            return Factors(own["a"], own["b"], self.scale)
        return Factors(parameter(self, "a"), parameter(self, "b"), self.scale)

"""SALR: a LoRA pair and the residual of a pruned base, one concatenated pair of factors."""

import math

import torch
from torch import Tensor, nn

from ..salr_config import SALRConfig
from .base import Adapter, Factors, adapter_dtype, parameter


class SALR(Adapter):
    """ΔW = scale · B A + Br Ar: A (r, K) starts as in LoRA, B (N, r) zero, Br (N, q) Ar (q, K) as E_q.

    Joined, as by default, ``a`` (r + q, K) is A above Ar and ``b`` (N, r + q) is B beside Br / scale, so that
    one scale serves both; the division is exact where scale is a power of two, as it is by default. Frozen,
    or separate, ``residual_a`` is Ar and ``residual_b`` is Br; :meth:`factors` then puts the pairs together.

    Args:
        config: the options.
        weight: a weight of the base's shape, dtype and device; its values are not read.
        residual: Ar (q, K) and Br (N, q), or None for zeros, as for what is loaded next.
    """

    name, paper = "salr", "https://arxiv.org/abs/2601.16991"
    config_class = SALRConfig
    starts_as_base = False

    def __init__(
        self, config: SALRConfig, weight: Tensor, residual: tuple[Tensor, Tensor] | None = None
    ) -> None:
        super().__init__(config, weight)
        (N, K), r = weight.shape, config.r
        q = self.residual_rank = min(config.residual_rank, N, K)
        self.joined = config.train_residual and not config.separate_residual
        options = {"dtype": adapter_dtype(weight.dtype), "device": weight.device}
        a, b = torch.zeros(r + q, K, **options), torch.zeros(N, r + q, **options)
        if K > 0:
            nn.init.kaiming_uniform_(a[:r], a=math.sqrt(5))
        if residual is not None:
            a[r:].copy_(residual[0])
            b[:, r:].copy_(residual[1] / self.scale if self.joined else residual[1])
        if self.joined:
            self.a, self.b = nn.Parameter(a), nn.Parameter(b)
            return
        trains = config.train_residual
        self.a, self.b = nn.Parameter(a[:r].clone()), nn.Parameter(b[:, :r].contiguous())
        self.residual_a = nn.Parameter(a[r:].clone(), requires_grad=trains)
        self.residual_b = nn.Parameter(b[:, r:].contiguous(), requires_grad=trains)

    def factors(self, weight: Tensor) -> Factors:
        a, b = parameter(self, "a"), parameter(self, "b")
        if self.joined:
            return Factors(a, b, self.scale)
        residual_b = parameter(self, "residual_b") / self.scale
        a = torch.cat([a, parameter(self, "residual_a")])
        return Factors(a, torch.cat([b, residual_b], 1), self.scale)

    @property
    def residual(self) -> tuple[Tensor, Tensor]:
        """Ar (q, K) and Br (N, q) as they are now; new tensors, but for an Ar that is a view."""
        if not self.joined:
            return self.residual_a, self.residual_b
        return self.a[self.rank :], self.b[:, self.rank :] * self.scale

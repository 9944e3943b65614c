"""Options of GeLoRA: how hidden states become points, points dimensions, and dimensions ranks."""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from .config import LoRAConfig

__all__ = ["GeLoRAConfig"]

_CHOICES = {"estimator": ("fit", "mle"), "pooling": ("mean", "last")}


@dataclass(frozen=True)
class GeLoRAConfig:
    """What ``gelora.select_ranks`` measures, and how a dimension becomes a rank.

    Block i, whose input has intrinsic dimension d and whose output d', gets rank ⌈max(d' - d, 0) + offset⌉ in
    all its target matrices. Training is plain LoRA with those ranks: :meth:`lora_config`.

    Args:
        target_modules: the matrices, as in ``LoRAConfig``; all must lie in the blocks. The paper adapts the
            four of attention.
        scale: factor on every update, dimensionless; lora_alpha of a block is scale · rank. 32 in the paper's
            runs on DeBERTa.
        offset: at least 1, added to the growth of the dimension.
        budget: parameters of all adapters together; the ranks are scaled to reach and not exceed it, at least
            1 each. None takes them as the rule gives them.
        estimator, discard: of ``gelora.intrinsic_dimension``.
        pooling: what stands for an example: "mean" of its tokens that are not padding, or its "last" such
            token, which alone has seen the whole example in a decoder.
        max_points: examples to take at most; neighbours cost max_points² distances a block.
        blocks: name of the ``nn.ModuleList`` of blocks, as "model.layers"; None finds the outermost one that
            holds all targets.
        lora_dropout, bias: as in ``LoRAConfig``.

    Raises:
        ValueError: a value is out of range. TypeError: a value has the wrong type.

    Source: GeLoRA (arXiv:2412.09250). Pooling, number of examples, estimator and the scale for decoders are
    choices made here, where no source fixes them.
    """

    target_modules: str | Collection[str] = ("q_proj", "k_proj", "v_proj", "o_proj")
    scale: float = 2.0
    offset: int = 1
    budget: int | None = None
    estimator: str = "fit"
    discard: float = 0.1
    pooling: str = "mean"
    max_points: int = 5000
    blocks: str | None = None
    lora_dropout: float = 0.0
    bias: str = "none"

    def __post_init__(self) -> None:
        op = type(self).__name__
        for name, least in (("offset", 1), ("max_points", 3), ("budget", 1)):
            value = getattr(self, name)
            if value is None and name == "budget":
                continue
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"{op}: {name} must be at least {least}, got {value}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                spelled = " or ".join(f'"{choice}"' for choice in choices)
                raise ValueError(f"{op}: {name} must be {spelled}, got {getattr(self, name)!r}")
        if self.blocks is not None and not isinstance(self.blocks, str):
            raise TypeError(f"{op}: blocks must be a string or None, got {type(self.blocks).__name__}")
        check_discard(op, self.discard)
        try:
            targets = self._lora(1).target_modules
        except (TypeError, ValueError) as error:
            message = str(error).replace("LoRAConfig", op, 1).replace("lora_alpha", "scale", 1)
            raise type(error)(message) from None
        # frozen for its users; here the field takes its hashable form
        object.__setattr__(self, "target_modules", targets)

    def _lora(self, r: int, **patterns: Mapping[str, Any]) -> LoRAConfig:
        alpha = self.scale * r if r > 1 else self.scale
        return LoRAConfig(r, alpha, self.lora_dropout, self.target_modules, bias=self.bias, **patterns)

    def lora_config(self, ranks: Mapping[str, int]) -> LoRAConfig:
        """Return the config of the LoRA adapters with these ranks, for ``inject``.

        Args:
            ranks: module name -> rank, as ``gelora.select_ranks`` returns it. The most frequent rank becomes
                ``r``, the others ``rank_pattern``, and scale · rank ``alpha_pattern``.

        Raises:
            ValueError: there are no ranks, or one is out of range. TypeError: a rank is not an int.
        """
        if not ranks:
            raise ValueError(f"{type(self).__name__}: ranks must name a module, got an empty dict")
        r = Counter(ranks.values()).most_common(1)[0][0]
        own = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != r}
        alphas = {name: self.scale * rank for name, rank in own.items()}
        return self._lora(r, rank_pattern=own, alpha_pattern=alphas)


def check_discard(op: str, discard: object) -> None:
    """Raise unless ``discard`` is a share in [0, 1)."""
    if isinstance(discard, bool) or not isinstance(discard, (int, float)):
        raise TypeError(f"{op}: discard must be a number, got {type(discard).__name__}")
    if not 0 <= discard < 1:
        raise ValueError(f"{op}: discard must be in [0, 1), got {discard}")

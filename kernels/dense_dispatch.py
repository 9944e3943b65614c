"""DenseLoRA under ``impl="auto"``: what is left to cuBLAS, and what Hopper's own kernels serve."""

from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ._config import TileConfig, device_facts
from .dense_lora import Passes
from .dense_lora_backward_update import dense_backward_update
from .dense_lora_output import dense_output, output_config
from .lora_forward import drop_threshold

__all__ = ["DispatchPasses", "output"]

ADD_UPDATE = TileConfig(BLOCK_ROWS=32, BLOCK_COLS=128, BLOCK_DEPTH=64, num_stages=1)


@cache
def _hopper(device: torch.device) -> ModuleType | None:
    """Return the passes made for this device's architecture alone, if there are any."""
    if device_facts(device).arch != "sm90":
        return None
    from . import hopper_dense_lora

    return hopper_dense_lora


def output(
    x: Tensor,
    w: Tensor,
    h: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scale: float,
    gelu: bool,
    seed: Tensor | None,
    threshold: int,
) -> Tensor:
    """Return ``y = x wᵀ + bias + scale · drop₃(g(h bᵀ))``."""
    hopper = _hopper(x.device)
    y = None if hopper is None else hopper.output(x, w, h, b, bias, scale, gelu, seed, threshold)
    if y is not None:
        return y
    config = output_config(x, b, seed)
    if config.CUBLAS:
        y = F.linear(x, w, bias)
        return dense_output(None, None, h, b, None, scale, gelu, seed, threshold, y, ADD_UPDATE)
    y = x.new_empty(x.shape[0], w.shape[0])
    return dense_output(x, w, h, b, bias, scale, gelu, seed, threshold, y, config)


class DispatchPasses(Passes):
    """The passes of ``kernels``, each replaced by a faster one where there is one."""

    __slots__ = ()

    def forward(
        self,
        x: Tensor,
        w: Tensor,
        encoder: Tensor,
        core: Tensor,
        decoder: Tensor,
        bias: Tensor | None,
        scale: float,
        gelu: bool,
        seed: Tensor | None,
        dropout_p: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """See ``kernels.dense_lora_forward``."""
        hopper = _hopper(x.device)
        if hopper is not None and hopper.serves(x, w, decoder.shape[1], seed):
            factor = self.factor(decoder, core, x)
            done = hopper.forward(x, w, encoder.to(x.dtype), factor, bias, scale, gelu, seed, dropout_p)
            if done is not None:
                return done
        return super().forward(x, w, encoder, core, decoder, bias, scale, gelu, seed, dropout_p)

    def backward(
        self,
        dy: Tensor,
        x: Tensor | None,
        w: Tensor | None,
        encoder: Tensor | None,
        core: Tensor,
        decoder: Tensor,
        u: Tensor | None,
        h: Tensor,
        mask: Tensor | None,
        scale: float,
        gelu: bool,
        seed: Tensor | None,
        dropout_p: float,
        need_x: bool,
        need_encoder: bool,
        need_core: bool,
        need_decoder: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """See ``kernels.dense_lora_backward``; a mask that was kept is used again."""
        if mask is None or not (need_x or need_encoder):
            return super().backward(
                dy, x, w, encoder, core, decoder, u, h, mask, scale, gelu, seed, dropout_p,
                need_x, need_encoder, need_core, need_decoder,
            )  # fmt: skip
        threshold = drop_threshold(dropout_p, seed)
        # drop₁ is linear: its factor goes into du, and its mask alone is left
        du, db = dense_backward_update(
            dy, self.factor(decoder, core, dy), h, u, scale, gelu, seed, threshold, decoder.dtype,
            need_core or need_decoder, 65536 / (65536 - threshold),
        )  # fmt: skip
        hopper = _hopper(dy.device)
        dx = hopper.masked_input(dy, w, du, encoder.to(dy.dtype), mask) if need_x else None
        d_encoder = hopper.masked_encoder(du, x, mask, core.dtype) if need_encoder else None
        return dx, d_encoder, *self.factor_gradients(db, core, decoder, False, need_core, need_decoder)

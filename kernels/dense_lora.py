"""DenseLoRA's forward and backward pass, of kernels alone; dispatch has its own choice of products.

Core and decoder act as one factor, b = decoder core, (N, R): z = h bᵀ. So everything of (M, R) is made by one
product with x and one with dy, and what the core adds is work on (N, R): d_decoder = db coreᵀ, d_core =
decoderᵀ db, where db = dzᵀ h.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._config import pick_for
from ._correlate import correlate
from .dense_lora_backward_update import dense_backward_update
from .dense_lora_hidden import activate
from .dense_lora_output import dense_output, output_config
from .lora_backward import lora_backward_a, lora_backward_b, lora_backward_input
from .lora_forward import drop_threshold, exact_hidden, lora_hidden

# rows of float32 whose sums over K are made in float64: among few of them errors do not hide, and that of u,
# which every gradient of factors has as a factor, is most of what they lose
_FEW = 64


class Passes(NamedTuple):
    """The products of a layer, those of LoRA under their names, and the big one with the activated update."""

    hidden: Callable[..., Tensor]
    output: Callable[..., Tensor]
    backward_b: Callable[..., Tensor]
    backward_a: Callable[..., Tensor]
    backward_input: Callable[..., Tensor]

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
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        """See ``reference.dense_lora_forward``; u and h in the dtype of ``x``."""
        threshold = drop_threshold(dropout_p, seed)
        first = None if seed is None else seed[:1]
        if x.dtype is torch.float32 and x.numel() and x.shape[0] <= _FEW:
            u = exact_hidden(x, encoder, first, threshold)
        else:
            u = self.hidden(x, encoder.to(x.dtype), 1.0, first, dropout_p).contiguous()
        h = activate(u, gelu, seed, threshold)
        y = self.output(x, w, h, self.factor(decoder, core, x), bias, scale, gelu, seed, threshold)
        return y, u, h, None

    def factor(self, decoder: Tensor, core: Tensor, like: Tensor) -> Tensor:
        """Return b = decoder core in the dtype of ``like``, rounded once."""
        return self.hidden(decoder, core.T, 1.0, None, 0.0).to(like.dtype)

    def factor_gradients(
        self,
        db: Tensor | None,
        core: Tensor,
        decoder: Tensor,
        exact: bool,
        need_core: bool,
        need_decoder: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of core and decoder, from that of their product; ``exact``: in float64."""
        if exact:
            wide = torch.float64
            d_core = (decoder.T.to(wide) @ db.to(wide)).to(db.dtype) if need_core else None
            return d_core, (db.to(wide) @ core.T.to(wide)).to(db.dtype) if need_decoder else None
        d_core = self.backward_b(decoder, db) if need_core else None
        return d_core, self.hidden(db, core, 1.0, None, 0.0) if need_decoder else None

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
        """See ``reference.dense_lora_backward``. Masks are made anew from the seeds: ``mask`` is not read."""
        threshold, first = drop_threshold(dropout_p, seed), None if seed is None else seed[:1]
        need_b = need_core or need_decoder
        du, db = dense_backward_update(
            dy, self.factor(decoder, core, dy), h, u if need_x or need_encoder else None,
            scale, gelu, seed, threshold, decoder.dtype, need_b,
        )  # fmt: skip
        dx = d_encoder = None
        if need_x:
            dx = self.backward_input(dy, w, du, encoder.to(dy.dtype), first, dropout_p)
        if need_encoder:
            d_encoder = self.encoder_gradient(du, x, first, dropout_p, decoder.dtype)
        # what a float32 layer is measured against takes these sums in another order, and loses less
        exact = dy.dtype is torch.float32
        return dx, d_encoder, *self.factor_gradients(db, core, decoder, exact, need_core, need_decoder)

    def encoder_gradient(
        self, du: Tensor, x: Tensor, seed: Tensor | None, dropout_p: float, dtype: torch.dtype
    ) -> Tensor:
        """Return ``duᵀ drop(x)``, (R, K), rounded to ``dtype`` alone."""
        if dtype == du.dtype:
            return self.backward_a(du, x, seed, dropout_p)
        K, R = x.shape[1], du.shape[1]
        config = pick_for("lora_backward_a", x, du, 0, K, R, seed)
        out = du.new_empty(R, K, dtype=dtype)
        correlate(x, du, seed, drop_threshold(dropout_p, seed), out.T, config)
        return out


def _output(
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
    y, config = x.new_empty(x.shape[0], w.shape[0]), output_config(x, b, seed)
    return dense_output(x, w, h, b, bias, scale, gelu, seed, threshold, y, config)


_PASSES = Passes(lora_hidden, _output, lora_backward_b, lora_backward_a, lora_backward_input)
dense_lora_forward, dense_lora_backward = _PASSES.forward, _PASSES.backward

"""The autograd Function behind ``dense_lora_linear``."""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ._library import is_traced, run_here
from .lora_linear import RefuseSecondDerivative, as_rows, transposed_product

__all__ = ["DenseLoRAFunction"]


class DenseOptions(NamedTuple):
    """``impl`` names the implementation; ``module`` is it, or None where the library's ops must be called."""

    scale: float
    gelu: bool
    dropout_p: float
    impl: str
    module: ModuleType | None


class DenseLoRAFunction(torch.autograd.Function):
    """y = x wᵀ + bias + scale·D₃(g(z)), z = v decoderᵀ, v = h coreᵀ, h = D₂(g(u)), u = D₁(x) encoderᵀ.

    x (…, K), w (N, K), encoder (R, K), core (R, R), decoder (N, R) -> y (…, N); u, h, v (M, R), z (M, N). D
    is a mask of (seed, element) and the factor 1 / keep probability, g the exact GELU or nothing. With ∘ the
    elementwise product and dz = scale·D₃(dy) ∘ g'(z), dv = dz decoder, du = D₂(dv core) ∘ g'(u):
        dx = dy w + D₁(du encoder)    d_encoder = duᵀ D₁(x)    d_core = dvᵀ h    d_decoder = dzᵀ v
    Saves only what those need: x if encoder or w trains, h if anything of the adapter or x does, u if what
    lies before it does. Nothing of (M, N) is kept or, in the kernels, made: z is made again tile by tile.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        w: Tensor,
        encoder: Tensor,
        core: Tensor,
        decoder: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
        options: DenseOptions,
    ) -> Tensor:
        rows, (scale, gelu, dropout_p, impl, module) = as_rows(x), options
        arguments = (rows, w, encoder, core, decoder, bias, scale, gelu, seed, dropout_p)
        if module is None:
            y, u, h, mask = torch.ops.lowrank_ops.dense_lora_forward(*arguments, impl)
            mask = mask if mask.dim() == 2 else None
        else:
            y, u, h, mask = run_here(module.dense_lora_forward, *arguments)
        need_x, need_w, need_encoder, need_core, need_decoder, _ = ctx.needs_input_grad[:6]
        need_u = need_x or need_encoder
        adapts = need_u or need_core or need_decoder
        ctx.save_for_backward(
            rows if need_encoder or need_w else None,
            w if need_x else None,
            encoder if need_x else None,
            core if adapts else None,
            decoder if adapts else None,
            u if need_u else None,
            h if adapts else None,
            mask if need_u else None,
            seed if adapts else None,
        )
        ctx.options, ctx.shape = options, x.shape
        # in place: a view made in here could not be written to by the caller
        return y if rows is x else y.resize_(*x.shape[:-1], w.shape[0])

    @staticmethod
    def backward(ctx, dy: Tensor):
        if not torch.is_grad_enabled():
            return *DenseLoRAFunction._gradients(ctx, dy), None, None
        with torch.no_grad():
            grads = DenseLoRAFunction._gradients(ctx, dy)
        grads = RefuseSecondDerivative.apply("dense_lora_linear", dy.new_empty(0).requires_grad_(), *grads)
        return *grads, None, None

    @staticmethod
    def _gradients(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, encoder, core, decoder, u, h, mask, seed = ctx.saved_tensors
        scale, gelu, dropout_p, impl, module = ctx.options
        need_x, need_w, *need_factors, need_bias = ctx.needs_input_grad[:6]
        dy, needs, grads = as_rows(dy), (need_x, *need_factors), (None,) * 4
        if any(needs):
            arguments = (dy, x, w, encoder, core, decoder, u, h, mask, scale, gelu, seed, dropout_p, *needs)
            if module is None or is_traced(dy):
                grads = torch.ops.lowrank_ops.dense_lora_backward(*arguments, impl)
                grads = tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))
            else:
                grads = run_here(module.dense_lora_backward, *arguments)
        dx, *factors = grads
        if need_x and len(ctx.shape) != 2:
            dx = dx.view(ctx.shape)
        # the dtypes of the forward pass hold, whatever autocast says by now
        dw = run_here(transposed_product, dy, x) if need_w else None
        return dx, dw, *factors, dy.sum(0) if need_bias else None

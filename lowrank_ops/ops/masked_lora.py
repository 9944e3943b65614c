"""The autograd Function of ``masked_lora_linear``."""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ._library import is_traced, run_here
from .lora_linear import RefuseSecondDerivative, as_rows, transposed_product

__all__ = ["MaskedLoRAFunction", "Options"]


class Options(NamedTuple):
    """``impl`` names the implementation; ``module`` is it, or None where the library's ops must be called.

    ``train_count``: entries of the train mask.
    """

    scale: float
    dropout_p: float
    train_count: int
    impl: str
    module: ModuleType | None


class MaskedLoRAFunction(torch.autograd.Function):
    """y = x wᵀ + h bᵀ + bias, h = scale·drop(x) aᵀ; b (N, R) has ``values`` at a mask's entries, else zero.

    With dh = scale·dy b:   dx = dy w + drop(dh a)    da = dhᵀ drop(x)    dw = dyᵀ x
    and of db = dyᵀ h only what the train mask has, packed as ``values`` are. Saves only what those need: x if
    a or w trains, h if values train. With a frozen a, as in LoRI, that is (M, R) numbers; b is unpacked
    anew in backward, so no dense copy of it is kept.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        w: Tensor,
        a: Tensor,
        values: Tensor,
        bias: Tensor | None,
        words: Tensor,
        offsets: Tensor,
        train_words: Tensor | None,
        train_offsets: Tensor | None,
        seed: Tensor | None,
        options: Options,
    ) -> Tensor:
        rows, (scale, dropout_p, _, impl, module) = as_rows(x), options
        given = (w, a, values, words, offsets, bias, scale, seed, dropout_p)
        if module is None:
            op = torch.ops.lowrank_ops.masked_lora_forward
            y, h, kept = op(rows, *given, impl)
            kept = kept if kept.dim() == 2 else None
        else:
            y, h, kept = run_here(module.masked_lora_forward, rows, *given)
        need_x, need_w, need_a, need_b, _ = ctx.needs_input_grad[:5]
        need_dh = need_x or need_a
        ctx.save_for_backward(
            rows if need_a or need_w else None,
            w if need_x else None,
            a if need_dh else None,
            h if need_b else None,
            kept if need_dh else None,
            seed if need_dh else None,
            *((values, words, offsets) if need_dh or need_b else (None, None, None)),
            *((train_words, train_offsets) if need_b else (None, None)),
        )
        ctx.options, ctx.shape = options, x.shape
        # in place: a view made in here could not be written to by the caller
        return y if rows is x else y.resize_(*x.shape[:-1], w.shape[0])

    @staticmethod
    def backward(ctx, dy: Tensor):
        if not torch.is_grad_enabled():
            return *MaskedLoRAFunction._gradients(ctx, dy), *[None] * 6
        with torch.no_grad():
            grads = MaskedLoRAFunction._gradients(ctx, dy)
        # as in LoRALinearFunction
        anchor = dy.new_empty(0).requires_grad_()
        grads = RefuseSecondDerivative.apply("masked_lora_linear", anchor, *grads)
        return *grads, *[None] * 6

    @staticmethod
    def _gradients(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, a, h, kept, seed, values, words, offsets, *train = ctx.saved_tensors
        scale, dropout_p, train_count, impl, module = ctx.options
        need_x, need_w, need_a, need_b, need_bias = ctx.needs_input_grad[:5]
        dy = as_rows(dy)
        needs = (need_x, need_a, need_b)
        dx = da = dvalues = None
        if any(needs):
            given = (x, w, a, values, words, offsets, *train, train_count, h, kept, scale, seed, dropout_p)
            if module is None or is_traced(dy):
                grads = torch.ops.lowrank_ops.masked_lora_backward(dy, *given, *needs, impl)
                dx, da, dvalues = (grad if need else None for grad, need in zip(grads, needs, strict=True))
            else:
                dx, da, dvalues = run_here(module.masked_lora_backward, dy, *given, *needs)
        if need_x and len(ctx.shape) != 2:
            dx = dx.view(ctx.shape)
        dw = run_here(transposed_product, dy, x) if need_w else None
        return dx, dw, da, dvalues, dy.sum(0) if need_bias else None

"""The autograd Function behind ``lora_linear``."""

import torch
from torch import Tensor

from ._library import no_autocast

__all__ = ["LoRALinearFunction"]


class _RefuseSecondDerivative(torch.autograd.Function):
    """Passes gradients on, and raises where somebody differentiates them again."""

    @staticmethod
    def forward(ctx, anchor: Tensor, *grads: Tensor | None):
        return tuple(None if grad is None else grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx, *second: Tensor | None):
        raise RuntimeError(
            "lora_linear: gradients must not be differentiated again, got a second backward pass; "
            "its kernels have no second derivative: write the layer out in PyTorch where you need one"
        )


class LoRALinearFunction(torch.autograd.Function):
    """y = x wᵀ + h bᵀ + bias, h = scale·drop(x) aᵀ.   x (M, K), w (N, K), a (R, K), b (N, R) -> y (M, N).

    With dh = scale·dy b:   dx = dy w + drop(dh a)    da = dhᵀ drop(x)    db = dyᵀ h    dw = dyᵀ x
    where drop is the mask of (seed, element) and the factor 1 / keep probability, made anew each time.
    Saves only what those need: x if a or w trains, h if b trains. A frozen a, as in LoRA-FA or LoRI,
    therefore keeps (M, R) numbers for backward instead of (M, K).
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        w: Tensor,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
        scale: float,
        dropout_p: float,
        impl: str,
    ) -> Tensor:
        y, h = torch.ops.lowrank_ops.lora_forward(x, w, a, b, bias, scale, seed, dropout_p, impl)
        need_x, need_w, need_a, need_b, _ = ctx.needs_input_grad[:5]
        ctx.save_for_backward(
            x if need_a or need_w else None,
            w if need_x else None,
            a if need_x else None,
            b if need_x or need_a else None,
            h if need_b else None,
            seed if need_x or need_a else None,
        )
        ctx.scale, ctx.dropout_p, ctx.impl = scale, dropout_p, impl
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        with torch.no_grad():
            grads = LoRALinearFunction._gradients(ctx, dy)
        if torch.is_grad_enabled():
            # once_differentiable would take dx for a constant where dy is one, though w, a and b are in it
            grads = _RefuseSecondDerivative.apply(dy.new_empty(0).requires_grad_(), *grads)
        return *grads, None, None, None, None

    @staticmethod
    def _gradients(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        ops, impl, dropout_p = torch.ops.lowrank_ops, ctx.impl, ctx.dropout_p
        x, w, a, b, h, seed = ctx.saved_tensors
        need_x, need_w, need_a, need_b, need_bias = ctx.needs_input_grad[:5]
        dx = dw = da = db = dbias = None
        if (need_x or need_a) and need_b:
            dh, db = ops.lora_backward_hidden_b(dy, b, h, ctx.scale, impl)
        elif need_x or need_a:
            dh = ops.lora_backward_hidden(dy, b, ctx.scale, impl)
        elif need_b:
            db = ops.lora_backward_b(dy, h, impl)
        if need_x:
            dx = ops.lora_backward_input(dy, w, dh, a, seed, dropout_p, impl)
        if need_a:
            da = ops.lora_backward_a(dh, x, seed, dropout_p, impl)
        if need_w:
            # as in the ops: the dtypes of the forward pass hold, whatever autocast says by now
            with no_autocast(dy.device):
                dw = dy.T @ x
        if need_bias:
            dbias = dy.sum(0)
        return dx, dw, da, db, dbias

"""The autograd Function behind ``lora_linear``."""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ._library import is_traced, run_here

__all__ = ["LoRALinearFunction"]


class RefuseSecondDerivative(torch.autograd.Function):
    """Passes gradients on, and raises where somebody differentiates them again."""

    @staticmethod
    def forward(ctx, op: str, anchor: Tensor, *grads: Tensor | None):
        ctx.op = op
        return tuple(None if grad is None else grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx, *second: Tensor | None):
        raise RuntimeError(
            f"{ctx.op}: gradients must not be differentiated again, got a second backward pass; "
            "its kernels have no second derivative: write the layer out in PyTorch where you need one"
        )


class Options(NamedTuple):
    """``impl`` names the implementation; ``module`` is it, or None where the library's ops must be called.

    ``passes`` has the passes that the host has seen before, if there is such a module, and ``found`` is the
    one for this call, if there is one.
    """

    scale: float
    dropout_p: float
    impl: str
    module: ModuleType | None
    passes: ModuleType | None
    found: object | None


class LoRALinearFunction(torch.autograd.Function):
    """y = x wᵀ + h bᵀ + bias, h = scale·drop(x) aᵀ.   x (…, K), w (N, K), a (R, K), b (N, R) -> y (…, N).

    With dh = scale·dy b:   dx = dy w + drop(dh a)    da = dhᵀ drop(x)    db = dyᵀ h    dw = dyᵀ x
    where drop is the mask of (seed, element) and the factor 1 / keep probability, made anew each time
    unless the implementation keeps it. Saves only what those need: x if a or w trains, h if b trains. A
    frozen a, as in LoRA-FA or LoRI, therefore keeps (M, R) numbers for backward instead of (M, K).
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
        options: Options,
    ) -> Tensor:
        done = None
        if options.found is not None:
            done = options.passes.known_forward(options.found, x, (w, a, b, bias), seed)
        if done is None:
            y, h, mask = LoRALinearFunction._outputs(x, w, a, b, bias, seed, options)
        else:
            (y,), h, mask = done
        need_x, need_w, need_a, need_b, _ = ctx.needs_input_grad[:5]
        need_dh = need_x or need_a
        ctx.save_for_backward(
            x if need_a or need_w else None,
            w if need_x else None,
            a if need_x else None,
            b if need_dh else None,
            h if need_b else None,
            mask if need_dh else None,
            seed if need_dh else None,
        )
        ctx.options, ctx.shape = options, x.shape
        return y

    @staticmethod
    def _outputs(
        x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, seed: Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        rows, (scale, dropout_p, impl, module, passes, _) = as_rows(x), options
        if module is None:
            op = torch.ops.lowrank_ops.lora_forward
            y, h, mask = op(rows, w, a, b, bias, scale, seed, dropout_p, impl)
            mask = mask if mask.dim() == 2 else None
        elif passes is not None:
            lists = ((w,), (a,), (b,), (bias,), (scale,))
            function = module.lora_group_forward
            (y,), h, mask = run_here(passes.lora_group_forward, rows, *lists, seed, dropout_p, function)
        else:
            y, h, mask = run_here(module.lora_forward, rows, w, a, b, bias, scale, seed, dropout_p)
        # in place: a view made in here could not be written to by the caller
        return y if rows is x else y.resize_(*x.shape[:-1], w.shape[0]), h, mask

    @staticmethod
    def backward(ctx, dy: Tensor):
        if not torch.is_grad_enabled():
            return *LoRALinearFunction._gradients(ctx, dy), None, None
        with torch.no_grad():
            grads = LoRALinearFunction._gradients(ctx, dy)
        # once_differentiable would take dx for a constant where dy is one, though w, a and b are in it
        grads = RefuseSecondDerivative.apply("lora_linear", dy.new_empty(0).requires_grad_(), *grads)
        return *grads, None, None

    @staticmethod
    def _gradients(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, a, b, h, mask, seed = ctx.saved_tensors
        scale, dropout_p, impl, module, passes, _ = ctx.options
        need_x, need_w, need_a, need_b, need_bias, _, _ = ctx.needs_input_grad
        passes = None if passes is None or not (need_x and need_b) or is_traced(dy) else passes
        if passes is not None and not (need_w or need_bias):
            done = passes.known_backward((dy,), x, (w,), (a,), (b,), h, mask, (scale,), seed, dropout_p)
            if done is not None:
                return done[0], None, done[1] if need_a else None, done[-1], None
        dy, x = as_rows(dy), None if x is None else as_rows(x)
        if h is not None and h.shape[0] != dy.shape[0]:
            h = h[: dy.shape[0]]
        needs = (need_x, need_a, need_b)
        dx = da = db = None
        if not any(needs):
            pass
        elif module is None or is_traced(dy):
            op = torch.ops.lowrank_ops.lora_backward
            grads = op(dy, x, w, a, b, h, mask, scale, seed, dropout_p, *needs, impl)
            dx, da, db = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        elif passes is not None:
            given = ((dy,), x, (w,), (a,), (b,), h, mask, (scale,), seed, dropout_p, True, (need_a,), (True,))
            function = module.lora_group_backward
            dx, (da,), (db,) = run_here(
                lambda _, *rest: passes.lora_group_backward(*rest), dy, *given, function
            )
        else:
            dx, da, db = run_here(
                module.lora_backward, dy, x, w, a, b, h, mask, scale, seed, dropout_p, *needs
            )
        if need_x and len(ctx.shape) != 2:
            dx = dx.view(ctx.shape)
        # the dtypes of the forward pass hold, whatever autocast says by now
        dw = run_here(transposed_product, dy, x) if need_w else None
        return dx, dw, da, db, dy.sum(0) if need_bias else None


def as_rows(t: Tensor) -> Tensor:
    """Return ``t`` as (M, its last dimension)."""
    dims = t.dim()
    return t if dims == 2 else t.flatten(0, -2) if dims > 2 else t[None]


def transposed_product(dy: Tensor, x: Tensor) -> Tensor:
    return dy.T @ x

"""The autograd Function behind ``pruned_linear``."""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ._library import is_traced, run_here
from .lora_linear import RefuseSecondDerivative, as_rows

__all__ = ["PrunedLinearFunction", "PrunedOptions"]


class PrunedOptions(NamedTuple):
    """``impl`` names the implementation; ``module`` is it, or None where the library's ops must be called."""

    N: int
    scale: float
    impl: str
    module: ModuleType | None


class PrunedLinearFunction(torch.autograd.Function):
    """y = x wᵀ + h bᵀ + bias, h = scale·x aᵀ.   x (…, K), a (R, K), b (N, R) -> y (…, N); w compressed.

    With dh = scale·dy b:   dx = dy w + dh a    da = dhᵀ x    db = dyᵀ h
    w, (N, K), is the tensors in ``packed``: frozen, read by both passes, and kept for backward only if x
    trains. Saves x if a trains, h if b does. Without an adapter a, b and h are None.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        bias: Tensor | None,
        options: PrunedOptions,
        *packed: Tensor,
    ) -> Tensor:
        rows, (N, scale, impl, module) = as_rows(x), options
        arguments = (rows, list(packed), N, a, b, bias, scale)
        if module is None:
            y, h = torch.ops.lowrank_ops.pruned_matmul(*arguments, impl)
        else:
            y, h = run_here(module.pruned_matmul, *arguments)
        need_x, need_a, need_b, _ = ctx.needs_input_grad[:4]
        ctx.save_for_backward(
            rows if need_a else None,
            a if need_x else None,
            b if need_x or need_a else None,
            h if need_b else None,
            *(packed if need_x else ()),
        )
        ctx.options, ctx.shape = options, x.shape
        # in place: a view made in here could not be written to by the caller
        return y if rows is x else y.resize_(*x.shape[:-1], N)

    @staticmethod
    def backward(ctx, dy: Tensor):
        nothing = (None,) * (len(ctx.needs_input_grad) - 4)
        if not torch.is_grad_enabled():
            return *PrunedLinearFunction._gradients(ctx, dy), *nothing
        with torch.no_grad():
            grads = PrunedLinearFunction._gradients(ctx, dy)
        grads = RefuseSecondDerivative.apply("pruned_linear", dy.new_empty(0).requires_grad_(), *grads)
        return *grads, *nothing

    @staticmethod
    def _gradients(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, h, *packed = ctx.saved_tensors
        _, scale, impl, module = ctx.options
        *needs, need_bias = ctx.needs_input_grad[:4]
        dy, grads = as_rows(dy), (None,) * 3
        if any(needs):
            arguments = (dy, x, packed, ctx.shape[-1], a, b, h, scale, *needs)
            if module is None or is_traced(dy):
                grads = torch.ops.lowrank_ops.pruned_backward(*arguments, impl)
                grads = tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))
            else:
                grads = run_here(module.pruned_backward, *arguments)
        dx, da, db = grads
        if needs[0] and len(ctx.shape) != 2:
            dx = dx.view(ctx.shape)
        return dx, da, db, dy.sum(0) if need_bias else None

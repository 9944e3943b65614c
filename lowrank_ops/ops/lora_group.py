"""The autograd Function behind ``lora_linear_group``."""

from types import ModuleType

import torch
from torch import Tensor

from ._library import is_traced, run_here
from .lora_linear import Options, RefuseSecondDerivative, as_rows, transposed_product

__all__ = ["LoRAGroupFunction"]


class LoRAGroupFunction(torch.autograd.Function):
    """y = x wᵀ + h bᵀ + bias, h = scale·drop(x) aᵀ, for P projections of one x (…, K): P outputs y (…, N).

    ``tensors`` are P of each: w (N, K), a (R, K), b (N, R), bias (N,) or None; N, R and scale may differ.
    With dh = scale·dy b:   dx = Σ dy w + drop(Σ dh a)    da = dhᵀ drop(x)    db = dyᵀ h    dw = dyᵀ x
    where drop is one mask for all. Every h lies in one tensor, (M, ΣR). Saves x once, if any a or w trains,
    and h if any b does; w and a only if x needs a gradient. An output that nobody uses costs nothing in
    backward. ``options`` are as ``lora_linear``'s, with all scales.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        seed: Tensor | None,
        options: Options,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        P, done = len(options.scale), None
        if options.found is not None:
            done = options.passes.known_forward(options.found, x, tensors, seed)
        ys, h, mask = LoRAGroupFunction._outputs(x, seed, options, tensors) if done is None else done
        need_x, _, _, *needs = ctx.needs_input_grad
        need_a, need_b = any(needs[P : 2 * P]), any(needs[2 * P : 3 * P])
        # x and all factors, and nothing else
        frozen = any(needs[:P]) or any(needs[3 * P :])
        ctx.trains_all = need_x and all(needs[P : 3 * P]) and not frozen
        ctx.save_for_backward(
            x if need_a or any(needs[:P]) else None,
            h if need_b else None,
            mask if need_x or need_a else None,
            seed if need_x or need_a else None,
            *(tensors[: 2 * P] if need_x else ()),
            *(tensors[2 * P : 3 * P] if need_x or need_a or need_b else ()),
        )
        ctx.options, ctx.shape = options, x.shape
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def _outputs(
        x: Tensor, seed: Tensor | None, options: Options, tensors: tuple[Tensor | None, ...]
    ) -> tuple[list[Tensor], Tensor, Tensor | None]:
        scales, dropout_p, impl, module, passes, _ = options
        P = len(scales)
        rows, parts = as_rows(x), [list(tensors[i : i + P]) for i in range(0, 4 * P, P)]
        arguments = (rows, *parts, list(scales), seed, dropout_p)
        if module is None:
            ys, h, mask = torch.ops.lowrank_ops.lora_group_forward(*arguments, impl)
            mask = mask if mask.dim() == 2 else None
        else:
            function, rest = module.lora_group_forward, ()
            if passes is not None:
                function, rest = passes.lora_group_forward, (function,)
            ys, h, mask = run_here(function, *arguments, *rest)
        if rows is not x:
            # in place: a view made in here could not be written to by the caller
            ys = [y.resize_(*x.shape[:-1], y.shape[1]) for y in ys]
        return ys, h, mask

    @staticmethod
    def backward(ctx, *dys: Tensor | None):
        ctx.spent = True
        if not torch.is_grad_enabled():
            return LoRAGroupFunction._gradients(ctx, dys)
        with torch.no_grad():
            grads = LoRAGroupFunction._gradients(ctx, dys)
        anchor = next((dy for dy in dys if dy is not None), None)
        if anchor is None:
            return grads
        # once_differentiable would take dx for a constant where dy is one, though w, a and b are in it
        return RefuseSecondDerivative.apply("lora_linear_group", anchor.new_empty(0).requires_grad_(), *grads)

    @staticmethod
    def _gradients(ctx, dys: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        x, h, mask, seed, *factors = ctx.saved_tensors
        scales, dropout_p, impl, module, passes, _ = ctx.options
        P = len(scales)
        every = ctx.trains_all and all(dy is not None for dy in dys)
        if every and passes is not None and not is_traced(dys[0]):
            ws, a_list, b_list = factors[:P], factors[P : 2 * P], factors[2 * P :]
            done = passes.known_backward(dys, x, ws, a_list, b_list, h, mask, scales, seed, dropout_p)
            if done is not None:
                dx, *grads = done
                return dx, None, None, *(None,) * P, *grads, *(None,) * P
        first = next((dy for dy in dys if dy is not None), None)
        if first is None:
            return (None,) * (3 + 4 * P)
        need_x = ctx.needs_input_grad[0]
        needs = [need and dy is not None for need, dy in zip(ctx.needs_input_grad[3:], dys * 4, strict=True)]
        need_w, need_a, need_b, need_bias = (needs[i : i + P] for i in range(0, 4 * P, P))
        x = None if x is None else as_rows(x)
        if h is not None and h.shape[0] != first.numel() // first.shape[-1]:
            h = h[: first.numel() // first.shape[-1]]
        dys = [None if dy is None else as_rows(dy) for dy in dys]
        dx, das, dbs = None, [None] * P, [None] * P
        if need_x or any(need_a) or any(need_b):
            ws, a_list = (factors[:P], factors[P : 2 * P]) if need_x else ([], [])
            arguments = (dys, x, ws, a_list, factors[-P:], h, mask, list(scales), seed, dropout_p)
            chosen = None if is_traced(first) else module
            dx, das, dbs = _backward(chosen, passes, impl, first, *arguments, need_x, need_a, need_b)
        if need_x and len(ctx.shape) != 2:
            dx = dx.view(ctx.shape)
        # the dtypes of the forward pass hold, whatever autocast says by now
        dws = [
            run_here(transposed_product, dy, x) if need else None
            for dy, need in zip(dys, need_w, strict=True)
        ]
        dbiases = [dy.sum(0) if need else None for dy, need in zip(dys, need_bias, strict=True)]
        return dx, None, None, *dws, *das, *dbs, *dbiases


def _backward(
    module: ModuleType | None, passes: ModuleType | None, impl: str, first: Tensor, *arguments: object
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    if module is not None and passes is not None:
        function = module.lora_group_backward
        return run_here(lambda _, *rest: passes.lora_group_backward(*rest), first, *arguments, function)
    if module is not None:
        return run_here(lambda _, *rest: module.lora_group_backward(*rest), first, *arguments)
    need_x, need_a, need_b = arguments[-3:]
    dx, das, dbs = torch.ops.lowrank_ops.lora_group_backward(*arguments, impl)
    das, dbs = (
        [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        for grads, needs in ((das, need_a), (dbs, need_b))
    )
    return dx if need_x else None, das, dbs

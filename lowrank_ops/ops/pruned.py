"""The autograd Function behind ``pruned_linear``."""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ._library import is_traced, run_here
from .lora_linear import RefuseSecondDerivative, as_rows

__all__ = ["PrunedLinearFunction", "PrunedOptions", "SparseCopy"]


class SparseCopy(NamedTuple):
    """A 2:4 weight for cuSPARSELt, taken for ``tokens`` rows of x and more.

    ``weight`` is what ``torch._cslt_compress`` makes of it, ``algorithm`` a number of cuSPARSELt's own.
    """

    weight: Tensor
    tokens: int
    algorithm: int


class PrunedOptions(NamedTuple):
    """``impl`` names the implementation; ``module`` is it, or None where the library's ops must be called.

    ``sparse`` is the weight once more, or None.
    """

    N: int
    scale: float
    impl: str
    module: ModuleType | None
    sparse: SparseCopy | None = None


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
        rows, (N, scale, impl, module, sparse) = as_rows(x), options
        arguments = (rows, list(packed), N, a, b, bias, scale)
        if module is None:
            y, h = torch.ops.lowrank_ops.pruned_matmul(*arguments, impl)
        elif sparse is not None and rows.shape[0] >= sparse.tokens:
            y, h = run_here(_sparse_matmul, rows, sparse, a, b, bias, scale, module)
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
        _, scale, impl, module, _ = ctx.options
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


def _sparse_matmul(
    x: Tensor,
    sparse: SparseCopy,
    a: Tensor | None,
    b: Tensor | None,
    bias: Tensor | None,
    scale: float,
    module: ModuleType,
) -> tuple[Tensor, Tensor | None]:
    """Return ``module.pruned_matmul``'s y and h, by cuSPARSELt; the update is added to a rounded product."""
    M = x.shape[0]
    # it takes multiples of eight rows
    rows = torch.nn.functional.pad(x, (0, 0, 0, -M % 8)) if M % 8 else x.contiguous()
    h = None if a is None else module.lora_hidden(x, a, scale, None, 0.0)
    y = torch._cslt_sparse_mm(
        sparse.weight, rows.T, bias=bias, transpose_result=True, alg_id=sparse.algorithm
    )
    y.resize_(M, y.shape[1])
    return y if h is None else y.addmm_(h.to(y.dtype), b.to(y.dtype).T), h

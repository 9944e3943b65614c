"""A linear layer with a sparse up-projection: check once, pick an implementation, call the Function."""

import torch
from torch import Tensor

from .functional import (
    _DTYPES,
    _MAX_RANK,
    _autocast,
    _check_options,
    _check_tensor,
    _pick_impl,
)
from .ops.masked_lora import MaskedLoRAFunction, Options
from .sparse_mask import SparseMask

__all__ = ["masked_lora_linear"]

_OP = "masked_lora_linear"


def masked_lora_linear(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b_values: Tensor,
    b_mask: SparseMask,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    train_mask: SparseMask | None = None,
    impl: str = "auto",
) -> Tensor:
    """Linear layer with a low-rank update whose up-projection exists at the entries of a mask alone.

    Equals ``lora_linear(x, w, a, b_mask.unpack(b_values), bias, scale=scale, dropout_p=dropout_p)``; the
    parameter, its gradient and so an optimizer's state are vectors of nnz numbers, with any optimizer.

    Args:
        x: input, (..., K), any leading dimensions and strides; float16, bfloat16 or float32 (float64 on the
            reference).
        w: base weight, (N, K), dtype of ``x``. Usually frozen; trains if it requires a gradient.
        a: down-projection, (R, K), dtype of ``x``, or float32 beside a 16-bit ``x``; frozen in LoRI.
            1 ≤ R ≤ 512.
        b_values: the entries of the up-projection, (nnz,), dtype of ``a``, in the order of ``b_mask.pack``.
        b_mask: which entries of (N, R) there are. Any mask is taken: rows without entries, none, all.
        bias: (N,), dtype of ``x``, or None.
        scale: finite factor on the update, dimensionless.
        dropout_p: probability, in [0, 1), of dropping an element of the adapter's input, as ``lora_linear``.
        train_mask: entries that train, a mask inside ``b_mask``, or None for all. The gradient is exactly
            zero elsewhere: continual learning trains some entries and keeps the others. That it lies inside
            is not checked; an entry which ``b_mask`` lacks has no effect.
        impl: "auto" (Triton on a GPU, else the reference), "triton" or "reference".

    Returns:
        (..., N), dtype of ``x`` (under autocast, autocast's). Gradients flow to every tensor argument
        that requires one; second derivatives raise.

    Raises:
        ValueError: a shape, device or number does not fit. TypeError: a type or dtype does not.
        RuntimeError: the kernels cannot run here.

    Memory: keeps ``x`` for backward only if ``a`` or ``w`` trains, plus M·R numbers. On a GPU each pass has
    a scratch copy of b, N·R numbers, and the parts of its gradient's sum, at most 32 N·R float32 numbers.
    Source: Zhang et al. 2025, LoRI (arXiv:2504.07448); gradients derived in ops/masked_lora.py.
    """
    _check_options(_OP, scale, dropout_p, impl)
    _check_shapes(x, w, a, b_values, b_mask, bias, train_mask)
    kind = "cuda" if x.is_cuda else x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        x, w, a, b_values, bias = _autocast(kind, x, w, a, b_values, bias)
    _check_dtypes(x, w, a, b_values, bias)
    impl, module = _pick_impl(_OP, impl, x)
    seed = None
    if dropout_p > 0:
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    masks, count = (b_mask.words, b_mask.offsets, None, None), b_mask.nnz
    if train_mask is not None and train_mask is not b_mask:
        masks, count = (*masks[:2], train_mask.words, train_mask.offsets), train_mask.nnz
    options = Options(float(scale), float(dropout_p), count, impl, module)
    if module is not None:
        return MaskedLoRAFunction.apply(x, w, a, b_values, bias, *masks, seed, options)
    # a compiler is better served by views of its own
    rows = x.flatten(0, -2) if x.dim() > 1 else x[None]
    y = MaskedLoRAFunction.apply(rows, w, a, b_values, bias, *masks, seed, options)
    return y.view(*x.shape[:-1], w.shape[0])


def _check_shapes(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b_values: Tensor,
    b_mask: SparseMask,
    bias: Tensor | None,
    train_mask: SparseMask | None,
) -> None:
    for name, value, dims, spelled in (
        ("x", x, None, "(..., K)"),
        ("w", w, 2, "(N, K)"),
        ("a", a, 2, "(R, K)"),
        ("b_values", b_values, 1, "(nnz,)"),
    ):
        if not isinstance(value, Tensor):
            raise TypeError(f"{_OP}: {name} must be a Tensor, got {type(value).__name__}")
        if value.dim() < 1 if dims is None else value.dim() != dims:
            raise ValueError(f"{_OP}: {name} must be {spelled}, got {tuple(value.shape)}")
    (N, K), R = w.shape, a.shape[0]
    if x.shape[-1] != K:
        raise ValueError(f"{_OP}: x must be (..., K) with K = {K} as in w, got {tuple(x.shape)}")
    if not 1 <= R <= _MAX_RANK:
        raise ValueError(f"{_OP}: a must be (R, K) with 1 <= R <= {_MAX_RANK}, got {tuple(a.shape)}")
    _check_tensor(_OP, "w", w, x, "(N, K)", (N, K))
    _check_tensor(_OP, "a", a, x, "(R, K)", (R, K))
    if bias is not None:
        _check_tensor(_OP, "bias", bias, x, "(N,)", (N,))
    _check_mask("b_mask", b_mask, x, (N, R))
    if train_mask is not None:
        _check_mask("train_mask", train_mask, x, (N, R))
    _check_tensor(_OP, "b_values", b_values, x, "(nnz,)", (b_mask.nnz,))


def _check_mask(name: str, mask: object, x: Tensor, shape: tuple[int, int]) -> None:
    if not isinstance(mask, SparseMask):
        raise TypeError(f"{_OP}: {name} must be a SparseMask, got {type(mask).__name__}")
    if tuple(mask.shape) != shape:
        raise ValueError(f"{_OP}: {name} must be of shape (N, R) = {shape}, got {tuple(mask.shape)}")
    if mask.device != x.device:
        raise ValueError(f"{_OP}: {name} must be on the device of x, {x.device}, got {mask.device}")


def _check_dtypes(x: Tensor, w: Tensor, a: Tensor, b_values: Tensor, bias: Tensor | None) -> None:
    dtype, adapters = x.dtype, a.dtype
    if dtype not in _DTYPES:
        raise TypeError(f"{_OP}: x must be float16, bfloat16, float32 or float64, got {dtype}")
    if w.dtype != dtype:
        raise TypeError(f"{_OP}: w must have the dtype of x, {dtype}, got {w.dtype}; cast x or use autocast")
    if bias is not None and bias.dtype != dtype:
        raise TypeError(f"{_OP}: bias must have the dtype of x, {dtype}, got {bias.dtype}")
    if adapters != dtype and (adapters is not torch.float32 or dtype is torch.float64):
        raise TypeError(f"{_OP}: a must have the dtype of x, {dtype}, or float32, got {adapters}")
    if b_values.dtype != adapters:
        raise TypeError(f"{_OP}: b_values must have the dtype of a, {adapters}, got {b_values.dtype}")

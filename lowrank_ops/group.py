"""Projections that share one input: check once, pick an implementation, call the autograd Function."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .functional import (
    _DTYPES,
    _IMPLS,
    _MAX_RANK,
    _autocast,
    _check_options,
    _check_tensor,
    _fits,
    _implementation,
    _known_pass,
    _passes,
    _pick_impl,
    _seed,
)
from .ops.lora_group import LoRAGroupFunction
from .ops.lora_linear import Options

__all__ = ["lora_linear_group"]

_OP = "lora_linear_group"


def lora_linear_group(
    x: Tensor,
    ws: Sequence[Tensor],
    a_list: Sequence[Tensor],
    b_list: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    scales: Sequence[float],
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> tuple[Tensor, ...]:
    """Several linear layers with low-rank updates on one input, as q, k, v or gate and up.

    Equals ``tuple(lora_linear(x, w, a, b, bias, scale=scale, dropout_p=dropout_p) for ...)`` but for the
    dropout mask, which is one for all of them, and reads x once for every low-rank product: one pass for
    their down-projections, one for the gradients of all ``a``. The gradient of x is summed inside its matrix
    products, so the update reaches it with one rounding, and no sum is left to autograd.

    Args:
        x: input, (..., K), any leading dimensions and strides; float16, bfloat16 or float32 (float64 on the
            reference).
        ws: P base weights, each (N, K) with its own N, dtype of ``x``; P ≥ 1. One that requires a gradient
            gets it.
        a_list: P down-projections, each (R, K) with its own R, 1 ≤ R ≤ 512; all in the dtype of ``x``, or all
            float32 beside a 16-bit ``x``, as in ``lora_linear``.
        b_list: P up-projections, each (N, R), dtype of ``a_list``.
        biases: P biases (N,), dtype of ``x``, or None for none; or None where there is none at all.
        scales: P finite factors on the updates, dimensionless.
        dropout_p: probability, in [0, 1), of dropping an element of the adapters' input; exact to 2⁻¹⁷.
            Applied whenever positive: pass 0 in evaluation.
        impl: "auto" (Triton on a GPU, else the reference), "triton" or "reference".

    Returns:
        P tensors (..., N), dtype of ``x`` (under autocast, autocast's), none a view of another. Gradients
        flow to every tensor argument that requires one; an output that is not used costs backward nothing;
        second derivatives raise.

    Raises:
        ValueError: a length, shape, device or number does not fit. TypeError: a type or dtype does not.
        RuntimeError: the kernels cannot run here.

    Memory: keeps ``x`` for backward once, and only if an ``a`` or ``w`` trains, plus M·R numbers of each.
    Source: Hu et al. 2021, LoRA, eq. 3 (arXiv:2106.09685); gradients derived in ops/lora_group.py.
    """
    _check_lengths(ws, a_list, b_list, biases, scales)
    biases = (None,) * len(ws) if biases is None else biases
    passes, found = _known_pass(x, ws, a_list, b_list, biases, tuple(scales), dropout_p, impl)
    if found is not None:
        options = Options(tuple(scales), dropout_p, impl, _implementation(impl), passes, found)
        return LoRAGroupFunction.apply(x, _seed(x, dropout_p), options, *ws, *a_list, *b_list, *biases)
    projections = list(zip(ws, a_list, b_list, biases, strict=True))
    fitting = [_fits(x, *each, scale, dropout_p) for each, scale in zip(projections, scales, strict=True)]
    if impl not in _IMPLS or not all(fitting):
        for i, scale in enumerate(scales):
            _check_options(_OP, scale, dropout_p, impl, f"scales[{i}]")
        _check_shapes(x, projections)
    kind, cast = "cuda" if x.is_cuda else x.device.type, []
    if kind != "meta" and torch.is_autocast_enabled(kind):
        cast = [_autocast(kind, x, *each) for each in projections]
        x, projections = cast[0][0], [each[1:] for each in cast]
    _check_dtypes(x, projections)
    impl, module = _pick_impl(_OP, impl, x)
    seed = _seed(x, dropout_p)
    columns = zip(*projections, strict=True) if cast else (ws, a_list, b_list, biases)
    tensors = [t for column in columns for t in column]
    # a compiler is better served by views of its own
    rows = x if module is not None else x.flatten(0, -2) if x.dim() > 1 else x[None]
    passes = None if module is None else _passes(impl, x.device)
    options = Options(tuple(scales), dropout_p, impl, module, passes, None)
    ys = LoRAGroupFunction.apply(rows, seed, options, *tensors)
    return ys if module is not None else tuple(y.view(*x.shape[:-1], y.shape[1]) for y in ys)


def _check_lengths(ws: object, a_list: object, b_list: object, biases: object, scales: object) -> None:
    P = len(ws) if type(ws) is tuple else 0
    if P and all(type(own) is tuple and len(own) == P for own in (a_list, b_list, biases, scales)):
        return
    lists = {"ws": ws, "a_list": a_list, "b_list": b_list, "biases": biases, "scales": scales}
    for name, value in lists.items():
        if not isinstance(value, (list, tuple)) and not (name == "biases" and value is None):
            raise TypeError(f"{_OP}: {name} must be a list or a tuple, got {type(value).__name__}")
    if not ws:
        raise ValueError(f"{_OP}: ws must have at least one entry, got none")
    for name, value in lists.items():
        if value is not None and len(value) != len(ws):
            raise ValueError(f"{_OP}: {name} must have as many entries as ws, {len(ws)}, got {len(value)}")


def _check_shapes(x: Tensor, projections: list[tuple]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{_OP}: x must be a Tensor, got {type(x).__name__}")
    if x.dim() < 1:
        raise ValueError(f"{_OP}: x must be (..., K), got {tuple(x.shape)}")
    for i, (w, a, b, bias) in enumerate(projections):
        for name, spelled, value in ((f"ws[{i}]", "(N, K)", w), (f"a_list[{i}]", "(R, K)", a)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{_OP}: {name} must be a Tensor, got {type(value).__name__}")
            if value.dim() != 2:
                raise ValueError(f"{_OP}: {name} must be {spelled}, got {tuple(value.shape)}")
        (N, K), R = w.shape, a.shape[0]
        if x.shape[-1] != K:
            raise ValueError(f"{_OP}: x must be (..., K) with K = {K} as in ws[{i}], got {tuple(x.shape)}")
        if not 1 <= R <= _MAX_RANK:
            raise ValueError(
                f"{_OP}: a_list[{i}] must be (R, K) with 1 <= R <= {_MAX_RANK}, got {tuple(a.shape)}"
            )
        _check_tensor(_OP, f"ws[{i}]", w, x, "(N, K)", (N, K))
        _check_tensor(_OP, f"a_list[{i}]", a, x, "(R, K)", (R, K))
        _check_tensor(_OP, f"b_list[{i}]", b, x, "(N, R)", (N, R))
        if bias is not None:
            _check_tensor(_OP, f"biases[{i}]", bias, x, "(N,)", (N,))


def _check_dtypes(x: Tensor, projections: list[tuple]) -> None:
    dtype, adapters = x.dtype, projections[0][1].dtype
    if dtype not in _DTYPES:
        raise TypeError(f"{_OP}: x must be float16, bfloat16, float32 or float64, got {dtype}")
    if adapters != dtype and (adapters is not torch.float32 or dtype is torch.float64):
        raise TypeError(f"{_OP}: a_list[0] must have the dtype of x, {dtype}, or float32, got {adapters}")
    for i, (w, a, b, bias) in enumerate(projections):
        if w.dtype != dtype:
            raise TypeError(
                f"{_OP}: ws[{i}] must have the dtype of x, {dtype}, got {w.dtype}; cast x or use autocast"
            )
        if bias is not None and bias.dtype != dtype:
            raise TypeError(f"{_OP}: biases[{i}] must have the dtype of x, {dtype}, got {bias.dtype}")
        for name, factor in ((f"a_list[{i}]", a), (f"b_list[{i}]", b)):
            if factor.dtype != adapters:
                raise TypeError(
                    f"{_OP}: {name} must have the dtype of a_list[0], {adapters}, got {factor.dtype}"
                )

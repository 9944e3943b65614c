"""DenseLoRA's layer: check once, pick an implementation, call the autograd Function."""

import torch
from torch import Tensor

from .functional import _DTYPES, _IMPLS, _MAX_RANK, _check_options, _check_tensor, _fits, _pick_impl
from .ops.dense_lora import DenseLoRAFunction, DenseOptions

__all__ = ["dense_lora_linear"]

_OP = "dense_lora_linear"


def dense_lora_linear(
    x: Tensor,
    w: Tensor,
    encoder: Tensor,
    core: Tensor,
    decoder: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    impl: str = "auto",
    activation: str | None = "gelu",
) -> Tensor:
    """Linear layer with DenseLoRA's update: encoder, dense core and decoder, with a GELU after both ends.

    Equals, with g = ``F.gelu`` (exact) and D = ``F.dropout(·, dropout_p)``,
    ``F.linear(x, w, bias) + scale * D(g(F.linear(F.linear(D(g(F.linear(D(x), encoder))), core), decoder)))``,
    to the accuracy of PyTorch in the same dtype, with one difference: the three masks are functions of three
    seeds drawn from torch's generator of the device of ``x``, so they can be made again where they are
    needed. Under activation checkpointing they repeat; at each replay of a CUDA graph they are new.

    Where ``decoder`` is zero, as DenseLoRA starts, the update is exactly zero: y is bit for bit what the same
    matrix product gives without an adapter. That product is ``F.linear`` itself on the reference and where
    "auto" leaves it to cuBLAS; otherwise it is a kernel of this package, which may round the sum over K
    differently from cuBLAS.

    Args:
        x: input, (..., K), any leading dimensions and strides; float16, bfloat16 or float32 (float64 on the
            reference).
        w: base weight, (N, K), dtype of ``x``. Usually frozen; trains if it requires a gradient.
        encoder: (R, K), dtype of ``x``, or float32 beside a 16-bit ``x``: then the kernels multiply 16-bit
            roundings of the factors, as under autocast, and sum and return their gradients in float32.
            1 ≤ R ≤ 512.
        core: (R, R), output first, as a weight of ``F.linear``; dtype of ``encoder``.
        decoder: (N, R), dtype of ``encoder``.
        bias: (N,), dtype of ``x``, or None.
        scale: finite factor on the update after its activation, dimensionless; lora_alpha / r.
        dropout_p: probability, in [0, 1), of dropping an element at each of the three places; exact to 2⁻¹⁷.
            The base sees all of x. Applied whenever positive: pass 0 in evaluation.
        impl: "auto" (Triton on a GPU, else the reference), "triton" or "reference".
        activation: "gelu", or None for an update that is linear in x.

    Returns:
        (..., N), dtype of ``x`` (under autocast, autocast's). Gradients flow to every tensor argument
        that requires one; second derivatives raise.

    Raises:
        ValueError: a shape, device or number does not fit. TypeError: a type or dtype does not.
        RuntimeError: the kernels cannot run here.

    Memory: keeps ``x`` for backward only if ``encoder`` or ``w`` trains, plus 2·M·R numbers; on Hopper, with
    dropout, also M·K / 8 bytes of mask. Nothing of (M, N) beside y.
    Source: DenseLoRA, section 3 (arXiv:2505.23808); gradients derived in ops/dense_lora.py.
    """
    if impl not in _IMPLS or not _fits(x, w, encoder, decoder, bias, scale, dropout_p):
        _check_options(_OP, scale, dropout_p, impl)
        _check_shapes(x, w, encoder, decoder, bias)
        scale, dropout_p = float(scale), float(dropout_p)
    _check_tensor(_OP, "core", core, x, "(R, R)", (encoder.shape[0], encoder.shape[0]))
    if activation not in ("gelu", None):
        raise ValueError(f'{_OP}: activation must be "gelu" or None, got {activation!r}')
    kind = "cuda" if x.is_cuda else x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        x, w, encoder, core, decoder, bias = _autocast(kind, x, w, encoder, core, decoder, bias)
    _check_dtypes(x, w, encoder, core, decoder, bias)
    impl, module = _pick_impl(_OP, impl, x)
    seed = None
    if dropout_p > 0:
        seed = torch.randint(2**63 - 1, (3,), dtype=torch.int64, device=x.device)
    options = DenseOptions(scale, activation == "gelu", dropout_p, impl, module)
    if module is not None:
        return DenseLoRAFunction.apply(x, w, encoder, core, decoder, bias, seed, options)
    # a compiler is better served by views of its own
    rows = x.flatten(0, -2) if x.dim() > 1 else x[None]
    y = DenseLoRAFunction.apply(rows, w, encoder, core, decoder, bias, seed, options)
    return y.view(*x.shape[:-1], w.shape[0])


def _check_shapes(x: Tensor, w: Tensor, encoder: Tensor, decoder: Tensor, bias: Tensor | None) -> None:
    for name, value, spelled in (("x", x, "(..., K)"), ("w", w, "(N, K)"), ("encoder", encoder, "(R, K)")):
        if not isinstance(value, Tensor):
            raise TypeError(f"{_OP}: {name} must be a Tensor, got {type(value).__name__}")
        if value.dim() < 1 or (name != "x" and value.dim() != 2):
            raise ValueError(f"{_OP}: {name} must be {spelled}, got {tuple(value.shape)}")
    (N, K), R = w.shape, encoder.shape[0]
    if x.shape[-1] != K:
        raise ValueError(f"{_OP}: x must be (..., K) with K = {K} as in w, got {tuple(x.shape)}")
    if not 1 <= R <= _MAX_RANK:
        raise ValueError(
            f"{_OP}: encoder must be (R, K) with 1 <= R <= {_MAX_RANK}, got {tuple(encoder.shape)}"
        )
    _check_tensor(_OP, "w", w, x, "(N, K)", (N, K))
    _check_tensor(_OP, "encoder", encoder, x, "(R, K)", (R, K))
    _check_tensor(_OP, "decoder", decoder, x, "(N, R)", (N, R))
    if bias is not None:
        _check_tensor(_OP, "bias", bias, x, "(N,)", (N,))


def _autocast(
    kind: str, x: Tensor, w: Tensor, encoder: Tensor, core: Tensor, decoder: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Cast as autocast casts for a linear layer; float32 adapters stay: the kernels take them as they are."""
    dtype, factors = torch.get_autocast_dtype(kind), (encoder, core, decoder)
    if not x.is_floating_point() or x.dtype is torch.float64:
        return x, w, *factors, bias
    if any(factor.dtype is not torch.float32 for factor in factors):
        factors = tuple(factor.to(dtype) for factor in factors)
    return x.to(dtype), w.to(dtype), *factors, None if bias is None else bias.to(dtype)


def _check_dtypes(
    x: Tensor, w: Tensor, encoder: Tensor, core: Tensor, decoder: Tensor, bias: Tensor | None
) -> None:
    dtype, adapters = x.dtype, encoder.dtype
    if dtype not in _DTYPES:
        raise TypeError(f"{_OP}: x must be float16, bfloat16, float32 or float64, got {dtype}")
    if w.dtype != dtype:
        raise TypeError(f"{_OP}: w must have the dtype of x, {dtype}, got {w.dtype}; cast x or use autocast")
    if bias is not None and bias.dtype != dtype:
        raise TypeError(f"{_OP}: bias must have the dtype of x, {dtype}, got {bias.dtype}")
    if adapters != dtype and (adapters is not torch.float32 or dtype is torch.float64):
        raise TypeError(f"{_OP}: encoder must have the dtype of x, {dtype}, or float32, got {adapters}")
    for name, factor in (("core", core), ("decoder", decoder)):
        if factor.dtype != adapters:
            raise TypeError(f"{_OP}: {name} must have the dtype of encoder, {adapters}, got {factor.dtype}")

"""A linear layer on a pruned, compressed weight: check once, pick an implementation, call the Function."""

import torch
from torch import Tensor

from .bitmap_weight import BitmapWeight
from .functional import (
    _DTYPES,
    _IMPLS,
    _LARGEST,
    _MAX_RANK,
    _PLAIN,
    _check_options,
    _check_tensor,
    _pick_impl,
)
from .ops.pruned import PrunedLinearFunction, PrunedOptions

__all__ = ["pruned_linear"]

_OP = "pruned_linear"


def pruned_linear(
    x: Tensor,
    w: BitmapWeight,
    a: Tensor | None = None,
    b: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """Linear layer on a compressed weight, with a low-rank update or without.

    Equals ``F.linear(x, w.to_dense(), bias) + scale * F.linear(F.linear(x, a), b)``. On a GPU up to 64 rows
    of x are multiplied while the compressed weight streams by; more of them pay for a dense copy, which is
    made for the call and given back.

    Several adapters are one: their ``a`` stacked along R, their ``b`` side by side, each ``b`` with its own
    scale in it. SALR's layer is that of LoRA and the residual of pruning.

    Args:
        x: input, (..., K), any leading dimensions and strides; float16, bfloat16 or float32 (float64 on the
            reference).
        w: frozen weight, (N, K), dtype of ``x``; either structure.
        a: down-projection, (R, K), dtype of ``x``, or float32 beside a 16-bit ``x``; 1 ≤ R ≤ 512. None, as
            ``b``, for no update.
        b: up-projection, (N, R), dtype of ``a``.
        bias: (N,), dtype of ``x``, or None.
        scale: finite factor on the update, dimensionless.
        impl: "auto" (Triton on a GPU, else the reference), "triton" or "reference".

    Returns:
        (..., N), dtype of ``x`` (under autocast, autocast's). Gradients flow to x, a, b and bias where they
        require one; w has none; second derivatives raise.

    Raises:
        ValueError: a shape, device or number does not fit. TypeError: a type or dtype does not.
        RuntimeError: the kernels cannot run here.

    Memory: keeps ``x`` for backward only if ``a`` trains, plus M·R numbers; N·K numbers for the time of a
    call with more than 64 rows, and of its backward.
    Source: SALR (arXiv:2601.16991), with this package's own format of the weight.
    """
    if impl not in _IMPLS or not _fits(x, w, a, b, bias, scale):
        _check_options(_OP, scale, 0.0, impl)
        _check_arguments(x, w, a, b, bias)
        scale = float(scale)
    packed = w.packed
    kind = "cuda" if x.is_cuda else x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        x, packed, a, b, bias = _autocast(kind, x, packed, a, b, bias)
    _check_dtypes(x, packed[0].dtype, a, b, bias)
    asked = impl
    impl, module = _pick_impl(_OP, impl, x)
    own = module is not None and asked == "auto" and x.dtype is w.dtype
    sparse = w.accelerated if own else None
    options = PrunedOptions(w.shape[0], scale, impl, module, sparse)
    if module is not None:
        return PrunedLinearFunction.apply(x, a, b, bias, options, *packed)
    # a compiler is better served by views of its own
    rows = x.flatten(0, -2) if x.dim() > 1 else x[None]
    y = PrunedLinearFunction.apply(rows, a, b, bias, options, *packed)
    return y.view(*x.shape[:-1], w.shape[0])


def _fits(
    x: Tensor, w: BitmapWeight, a: Tensor | None, b: Tensor | None, bias: Tensor | None, scale: float
) -> bool:
    """Whether everything is plainly as it should be; where not, the checks below say what is wrong."""
    if type(scale) is not float or type(x) not in _PLAIN or type(w) is not BitmapWeight:
        return False
    if any(t is not None and type(t) not in _PLAIN for t in (a, b, bias)) or (a is None) != (b is None):
        return False
    (N, K), device, size = w.shape, x.device, x.shape
    return (
        len(size) > 0
        and size[-1] == K
        and device == w.device
        and -_LARGEST <= scale <= _LARGEST
        and (bias is None or (bias.shape == (N,) and bias.device == device))
        and (
            a is None
            or (
                a.dim() == 2
                and 1 <= (R := a.shape[0]) <= _MAX_RANK
                and a.shape == (R, K)
                and b.shape == (N, R)
                and a.device == b.device == device
            )
        )
    )


def _check_arguments(
    x: Tensor, w: BitmapWeight, a: Tensor | None, b: Tensor | None, bias: Tensor | None
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{_OP}: x must be a Tensor, got {type(x).__name__}")
    if not isinstance(w, BitmapWeight):
        raise TypeError(
            f"{_OP}: w must be a BitmapWeight, got {type(w).__name__}; BitmapWeight.from_dense makes one"
        )
    N, K = w.shape
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(f"{_OP}: x must be (..., K) with K = {K} as in w, got {tuple(x.shape)}")
    if w.device != x.device:
        raise ValueError(f"{_OP}: w must be on the device of x, {x.device}, got {w.device}")
    if (a is None) != (b is None):
        given, missing = ("b", "a") if a is None else ("a", "b")
        raise ValueError(f"{_OP}: {missing} must be given beside {given}, got None")
    if a is not None:
        if not isinstance(a, Tensor):
            raise TypeError(f"{_OP}: a must be a Tensor, got {type(a).__name__}")
        if a.dim() != 2 or not 1 <= a.shape[0] <= _MAX_RANK:
            raise ValueError(f"{_OP}: a must be (R, K) with 1 <= R <= {_MAX_RANK}, got {tuple(a.shape)}")
        R = a.shape[0]
        _check_tensor(_OP, "a", a, x, "(R, K)", (R, K))
        _check_tensor(_OP, "b", b, x, "(N, R)", (N, R))
    if bias is not None:
        _check_tensor(_OP, "bias", bias, x, "(N,)", (N,))


def _autocast(
    kind: str, x: Tensor, packed: list[Tensor], a: Tensor | None, b: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, list[Tensor], Tensor | None, Tensor | None, Tensor | None]:
    """Cast as autocast casts for a linear layer; float32 adapters stay: the kernels take them as they are."""
    dtype = torch.get_autocast_dtype(kind)
    if not x.is_floating_point() or x.dtype is torch.float64:
        return x, packed, a, b, bias
    if a is not None and (a.dtype is not torch.float32 or b.dtype is not torch.float32):
        a, b = a.to(dtype), b.to(dtype)
    packed = [packed[0].to(dtype), *packed[1:]]
    return x.to(dtype), packed, a, b, None if bias is None else bias.to(dtype)


def _check_dtypes(
    x: Tensor, weights: torch.dtype, a: Tensor | None, b: Tensor | None, bias: Tensor | None
) -> None:
    dtype = x.dtype
    if dtype not in _DTYPES:
        raise TypeError(f"{_OP}: x must be float16, bfloat16, float32 or float64, got {dtype}")
    if weights != dtype:
        raise TypeError(f"{_OP}: w must have the dtype of x, {dtype}, got {weights}; cast x or use autocast")
    if bias is not None and bias.dtype != dtype:
        raise TypeError(f"{_OP}: bias must have the dtype of x, {dtype}, got {bias.dtype}")
    if a is None:
        return
    if a.dtype != dtype and (a.dtype is not torch.float32 or dtype is torch.float64):
        raise TypeError(f"{_OP}: a must have the dtype of x, {dtype}, or float32, got {a.dtype}")
    if b.dtype != a.dtype:
        raise TypeError(f"{_OP}: b must have the dtype of a, {a.dtype}, got {b.dtype}")

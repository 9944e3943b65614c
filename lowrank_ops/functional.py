"""The public functions: check once, pick an implementation, call the autograd Function."""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from . import reference
from .ops._library import register
from .ops.lora_linear import LoRALinearFunction

__all__ = ["lora_linear"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_IMPLS = ("auto", "triton", "reference")
_MAX_RANK = 512
_LARGEST = 3.4e38  # float32's


@cache
def _implementation(name: str) -> ModuleType:
    """Return the module that holds the implementation; the one place where kernels are imported.

    "triton" is the kernels alone; "auto", once a GPU is settled on, may leave a product to cuBLAS.
    """
    if name == "reference":
        return reference
    from . import kernels

    return kernels if name == "triton" else kernels.dispatch


_LIBRARY = register(_implementation)


def _pick_impl(op: str, impl: str, x: Tensor) -> str:
    if impl == "auto" and not (x.is_cuda and x.dtype is not torch.float64):
        impl = "reference"
    if impl == "reference" or torch.compiler.is_compiling():
        return impl
    try:
        kernels = _implementation("triton")
    except ImportError as error:
        raise RuntimeError(
            f'{op}: impl must be "reference" where Triton is not installed, got "triton"; pip install triton'
        ) from error
    if not x.is_cuda and x.device.type != "meta" and not kernels.INTERPRETED:
        raise RuntimeError(
            f'{op}: impl must be "auto" or "reference" for a tensor on {x.device.type}, got "triton"; '
            "the kernels run on a GPU, or anywhere under TRITON_INTERPRET=1"
        )
    if x.dtype is torch.float64 and not kernels.INTERPRETED:
        raise TypeError(
            f'{op}: x must be float16, bfloat16 or float32 for impl="triton", got torch.float64; '
            'impl="reference" takes it'
        )
    return impl


def _check_tensor(
    op: str, name: str, value: object, like: Tensor, spelled: str, shape: tuple[int, ...]
) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(value).__name__}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{op}: {name} must be {spelled} = {shape}, got {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{op}: {name} must be on the device of x, {like.device}, got {value.device}")


def _check_options(op: str, scale: float, dropout_p: float, impl: str) -> None:
    for name, value in (("scale", scale), ("dropout_p", dropout_p)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not -_LARGEST <= scale <= _LARGEST:
        raise ValueError(f"{op}: scale must be finite in float32, got {str(scale)[:24]}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{op}: dropout_p must be in [0, 1), got {dropout_p}")
    if impl not in _IMPLS:
        raise ValueError(f'{op}: impl must be "auto", "triton" or "reference", got {impl!r}')


def _check_shapes(op: str, x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    for name, value, least in (("x", x, 1), ("w", w, 2), ("a", a, 2)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a Tensor, got {type(value).__name__}")
        if value.dim() < least or (least == 2 and value.dim() != 2):
            spelled = {"x": "(..., K)", "w": "(N, K)", "a": "(R, K)"}[name]
            raise ValueError(f"{op}: {name} must be {spelled}, got {tuple(value.shape)}")
    N, K = w.shape
    R = a.shape[0]
    if x.shape[-1] != K:
        raise ValueError(f"{op}: x must be (..., K) with K = {K} as in w, got {tuple(x.shape)}")
    if not 1 <= R <= _MAX_RANK:
        raise ValueError(f"{op}: a must be (R, K) with 1 <= R <= {_MAX_RANK}, got {tuple(a.shape)}")
    _check_tensor(op, "w", w, x, "(N, K)", (N, K))
    _check_tensor(op, "a", a, x, "(R, K)", (R, K))
    _check_tensor(op, "b", b, x, "(N, R)", (N, R))
    if bias is not None:
        _check_tensor(op, "bias", bias, x, "(N,)", (N,))


def _check_dtypes(op: str, x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    if x.dtype not in _DTYPES:
        raise TypeError(f"{op}: x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if w.dtype != x.dtype:
        raise TypeError(f"{op}: w must have the dtype of x, {x.dtype}, got {w.dtype}; cast x or use autocast")
    if bias is not None and bias.dtype != x.dtype:
        raise TypeError(f"{op}: bias must have the dtype of x, {x.dtype}, got {bias.dtype}")
    if a.dtype != x.dtype and (a.dtype is not torch.float32 or x.dtype is torch.float64):
        raise TypeError(f"{op}: a must have the dtype of x, {x.dtype}, or float32, got {a.dtype}")
    if b.dtype != a.dtype:
        raise TypeError(f"{op}: b must have the dtype of a, {a.dtype}, got {b.dtype}")


def _autocast(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Cast as autocast casts for a linear layer; float32 adapters stay: the kernels take them as they are."""
    dtype = torch.get_autocast_dtype(x.device.type)
    if not x.is_floating_point() or x.dtype is torch.float64:
        return x, w, a, b, bias
    if a.dtype is not torch.float32 or b.dtype is not torch.float32:
        a, b = a.to(dtype), b.to(dtype)
    return x.to(dtype), w.to(dtype), a, b, None if bias is None else bias.to(dtype)


def lora_linear(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Linear layer with a low-rank update, without materialising the update.

    Equals ``F.linear(x, w, bias) + scale * F.linear(F.linear(F.dropout(x, dropout_p), a), b)``, to the
    accuracy of PyTorch in the same dtype, with one difference: the dropout mask is a function of one
    seed drawn from torch's generator of the device of ``x``, so it is made again where it is needed and
    never stored. Under activation checkpointing it repeats; at each replay of a CUDA graph it is new.

    Args:
        x: input, (..., K), any leading dimensions and strides; float16, bfloat16 or float32 (float64 on the
            reference).
        w: base weight, (N, K), dtype of ``x``. Usually frozen; trains if it requires a gradient.
        a: down-projection, (R, K), dtype of ``x``, or float32 beside a 16-bit ``x``: then gradients have
            float32 accuracy, while the update inside y and dx is made of 16-bit factors. 1 ≤ R ≤ 512.
        b: up-projection, (N, R), dtype of ``a``.
        bias: (N,), dtype of ``x``, or None.
        scale: finite factor on the update, dimensionless; ``LoRAConfig.scale`` is lora_alpha / r.
        dropout_p: probability, in [0, 1), of dropping an element of the adapter's input (the base sees all of
            x); exact to 2⁻¹⁷. Applied whenever positive: pass 0 in evaluation.
        impl: "auto" (Triton on a GPU, else the reference), "triton" or "reference".

    Returns:
        (..., N), dtype of ``x`` (under autocast, autocast's). Gradients flow to every tensor argument
        that requires one; second derivatives raise.

    Raises:
        ValueError: a shape, device or number does not fit. TypeError: a type or dtype does not.
        RuntimeError: the kernels cannot run here.

    Memory: keeps ``x`` for backward only if ``a`` or ``w`` trains, plus M·R numbers; no mask, and no copy
    of x unless its leading dimensions cannot be seen as one.
    Source: Hu et al. 2021, LoRA, eq. 3 (arXiv:2106.09685).
    """
    op = "lora_linear"
    _check_options(op, scale, dropout_p, impl)
    _check_shapes(op, x, w, a, b, bias)
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        x, w, a, b, bias = _autocast(x, w, a, b, bias)
    _check_dtypes(op, x, w, a, b, bias)
    impl = _pick_impl(op, impl, x)
    seed = None
    if dropout_p > 0:
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    rows = x.flatten(0, -2) if x.dim() > 1 else x[None]
    y = LoRALinearFunction.apply(rows, w, a, b, bias, seed, scale, dropout_p, impl)
    return y.view(*x.shape[:-1], w.shape[0])

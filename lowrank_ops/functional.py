"""The public functions: check once, pick an implementation, call the autograd Function."""

from collections.abc import Sequence
from functools import cache, lru_cache
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import Parameter

from . import reference
from .ops._library import is_traced, register
from .ops.lora_linear import LoRALinearFunction, Options

__all__ = ["lora_linear", "nearest_neighbors"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_IMPLS = ("auto", "triton", "reference")
_MAX_RANK = 512
_LARGEST = 3.4e38  # float32's
_PLAIN = (Tensor, Parameter)


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


def _pick_impl(op: str, impl: str, x: Tensor) -> tuple[str, ModuleType | None]:
    """Return the name of the implementation, and it, or None where the library's ops must stand for it."""
    if impl == "auto" and not (x.is_cuda and x.dtype is not torch.float64):
        impl = "reference"
    if torch.compiler.is_compiling():
        return impl, None
    try:
        module = _implementation(impl)
    except ImportError as error:
        raise RuntimeError(
            f'{op}: impl must be "reference" where Triton is not installed, got "triton"; pip install triton'
        ) from error
    if impl == "triton" and not module.INTERPRETED:
        if not x.is_cuda and x.device.type != "meta":
            raise RuntimeError(
                f'{op}: impl must be "auto" or "reference" for a tensor on {x.device.type}, got "triton"; '
                "the kernels run on a GPU, or anywhere under TRITON_INTERPRET=1"
            )
        if x.dtype is torch.float64:
            raise TypeError(
                f'{op}: x must be float16, bfloat16 or float32 for impl="triton", got torch.float64; '
                'impl="reference" takes it'
            )
    return impl, None if is_traced(x) else module


def _check_tensor(
    op: str, name: str, value: object, like: Tensor, spelled: str, shape: tuple[int, ...]
) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(value).__name__}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{op}: {name} must be {spelled} = {shape}, got {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{op}: {name} must be on the device of x, {like.device}, got {value.device}")


def _check_options(op: str, scale: float, dropout_p: float, impl: str, spelled: str = "scale") -> None:
    for name, value in ((spelled, scale), ("dropout_p", dropout_p)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not -_LARGEST <= scale <= _LARGEST:
        raise ValueError(f"{op}: {spelled} must be finite in float32, got {str(scale)[:24]}")
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
    dtype, adapters = x.dtype, a.dtype
    if dtype not in _DTYPES:
        raise TypeError(f"{op}: x must be float16, bfloat16, float32 or float64, got {dtype}")
    if w.dtype != dtype:
        raise TypeError(f"{op}: w must have the dtype of x, {dtype}, got {w.dtype}; cast x or use autocast")
    if bias is not None and bias.dtype != dtype:
        raise TypeError(f"{op}: bias must have the dtype of x, {dtype}, got {bias.dtype}")
    if adapters != dtype and (adapters is not torch.float32 or dtype is torch.float64):
        raise TypeError(f"{op}: a must have the dtype of x, {dtype}, or float32, got {adapters}")
    if b.dtype != adapters:
        raise TypeError(f"{op}: b must have the dtype of a, {adapters}, got {b.dtype}")


def _fits(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float, dropout_p: float
) -> bool:
    """Whether everything is plainly as it should be; where not, the checks above say what is wrong, if it is.

    One look at each property, because they take as long as a launch otherwise.
    """
    # below, a compiler may see numbers of its own, which cannot be looked up
    agree = _agree if torch.compiler.is_compiling() else _known_to_agree
    return (
        type(scale) is float
        and type(dropout_p) is float
        and type(x) in _PLAIN
        and type(w) in _PLAIN
        and type(a) in _PLAIN
        and type(b) in _PLAIN
        and (bias is None or (type(bias) in _PLAIN and bias.shape == w.shape[:1] and bias.device == x.device))
        and agree(x.shape, w.shape, a.shape, b.shape, x.device, w.device, a.device, b.device)
        and 0 <= dropout_p < 1
        and -_LARGEST <= scale <= _LARGEST
    )


def _agree(
    x: torch.Size,
    w: torch.Size,
    a: torch.Size,
    b: torch.Size,
    device: torch.device,
    *others: torch.device,
) -> bool:
    """Whether tensors of these shapes and devices fit each other."""
    if not (x and len(w) == len(a) == len(b) == 2):
        return False
    (N, K), (R, columns) = w, a
    fit = x[-1] == K == columns and b == (N, R) and 1 <= R <= _MAX_RANK
    return fit and all(device == other for other in others)


_known_to_agree = lru_cache(maxsize=4096)(_agree)


def _passes(impl: str, device: torch.device) -> ModuleType | None:
    """Return the module of passes that the host has seen before, where there is one."""
    on_gpu = impl == "auto" and device.type == "cuda"
    return _implementation("auto").known_passes(device) if on_gpu else None


def _known_pass(
    x: Tensor,
    ws: Sequence[Tensor],
    a_list: Sequence[Tensor],
    b_list: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scales: tuple[float, ...],
    dropout_p: float,
    impl: str,
) -> tuple[ModuleType | None, object | None]:
    """Return the module of passes that the host has seen before, and that of such tensors, or None for both.

    Those that it was made of were checked, so a call with the same has passed all checks.
    """
    if impl != "auto" or type(dropout_p) is not float or type(x) not in _PLAIN:
        return None, None
    if not x.is_cuda or is_traced(x):
        return None, None
    if torch.is_autocast_enabled("cuda") and x.dtype is not torch.get_autocast_dtype("cuda"):
        return None, None
    passes = _implementation(impl).known_passes(x.device)
    if passes is None:
        return None, None
    for scale in scales:
        if type(scale) is not float:
            return None, None
    found = passes.find_forward(x, ws, a_list, b_list, biases, scales, dropout_p)
    return (None if found is None else passes), found


def _seed(x: Tensor, dropout_p: float) -> Tensor | None:
    """Return what the mask of one call is drawn from, on the device of ``x``; None without dropout."""
    if not dropout_p > 0:
        return None
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device)


def _autocast(
    kind: str, x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Cast as autocast casts for a linear layer; float32 adapters stay: the kernels take them as they are."""
    dtype = torch.get_autocast_dtype(kind)
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
    seed drawn from torch's generator of the device of ``x``, so it can be made again where it is needed.
    Under activation checkpointing it repeats; at each replay of a CUDA graph it is new.

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

    Memory: keeps ``x`` for backward only if ``a`` or ``w`` trains, plus M·R numbers; on Hopper, with dropout,
    also M·K / 8 bytes of mask. No copy of x unless its leading dimensions cannot be seen as one.
    Source: Hu et al. 2021, LoRA, eq. 3 (arXiv:2106.09685).
    """
    op = "lora_linear"
    passes, found = _known_pass(x, (w,), (a,), (b,), (bias,), (scale,), dropout_p, impl)
    if found is not None:
        options = Options(scale, dropout_p, impl, _implementation(impl), passes, found)
        return LoRALinearFunction.apply(x, w, a, b, bias, _seed(x, dropout_p), options)
    if impl not in _IMPLS or not _fits(x, w, a, b, bias, scale, dropout_p):
        _check_options(op, scale, dropout_p, impl)
        _check_shapes(op, x, w, a, b, bias)
        scale, dropout_p = float(scale), float(dropout_p)
    kind = "cuda" if x.is_cuda else x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        x, w, a, b, bias = _autocast(kind, x, w, a, b, bias)
    _check_dtypes(op, x, w, a, b, bias)
    impl, module = _pick_impl(op, impl, x)
    seed = _seed(x, dropout_p)
    passes = None if module is None else _passes(impl, x.device)
    options = Options(scale, dropout_p, impl, module, passes, None)
    if module is not None:
        return LoRALinearFunction.apply(x, w, a, b, bias, seed, options)
    # a compiler is better served by views of its own
    rows = x.flatten(0, -2) if x.dim() > 1 else x[None]
    y = LoRALinearFunction.apply(rows, w, a, b, bias, seed, options)
    return y.view(*x.shape[:-1], w.shape[0])


def nearest_neighbors(points: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Return the distances from each of ``points``, (M, K), to its nearest and second nearest other, (M,).

    As ``torch.cdist(points, points).topk(3, largest=False).values[:, 1:]``, without the (M, M) matrix. The
    points must be floating and finite, M ≥ 3: ``gelora.intrinsic_dimension`` checks it. Distances are float32
    with a relative error below 2⁻¹⁶, near-duplicates included, or float64 for float64 points; zero between
    exact duplicates. Two runs give the same bits.

    Memory: 2 M·K bytes on a GPU; on a CPU blocks of 2²⁴ distances.
    """
    _, module = _pick_impl("nearest_neighbors", impl, points)
    return (module or reference).nearest_neighbors(points)

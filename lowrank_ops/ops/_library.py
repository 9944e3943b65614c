"""Registration of the kernels with torch.library, so that compilers and fake tensors can see them.

Every op is functional (it writes no argument), takes 2-D tensors and ends in ``str impl``, the name of
the implementation. The body asks ``resolve(impl)`` for the module and calls the function of the op's
name in it, so that one op stands for a kernel and for its reference alike. Ops return tensors alone: an
empty one, (0,), where the implementation returns None. Eager code calls the module itself, through
:func:`run_here`, because an op costs the host more than what it does.
"""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = ["is_traced", "register", "run_here"]

_DROPOUT = "Tensor? seed, float dropout_p, str impl"
_GROUP = "Tensor[] ws, Tensor[] a_list, Tensor[] b_list"
_SCHEMAS = {
    "lora_forward": f"(Tensor x, Tensor w, Tensor a, Tensor b, Tensor? bias, float scale, {_DROPOUT})"
    " -> (Tensor, Tensor, Tensor)",
    "lora_backward": "(Tensor dy, Tensor? x, Tensor? w, Tensor? a, Tensor? b, Tensor? h, Tensor? mask,"
    " float scale, Tensor? seed, float dropout_p, bool need_x, bool need_a, bool need_b, str impl)"
    " -> (Tensor, Tensor, Tensor)",
    "lora_backward_hidden": "(Tensor dy, Tensor b, float scale, str impl) -> Tensor",
    "lora_backward_b": "(Tensor dy, Tensor h, str impl) -> Tensor",
    "lora_backward_hidden_b": "(Tensor dy, Tensor b, Tensor h, float scale, str impl) -> (Tensor, Tensor)",
    "lora_backward_a": f"(Tensor dh, Tensor x, {_DROPOUT}) -> Tensor",
    "lora_backward_input": f"(Tensor dy, Tensor w, Tensor dh, Tensor a, {_DROPOUT}) -> Tensor",
    "lora_group_forward": f"(Tensor x, {_GROUP}, Tensor?[] biases, float[] scales, {_DROPOUT})"
    " -> (Tensor[], Tensor, Tensor)",
    "lora_group_backward": f"(Tensor?[] dys, Tensor? x, {_GROUP}, Tensor? h, Tensor? mask, float[] scales,"
    " Tensor? seed, float dropout_p, bool need_x, bool[] need_a, bool[] need_b, str impl)"
    " -> (Tensor, Tensor[], Tensor[])",
}


def _fake_forward(x, w, a, b, bias, scale, seed, dropout_p, impl):
    return x.new_empty(x.shape[0], w.shape[0]), a.new_empty(x.shape[0], a.shape[0]), x.new_empty(0)


def _fake_backward(dy, x, w, a, b, h, mask, scale, seed, dropout_p, need_x, need_a, need_b, impl):
    dx = dy.new_empty(dy.shape[0], w.shape[1]) if need_x else dy.new_empty(0)
    da = b.new_empty(b.shape[1], x.shape[1]) if need_a else dy.new_empty(0)
    return dx, da, h.new_empty(dy.shape[1], h.shape[1]) if need_b else dy.new_empty(0)


def _fake_hidden(dy, b, scale, impl):
    return b.new_empty(dy.shape[0], b.shape[1])


def _fake_b(dy, h, impl):
    return h.new_empty(dy.shape[1], h.shape[1])


def _fake_hidden_b(dy, b, h, scale, impl):
    return _fake_hidden(dy, b, scale, impl), _fake_b(dy, h, impl)


def _fake_a(dh, x, seed, dropout_p, impl):
    return dh.new_empty(dh.shape[1], x.shape[1])


def _fake_input(dy, w, dh, a, seed, dropout_p, impl):
    return dy.new_empty(dy.shape[0], w.shape[1])


def _fake_group_forward(x, ws, a_list, b_list, biases, scales, seed, dropout_p, impl):
    h = a_list[0].new_empty(x.shape[0], sum(a.shape[0] for a in a_list))
    return [x.new_empty(x.shape[0], w.shape[0]) for w in ws], h, x.new_empty(0)


def _fake_group_backward(
    dys, x, ws, a_list, b_list, h, mask, scales, seed, dropout_p, need_x, need_a, need_b, impl
):
    first = next(dy for dy in dys if dy is not None)
    empty = lambda: first.new_empty(0)  # noqa: E731
    dx = first.new_empty(first.shape[0], ws[0].shape[1]) if need_x else empty()
    das = [
        b.new_empty(b.shape[1], x.shape[1]) if need else empty()
        for b, need in zip(b_list, need_a, strict=True)
    ]
    return (
        dx,
        das,
        [b.new_empty(b.shape) if need else empty() for b, need in zip(b_list, need_b, strict=True)],
    )


_FAKES = {
    "lora_forward": _fake_forward,
    "lora_backward": _fake_backward,
    "lora_backward_hidden": _fake_hidden,
    "lora_backward_b": _fake_b,
    "lora_backward_hidden_b": _fake_hidden_b,
    "lora_backward_a": _fake_a,
    "lora_backward_input": _fake_input,
    "lora_group_forward": _fake_group_forward,
    "lora_group_backward": _fake_group_backward,
}


# the types whose operations PyTorch runs itself, with no say for Python code
_PLAIN = (Tensor, torch.nn.Parameter)


def is_traced(t: Tensor) -> bool:
    """Whether somebody follows the operations on ``t``: a compiler, a fake tensor or a tensor mode.

    They must be shown an op of the library, where eager code may call the implementation.
    """
    return torch.compiler.is_compiling() or type(t) not in _PLAIN or t.is_meta or is_in_torch_dispatch_mode()


def run_here(function: Callable[..., object], first: Tensor, *rest: object) -> object:
    """Call ``function(first, *rest)`` on the device of ``first``, in the dtypes that its caller settled.

    So the current device is that of ``first`` inside, and autocast is off.
    """
    if first.is_meta:
        return function(first, *rest)
    kind = "cuda" if first.is_cuda else first.device.type
    if torch.is_autocast_enabled(kind):
        # what torch.autocast(enabled=False) comes down to, at a tenth of its cost
        torch.set_autocast_enabled(kind, False)
        try:
            return run_here(function, first, *rest)
        finally:
            torch.set_autocast_enabled(kind, True)
    if first.is_cuda and first.get_device() != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            return function(first, *rest)
    return function(first, *rest)


def _body(name: str, resolve: Callable[[str], ModuleType]) -> Callable[..., object]:
    def run(*args: object) -> object:
        function = getattr(resolve(args[-1]), name)
        first = args[0] if isinstance(args[0], Tensor) else next(t for t in args[0] if t is not None)
        result = run_here(lambda _, *rest: function(*rest), first, *args[:-1])
        if name.endswith("_forward"):
            # no mask: whether an implementation keeps one depends on the GPU, and a compiler must know shapes
            result = (*result[:-1], None)
        return _tensors(result, first)

    return run


def _tensors(result: object, like: Tensor) -> object:
    """Return ``result`` with empty tensors for None, and the parts of one tensor in a list made tensors."""
    if result is None:
        return like.new_empty(0)
    if isinstance(result, tuple):
        return tuple(_tensors(t, like) for t in result)
    if isinstance(result, list):
        own = [_tensors(t, like) for t in result]
        return [t.clone() if t.untyped_storage().nbytes() > t.nbytes else t for t in own]
    # the rows of h may be padded; a compiler was told that they are not
    return result.contiguous()


def register(resolve: Callable[[str], ModuleType]) -> torch.library.Library:
    """Define every op of namespace ``lowrank_ops``; the caller keeps the returned library alive.

    Args:
        resolve: gives the module for an implementation's name, "triton" or "reference".
    """
    library = torch.library.Library("lowrank_ops", "DEF")
    for name, schema in _SCHEMAS.items():
        library.define(name + schema)
        library.impl(name, _body(name, resolve), "CompositeExplicitAutograd")
        torch.library.register_fake(f"lowrank_ops::{name}", _FAKES[name], lib=library)
    return library

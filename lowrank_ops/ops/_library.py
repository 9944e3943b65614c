"""Registration of the kernels with torch.library, so that compilers and fake tensors can see them.

Every op is functional (it writes no argument), takes 2-D tensors and ends in ``str impl``, the name of
the implementation. The body asks ``resolve(impl)`` for the module and calls the function of the op's
name in it, so that one op stands for a kernel and for its reference alike.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor

__all__ = ["no_autocast", "register"]

_DROPOUT = "Tensor? seed, float dropout_p, str impl"
_SCHEMAS = {
    "lora_forward": f"(Tensor x, Tensor w, Tensor a, Tensor b, Tensor? bias, float scale, {_DROPOUT})"
    " -> (Tensor, Tensor)",
    "lora_backward_hidden": "(Tensor dy, Tensor b, float scale, str impl) -> Tensor",
    "lora_backward_b": "(Tensor dy, Tensor h, str impl) -> Tensor",
    "lora_backward_hidden_b": "(Tensor dy, Tensor b, Tensor h, float scale, str impl) -> (Tensor, Tensor)",
    "lora_backward_a": f"(Tensor dh, Tensor x, {_DROPOUT}) -> Tensor",
    "lora_backward_input": f"(Tensor dy, Tensor w, Tensor dh, Tensor a, {_DROPOUT}) -> Tensor",
}


def _fake_forward(x, w, a, b, bias, scale, seed, dropout_p, impl):
    return x.new_empty(x.shape[0], w.shape[0]), a.new_empty(x.shape[0], a.shape[0])


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


_FAKES = {
    "lora_forward": _fake_forward,
    "lora_backward_hidden": _fake_hidden,
    "lora_backward_b": _fake_b,
    "lora_backward_hidden_b": _fake_hidden_b,
    "lora_backward_a": _fake_a,
    "lora_backward_input": _fake_input,
}


def no_autocast(device: torch.device) -> AbstractContextManager:
    """Return a context for code whose dtypes were settled by its caller, whatever autocast says around it."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _body(name: str, resolve: Callable[[str], ModuleType]) -> Callable[..., object]:
    def run(first: Tensor, *rest: object) -> object:
        function = getattr(resolve(rest[-1]), name)
        device = first.device
        if device.type != "meta" and torch.is_autocast_enabled(device.type):
            with no_autocast(device):
                return function(first, *rest[:-1])
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return function(first, *rest[:-1])
        return function(first, *rest[:-1])

    return run


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

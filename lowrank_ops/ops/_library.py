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

from . import _dense_ops, _lora_ops, _masked_ops, _pruned_ops

__all__ = ["is_traced", "register", "run_here"]

OPS = {**_lora_ops.OPS, **_dense_ops.OPS, **_masked_ops.OPS, **_pruned_ops.OPS}

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
    for name, (schema, fake) in OPS.items():
        library.define(name + schema)
        library.impl(name, _body(name, resolve), "CompositeExplicitAutograd")
        torch.library.register_fake(f"lowrank_ops::{name}", fake, lib=library)
    return library

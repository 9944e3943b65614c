"""What ``_launch`` asks of Triton beyond ``kernel[grid](...)``, for each form that Triton's launcher has had.

Everything here only calls Triton. A form that is not known gives None, and the launch goes Triton's way.
"""

import inspect
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

__all__ = [
    "DescriptorMaker",
    "bind",
    "current_stream",
    "descriptor_makers",
    "is_descriptor",
    "may_bypass",
]

# what Triton's launcher for CUDA passes on by position before the kernel's own arguments
_FORM_3_6 = ("self", "gridX", "gridY", "gridZ", "stream", "function", "args")
_FORM_3_7 = (
    *_FORM_3_6[:-1],
    *("kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook"),
    "args",
)


def _idle(hook: object) -> bool:
    return getattr(hook, "calls", None) == []


def may_bypass(kernel: object) -> bool:
    """Whether launches of ``kernel`` may go past Triton: it gets compiled, and no hook wants to know."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return (
        isinstance(kernel, JITFunction)
        and not kernel.pre_run_hooks
        and (enter is None or _idle(enter))
        and (leave is None or _idle(leave))
        and not runtime.debug
        and not knobs.compilation.instrumentation_mode
        and runtime.add_stages_inspection_hook is None
    )


def current_stream() -> Callable[[int], int]:
    """Return Triton's function from a device's index to the address of its current stream."""
    return driver.active.get_current_stream


def is_descriptor(value: object) -> bool:
    """Whether ``value`` is a tensor descriptor made on the host, of Triton or of Gluon."""
    return type(value).__name__ == "TensorDescriptor" and isinstance(getattr(value, "base", None), Tensor)


class _Address:
    """Stands for a tensor of which Triton asks the address alone."""

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


class DescriptorMaker:
    """A tensor descriptor without its address: makes what the kernel takes for it, as Triton would.

    Args:
        descriptor: the descriptor of the first launch; its shape, strides and options are kept.
        meta: Triton's record of how the compiled kernel wants it (block, element, swizzle).
    """

    def __init__(self, descriptor: object, meta: dict[str, object]) -> None:
        fields = dict(vars(descriptor))
        del fields["base"]
        self.fields = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
        self.meta = meta

    def __call__(self, address: int) -> list[object]:
        """Return the encoded descriptor for ``address``, then shape and strides."""
        described = _Described(_Address(address), self.fields)
        return _encoder()(described, self.meta)


class _Described:
    def __init__(self, base: _Address, fields: dict[str, object]) -> None:
        self.base = base
        vars(self).update(fields)


@cache
def _encoder() -> Callable[[object, dict[str, object]], list[object]]:
    from triton.backends.nvidia.driver import make_tensordesc_arg

    extra = [None] * (len(inspect.signature(make_tensordesc_arg).parameters) - 2)
    return lambda described, meta: make_tensordesc_arg(described, meta, *extra)


def descriptor_makers(compiled: CompiledKernel, descriptors: list[object]) -> list[DescriptorMaker] | None:
    """Return a maker for each descriptor of a launch, in order; None if the kernel takes them another way."""
    metas = getattr(compiled.metadata, "tensordesc_meta", None) or []
    if len(metas) != len(descriptors) or any(meta.get("is_im2col") for meta in metas):
        return None
    return [DescriptorMaker(*pair) for pair in zip(descriptors, metas, strict=True)]


def bind(compiled: object, grid: tuple[int, ...]) -> Callable[[int, list[object]], None] | None:
    """Return a function of (stream, arguments) that launches a compiled kernel, or None if none is known.

    Arguments are those of the kernel in order, constants too; tensors may be addresses, and each descriptor
    is what its maker made. No hook is called.
    """
    if torch.version.hip or not isinstance(compiled, CompiledKernel):
        return None
    launcher, metadata = compiled.run, compiled.metadata
    if type(launcher).__name__ != "CudaLauncher":
        return None
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        return None
    form = tuple(inspect.signature(type(launcher).__call__).parameters)
    if form not in (_FORM_3_6, _FORM_3_7) or getattr(launcher, "gsan_enabled", False):
        return None
    first = (*grid, 1, 1)[:3]
    flags = (launcher.launch_cooperative_grid, launcher.launch_pdl)
    function, packed = compiled.function, compiled.packed_metadata
    if form == _FORM_3_7:
        launch = driver.active.utils.launch
        between = (*flags, packed, None, None, None, None, None)
        ends = (launcher.arg_annotations, launcher.kernel_signature)
        return lambda stream, values: launch(*first, stream, function, *between, *ends, values)
    launch = launcher.launch
    if inspect.isfunction(launch):
        # around the compiled function, Python that encodes descriptors
        launch = inspect.getclosurevars(launch).nonlocals["launcher"]
    between = (*flags, None, None, packed, None, None, None)
    return lambda stream, values: launch(*first, stream, function, *between, *values)

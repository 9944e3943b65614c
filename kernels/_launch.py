"""Launches of compiled kernels that the host has seen before, without working out again what they are.

Triton binds, classifies and looks up every argument at every launch, and encodes every tensor descriptor.
Most launches differ from an earlier one in nothing but the addresses of their tensors: for these a plan
is kept, which calls the compiled kernel itself.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ._tape import current_tape
from ._triton_api import DescriptorMaker, bind, current_stream, descriptor_makers, is_descriptor, may_bypass

__all__ = ["Launch", "Part", "Plan", "launch"]

_MOST_PLANS = 4096
_MOST_DESCRIPTORS = 16384  # about 500 bytes each


class Launch(NamedTuple):
    """One launch: ``kernel[grid](*args, **constants)``."""

    kernel: object
    grid: tuple[int, ...]
    args: tuple[object, ...]
    constants: dict[str, object]

    @classmethod
    def of(cls, kernel: object, grid: tuple[int, ...]) -> Callable[..., "Launch"]:
        """Return what is called as ``kernel[grid]`` is, and launches nothing yet."""
        return lambda *args, **constants: cls(kernel, grid, args, constants)


class Part(NamedTuple):
    """A contiguous part of a contiguous ``base``, made a tensor only where Triton asks for one."""

    base: Tensor
    start: int  # element of base
    shape: tuple[int, ...]
    dtype: torch.dtype  # as wide as that of base

    def data_ptr(self) -> int:
        return self.base.data_ptr() + self.start * self.base.element_size()

    def tensor(self) -> Tensor:
        return self.base[self.start : self.start + prod(self.shape)].view(self.dtype).view(self.shape)


class Plan(NamedTuple):
    """What is left of a launch when its tensors are taken out."""

    kernel: object
    call: Callable[[int, list[object]], None]
    values: list[object]
    pointers: list[tuple[int, int]]  # (place in values, tensor)
    descriptors: list[tuple[list[int], int, DescriptorMaker]]  # (places in values, tensor, maker)
    stream: Callable[[int], int]

    def run(self, device: int, addresses: list[int | None]) -> None:
        """Launch on tensors at these addresses."""
        self.call(self.stream(device), self.filled(addresses))

    def filled(self, addresses: Sequence[int | None]) -> list[object]:
        """Return what the kernel is given for tensors at these addresses."""
        values = self.values.copy()
        for place, i in self.pointers:
            values[place] = addresses[i]
        for places, i, maker in self.descriptors:
            encoded = _encoded(maker, addresses[i])
            for place in places:
                values[place] = encoded
        return values

    def ordered(self, order: Sequence[int]) -> "Plan":
        """Return the plan that takes the address at ``order[i]`` where this one takes that at i."""
        pointers = [(place, order[i]) for place, i in self.pointers]
        descriptors = [(places, order[i], maker) for places, i, maker in self.descriptors]
        return self._replace(pointers=pointers, descriptors=descriptors)


# None: Triton must do it
_plans: dict[tuple, Plan | None] = {}


@lru_cache(maxsize=_MOST_DESCRIPTORS)
def _encoded(maker: DescriptorMaker, address: int) -> object:
    return maker(address)[0]


def launch(
    prepare: Callable[..., Launch | None],
    tensors: tuple[Tensor | None, ...],
    *numbers: object,
    fresh: tuple[Tensor | Part | None, ...] = (),
) -> bool:
    """Launch ``prepare(*tensors, *fresh, *numbers)`` and return True; or False, if that is None.

    Args:
        prepare: makes the launch. Must be a function of the shapes, strides, dtypes and device of the
            tensors, of their addresses modulo 16, and of ``numbers``; of nothing else. Whatever tensor or
            descriptor it puts among the arguments must be one of the tensors, or be based on one.
        tensors: on the current device, or None; the first that is not says which device.
        numbers: hashable; equal ones of different types (1 and 1.0) must make the same launch.
        fresh: what the caller has just allocated, or None. Of these the plan is told by addresses alone:
            dtypes, strides, and what ``prepare`` reads of shapes must follow from the rest.
    """
    key, addresses = plan_key(prepare, tensors, numbers, fresh)
    plan = _plans.get(key)
    tape = current_tape()
    if plan is not None and may_bypass(plan.kernel):
        if tape is not None:
            tape.launched(plan, addresses)
        plan.run(key[1], addresses)
        return True
    tensors = (*tensors, *[t.tensor() if isinstance(t, Part) else t for t in fresh])
    what = prepare(*tensors, *numbers)
    if what is None:
        return False
    if tape is not None:
        tape.launched(None, addresses)
    compiled = what.kernel[what.grid](*what.args, **what.constants)
    if key[1] >= 0 and key not in _plans and may_bypass(what.kernel) and not _repeats(tensors):
        if len(_plans) >= _MOST_PLANS:
            # the oldest: if it is still in use, it comes back at the cost of one ordinary launch
            _plans.pop(next(iter(_plans)), None)
        _plans[key] = make_plan(what, tensors, compiled)
    return True


def plan_key(
    prepare: Callable[..., Launch],
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[object, ...],
    fresh: tuple[Tensor | Part | None, ...] = (),
) -> tuple[tuple, list[int | None]]:
    """Return all that a launch depends on but addresses, and the addresses.

    Second in the key is the current device, or -1 where the tensors are not on a GPU.
    """
    key: list[object] = [prepare, -1, numbers]
    addresses: list[int | None] = []
    for t in tensors:
        if t is None:
            key.append(None)
            addresses.append(None)
        else:
            address = t.data_ptr()
            addresses.append(address)
            key += (t.shape, t.stride(), t.dtype, address & 15)
    for t in fresh:
        if t is None:
            key.append(None)
            addresses.append(None)
        else:
            address = t.data_ptr()
            addresses.append(address)
            key.append(address & 15)
    if on_gpu(tensors):
        key[1] = torch.cuda.current_device()
    return tuple(key), addresses


def on_gpu(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether the first tensor that there is lies on a GPU."""
    for t in tensors:
        if t is not None:
            return t.is_cuda
    return False


def _repeats(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether a tensor is passed twice: which of the two an argument is, could not be told."""
    given = [id(t) for t in tensors if t is not None]
    return len(set(given)) < len(given)


def make_plan(what: Launch, tensors: tuple[Tensor | None, ...], compiled: object) -> Plan | None:
    """Return the plan for launches like ``what``, or None where Triton must do them."""
    call = bind(compiled, what.grid)
    slots = {id(t): i for i, t in enumerate(tensors) if t is not None}
    names = what.kernel.arg_names[len(what.args) :]
    if call is None or any(name not in what.constants for name in names):
        return None
    arguments = [*what.args, *(what.constants[name] for name in names)]
    makers = descriptor_makers(compiled, [value for value in arguments if is_descriptor(value)])
    if makers is None or any(isinstance(value, (tuple, list)) for value in arguments):
        return None
    values, pointers, descriptors, rest = [], [], {}, iter(makers)
    for value in arguments:
        tensor = value.base if is_descriptor(value) else value
        if not isinstance(tensor, Tensor):
            values.append(value)
        elif id(tensor) not in slots:
            return None
        elif tensor is value:
            pointers.append((len(values), slots[id(tensor)]))
            values.append(None)
        else:
            maker = next(rest)
            # kernels of a varying number of operands are given some descriptors more than once
            places, _, first = descriptors.setdefault(id(value), ([], slots[id(tensor)], maker))
            if first.meta != maker.meta:
                return None
            places.append(len(values))
            values += [None, *maker.fields["shape"], *maker.fields["strides"]]
    return Plan(what.kernel, call, values, pointers, list(descriptors.values()), current_stream())

"""Records what a function does on a GPU, to do the same again on other tensors without the function.

A function that only allocates, looks at parts of tensors, and launches kernels through ``_launch`` is known
by its allocations and its launches. Anything else that it does makes the record incomplete.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

__all__ = ["Buffer", "Recorded", "Tape", "current_tape"]

_EMPTY = (torch.ops.aten.new_empty.default, torch.ops.aten.empty.memory_format)
_ZEROS = (torch.ops.aten.new_zeros.default, torch.ops.aten.zeros.default)
# scratch up to this many bytes lies beside zeros and is filled with them, at the price of an allocation less
_SMALL = 2**18
_MOST_FILLED = 4096  # up to 5 KiB each, with their descriptors


class Buffer(NamedTuple):
    """One allocation. ``rows``: the first of shape stands for the leading dimensions of what a pass is of."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    zeros: bool
    rows: bool = False
    # of a buffer of rows of several results: the rows of each
    split: tuple[int, ...] | None = None
    # of one that is wider than its result: shape and strides of that
    window: tuple[tuple[int, ...], tuple[int, ...]] | None = None


@dataclass(frozen=True, eq=False)
class Recorded:
    """Launches on addresses: those of given tensors, of buffers, of ``places``, and None, in this order."""

    launches: tuple[Any, ...]  # plans of _launch
    places: tuple[tuple[int, int], ...]  # index into those before, and the byte after it
    buffers: tuple[Buffer, ...]
    results: int  # so many of the buffers, the first, hold results
    parts: tuple[int, ...]  # which of these hold several, or one that is narrower

    def run(self, like: Tensor, addresses: list[int], lead: Sequence[int]) -> list[Tensor | list[Tensor]]:
        """Allocate, launch, and return what the buffers of results hold."""
        made, device = [], like.device
        for shape, strides, dtype, zeros in _allocations(self, lead):
            # the cheapest for the host of all ways to allocate
            new = torch.empty_strided(shape, strides, dtype=dtype, device=device)
            made.append(new.zero_() if zeros else new)
        addresses += [t.data_ptr() for t in made]
        index = like.get_device()
        for plan, values in _filled(self, tuple(addresses)):
            plan.call(plan.stream(index), values)
        results: list[Tensor | list[Tensor]] = made[: self.results]
        for i in self.parts:
            _, _, _, _, split, window = self.buffers[i]
            results[i] = made[i].as_strided(*window) if split is None else made[i].split_with_sizes(split)
        return results


@lru_cache(maxsize=_MOST_FILLED)
def _allocations(known: Recorded, lead: Sequence[int]) -> list[tuple[Sequence[int], list[int], Any, bool]]:
    """Return shape, strides, dtype, and whether it is zeros, of each buffer."""
    shapes = [(*lead, own.shape[-1]) if own.rows else own.shape for own in known.buffers]
    strides = [[prod(shape[i + 1 :]) for i in range(len(shape))] for shape in shapes]
    return [(*own, b.dtype, b.zeros) for *own, b in zip(shapes, strides, known.buffers, strict=True)]


# of a step of training the allocator makes much the same addresses time and again
@lru_cache(maxsize=_MOST_FILLED)
def _filled(known: Recorded, addresses: tuple[int, ...]) -> list[tuple[Any, list[object]]]:
    """Return each plan, and what its kernel is given."""
    places = [addresses[i] + byte for i, byte in known.places]
    return [(plan, plan.filled((*addresses, *places, None))) for plan in known.launches]


class Tape(TorchDispatchMode):
    """While it is entered, records allocations and launches."""

    def __init__(self) -> None:
        super().__init__()
        self.complete = True
        self._made: list[tuple[Tensor, bool]] = []
        self._launches: list[tuple[Any, list[int | None]]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # or the first record imports torch._dynamo, which keeps the frames of all callers, with their x
        return False

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        if not self.complete:
            return result
        if op in _EMPTY or op in _ZEROS:
            # kept, so that nothing else comes to lie at its address
            self._made.append((result, op in _ZEROS))
            return result
        written = [a.alias_info.is_write for a in op._schema.arguments if a.alias_info is not None]
        if not written or any(written):
            self._give_up()
        return result

    def launched(self, plan: Any, addresses: list[int | None]) -> None:
        """Note a launch, and its plan if it had one."""
        if plan is None:
            self._give_up()
        self._launches.append((plan, addresses))

    def _give_up(self) -> None:
        # what was allocated so far goes as it would without a record
        self.complete = False
        self._made.clear()

    def recorded(
        self, given: Sequence[Tensor], results: Sequence[Tensor], rows: int, above: int | None = None
    ) -> Recorded | None:
        """Return what was done, for a function of ``given`` with ``results``, None if that cannot be told.

        The first ``rows`` of the results are of rows, and share their memory with no other. The result
        ``above`` may have more rows, with scratch in them.
        """
        of_results = self._of_results(results, rows) if self.complete and self._launches else None
        if of_results is None:
            return None
        buffers, order = of_results
        found, used = _Places(given, [t for t, _ in self._made]), {}
        for address in [a for _, addresses in self._launches for a in addresses if a is not None]:
            used[address] = used.get(address) or found.of(address)
        if None in used.values():
            return None
        at = self._scratch(buffers, order, {i for is_made, i, _ in used.values() if is_made}, above)
        index, places, bases = {}, [], len(given) + len(buffers)
        for address, (is_made, i, byte) in used.items():
            buffer, start = at[i] if is_made else (0, 0)
            base = len(given) + buffer if is_made else i
            index[address] = base
            if start + byte:
                index[address] = bases + len(places)
                places.append((base, start + byte))
        index[None] = bases + len(places)
        launches = [plan.ordered([index[a] for a in addresses]) for plan, addresses in self._launches]
        parts = [i for i in range(len(order)) if buffers[i].split or buffers[i].window]
        return Recorded(tuple(launches), tuple(places), tuple(buffers), len(order), tuple(parts))

    def _of_results(self, results: Sequence[Tensor], rows: int) -> tuple[list[Buffer], list[int]] | None:
        """Return the buffers of results, and which allocation each is."""
        starts = {t.untyped_storage().data_ptr(): i for i, (t, _) in enumerate(self._made)}
        owners = [starts.get(t.untyped_storage().data_ptr()) for t in results]
        order = list(dict.fromkeys(owners))
        if None in owners or any(owners.count(owner) > 1 for owner in owners[:rows]):
            return None
        if owners != [owner for owner in order for _ in range(owners.count(owner))]:
            return None
        buffers = []
        for owner in order:
            parts = [t for t, own in zip(results, owners, strict=True) if own == owner]
            buffer = _buffer(parts, *self._made[owner], rows=len(buffers) < rows)
            if buffer is None:
                return None
            buffers.append(buffer)
        return buffers, order

    def _scratch(
        self, buffers: list[Buffer], order: list[int], used: set[int], above: int | None
    ) -> dict[int, tuple[int, int]]:
        """Add buffers of scratch; return for each allocation its buffer, and the byte where it begins."""
        at = {owner: (i, 0) for i, owner in enumerate(order)}
        rest = [i for i in sorted(used) if i not in at]
        zeros = [i for i in rest if self._made[i][1]]
        beside = [i for i in rest if not self._made[i][1] and zeros and self._bytes(i) <= _SMALL]
        empty = [i for i in rest if i not in zeros and i not in beside]
        for group, filled in ((zeros + beside, True), (empty, False)):
            starts = [0]
            for i in group:
                starts.append(starts[-1] + -(-self._bytes(i) // 256) * 256)
            buffer, first, size = len(buffers), 0, starts[-1]
            if filled and above is not None and 0 < size <= _SMALL and _may_grow(buffers[above]):
                buffer, whole = above, buffers[above]
                pitch = whole.shape[1] * whole.dtype.itemsize
                first = whole.shape[0] * pitch
                shape = (whole.shape[0] + -(-size // pitch), whole.shape[1])
                buffers[above] = whole._replace(shape=shape, zeros=True)
            elif group:
                buffers.append(Buffer((size // 4,), torch.float32, filled))
            at |= {i: (buffer, first + start) for i, start in zip(group, starts, strict=False)}
        return at

    def _bytes(self, i: int) -> int:
        return self._made[i][0].untyped_storage().nbytes()


def _may_grow(buffer: Buffer) -> bool:
    """Whether rows may be added that begin on 16 bytes."""
    _, _, _, rows, split, window = buffer
    plain = len(buffer.shape) == 2 and not rows and split is None and window is None
    return plain and prod(buffer.shape) * buffer.dtype.itemsize % 16 == 0


def _buffer(parts: list[Tensor], whole: Tensor, zeros: bool, rows: bool) -> Buffer | None:
    """Return the buffer that holds ``parts``, results, as the allocation ``whole`` does."""
    first, size = parts[0], sum(t.numel() for t in parts)
    if any(t.dtype != first.dtype for t in parts) or whole.dtype != first.dtype:
        return None
    plain = all(t.is_contiguous() for t in parts) and size == whole.numel()
    if plain and len(parts) == 1:
        return Buffer(tuple(first.shape), first.dtype, zeros, rows)
    if plain and all(t.dim() == 2 and t.shape[1] == first.shape[1] for t in parts):
        starts = [t.storage_offset() for t in parts]
        ends = [0, *[start + t.numel() for start, t in zip(starts, parts, strict=True)]]
        if starts == ends[:-1]:
            split = tuple([t.shape[0] for t in parts])
            return Buffer((sum(split), first.shape[1]), first.dtype, zeros, split=split)
    if len(parts) == 1 and not rows and first.storage_offset() == 0:
        window = tuple(first.shape), first.stride()
        return Buffer(tuple(whole.shape), first.dtype, zeros, window=window)
    return None


class _Places:
    """Tells which tensor an address lies in."""

    def __init__(self, given: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        addresses = [t.data_ptr() for t in given]
        self._exact = {address: i for i, address in enumerate(addresses)}
        self._ambiguous = len(self._exact) < len(addresses)
        self._given = [(t.data_ptr(), t.data_ptr() + _span(t), i) for i, t in enumerate(given)]
        held = [t.untyped_storage() for t in made]
        self._made = [(own.data_ptr(), own.data_ptr() + own.nbytes(), i) for i, own in enumerate(held)]

    def of(self, address: int) -> tuple[bool, int, int] | None:
        """Return whether it was made, its index, and the byte inside; None where that cannot be told."""
        if self._ambiguous:
            return None
        if address in self._exact:
            return False, self._exact[address], 0
        inside = [(False, i, address - low) for low, high, i in self._given if low <= address < high]
        inside += [(True, i, address - low) for low, high, i in self._made if low <= address < high]
        return inside[0] if len(inside) == 1 else None


def _span(t: Tensor) -> int:
    """Return how many bytes a tensor reaches over."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size() if t.numel() else 0


def current_tape() -> Tape | None:
    """Return the tape that records now, if one does."""
    mode = _get_current_dispatch_mode()
    return mode if type(mode) is Tape else None

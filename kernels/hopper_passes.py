"""Whole passes of LoRA layers on Hopper that the host has seen before: allocations and launches alone.

A pass is known by the layouts of its tensors and by its numbers. Functions of ``dispatch`` are called here,
and what they do is recorded as they do it; ops ask for a known pass first.
"""

from collections.abc import Callable, Sequence
from threading import Lock

import torch
from torch import Tensor
from torch.nn import Parameter

from ._tape import Recorded, Tape
from ._triton_api import may_bypass

__all__ = ["find_forward", "known_backward", "known_forward", "lora_group_backward", "lora_group_forward"]

_MOST_PASSES = 4096
# a kernel's first launch is Triton's; one more try for whatever else is made at first
_TRIES = 2
_PLAIN = (Tensor, Parameter)

# or how often a pass could not be recorded
_forward: dict[tuple, Recorded | int] = {}
_backward: dict[tuple, Recorded | int] = {}
_recording = Lock()


def _look(bigs: Sequence[Tensor], others: Sequence[Tensor | None], *rest: object) -> tuple | None:
    """Return what a launch depends on but addresses, None if it cannot be known.

    ``bigs``: (..., columns), described as rows. ``others`` may be of any type yet.
    """
    key = [bigs[0].device, rest]
    for t in bigs:
        dims = t.dim()
        if dims == 2:
            key += (t.shape, t.stride(), t.dtype)
        elif dims and t.is_contiguous() and (size := t.numel()):
            columns = t.shape[-1]
            key += ((size // columns, columns), (columns, 1), t.dtype)
        else:
            return None
    for t in others:
        if t is None:
            key.append(None)
        elif type(t) in _PLAIN:
            key += (t.shape, t.stride(), t.dtype, t.device)
        else:
            return None
    return tuple(key)


def _addresses(tensors: Sequence[Tensor | None]) -> list[int] | None:
    """Return where tensors are, or None where not all are on 16 bytes: plans are of those that are."""
    found, low = [], 0
    for t in tensors:
        if t is not None:
            address = t.data_ptr()
            low |= address
            found.append(address)
    return None if low & 15 else found


def _here(t: Tensor, known: Recorded) -> bool:
    """Whether ``t`` is on the current device, and launches may go past Triton."""
    for plan in known.launches:
        if plan.kernel.pre_run_hooks:
            return False
    # what else watches launches does not tell kernels apart
    return t.get_device() == torch.cuda.current_device() and may_bypass(known.launches[0].kernel)


def _run(known: Recorded, like: Tensor, tensors: Sequence[Tensor | None]) -> list | None:
    addresses = _addresses(tensors)
    if addresses is None or not _here(like, known):
        return None
    return known.run(like, addresses, like.shape[:-1])


def _record(
    passes: dict[tuple, Recorded | int],
    key: tuple | None,
    run: Callable[[], tuple],
    tensors: Sequence[Tensor | None],
    rows: int,
    above: int | None,
) -> tuple:
    """Return what ``run`` returns; the second time, remember what it does: see ``Tape.recorded``."""
    tries = _TRIES if key is None else passes.get(key)
    if tries is None:
        # sizes that come once, as of batches that are not packed, would pay for a record in vain
        _remember(passes, key, 0)
    if type(tries) is not int or tries >= _TRIES or _addresses(tensors) is None:
        return run()
    # torch notes in one place for all threads whether there is a mode: two must not come and go interleaved
    if not _recording.acquire(blocking=False):
        return run()
    try:
        with Tape() as tape:
            done = run()
    finally:
        _recording.release()
    given = [t for t in tensors if t is not None]
    known = tape.recorded(given, _flat(done), rows, above)
    _remember(passes, key, tries + 1 if known is None else known)
    return done


def _remember(passes: dict[tuple, Recorded | int], key: tuple, value: Recorded | int) -> None:
    if len(passes) >= _MOST_PASSES:
        passes.pop(next(iter(passes)), None)
    passes[key] = value


def _flat(results: Sequence[Tensor | Sequence | None]) -> list[Tensor]:
    """Return all tensors of nested lists, in their order."""
    flat = []
    for own in results:
        if isinstance(own, (list, tuple)):
            flat += _flat(own)
        elif own is not None:
            flat.append(own)
    return flat


def find_forward(
    x: Tensor,
    ws: Sequence[Tensor],
    a_list: Sequence[Tensor],
    b_list: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scales: tuple[float, ...],
    dropout_p: float,
) -> Recorded | None:
    """Return the pass that was made of such tensors, if any: they are as they must be."""
    known = _forward.get(_look((x,), (*ws, *a_list, *b_list, *biases), scales, dropout_p))
    return known if type(known) is Recorded else None


def known_forward(
    known: Recorded, x: Tensor, tensors: Sequence[Tensor | None], seed: Tensor | None
) -> tuple[list[Tensor], Tensor, Tensor | None] | None:
    """As ``dispatch.lora_group_forward`` for x (..., K), y (..., N); h may have more rows, of no meaning.

    ``tensors``: ws, a_list, b_list and biases one after another. None: a launch must be made anew.
    """
    done = _run(known, x, (x, *tensors, seed))
    if done is None:
        return None
    P = len(tensors) // 4
    return done[:P], done[P], done[P + 1] if len(done) > P + 1 else None


def lora_group_forward(
    x: Tensor,
    ws: Sequence[Tensor],
    a_list: Sequence[Tensor],
    b_list: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scales: Sequence[float],
    seed: Tensor | None,
    dropout_p: float,
    function: Callable[..., tuple],
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """As ``function``, which is ``dispatch.lora_group_forward``, and remember what it did."""
    tensors = (*ws, *a_list, *b_list, *biases)
    key = _look((x,), tensors, tuple(scales), dropout_p)

    def run() -> tuple:
        arguments = (list(ws), list(a_list), list(b_list), list(biases), list(scales))
        return function(x, *arguments, seed, dropout_p)

    return _record(_forward, key, run, (x, *tensors, seed), len(ws), len(ws))


def _backward_key(
    dys: Sequence[Tensor],
    x: Tensor | None,
    others: Sequence[Tensor | None],
    h: Tensor | None,
    mask: Tensor | None,
    *numbers: object,
) -> tuple | None:
    for dy in dys:
        if dy is None:
            return None
    of_h = None
    if h is not None:
        strides = h.stride()
        of_h = strides, h.dtype
        if strides[0] != h.shape[1]:
            # what lies beside the ranks is made use of if it is there
            of_h += h.storage_offset(), h.untyped_storage().nbytes()
    return _look(dys if x is None else (*dys, x), others, x is None, of_h, mask is None, *numbers)


def known_backward(
    dys: Sequence[Tensor | None],
    x: Tensor | None,
    ws: Sequence[Tensor],
    a_list: Sequence[Tensor],
    b_list: Sequence[Tensor],
    h: Tensor | None,
    mask: Tensor | None,
    scales: tuple[float, ...],
    seed: Tensor | None,
    dropout_p: float,
) -> list[Tensor] | None:
    """Return dx (..., K), each da if x is given, and each db, where all that is needed.

    ``dys`` may be (..., N), and x (..., K); h may have rows below.
    """
    tensors = (*ws, *a_list, *b_list)
    key = _backward_key(dys, x, tensors, h, mask, scales, dropout_p)
    known = None if key is None else _backward.get(key)
    if type(known) is not Recorded:
        return None
    done = _run(known, dys[0], (*dys, x, *tensors, h, mask, seed))
    return None if done is None else done if len(dys) == 1 else _flat(done)


def lora_group_backward(
    dys: Sequence[Tensor | None],
    x: Tensor | None,
    ws: Sequence[Tensor],
    a_list: Sequence[Tensor],
    b_list: Sequence[Tensor],
    h: Tensor | None,
    mask: Tensor | None,
    scales: Sequence[float],
    seed: Tensor | None,
    dropout_p: float,
    need_x: bool,
    need_a: Sequence[bool],
    need_b: Sequence[bool],
    function: Callable[..., tuple],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """As ``function``, which is ``dispatch.lora_group_backward``, and remember what it did."""
    tensors, key = (*ws, *a_list, *b_list), None
    if need_x and all(need_b) and (x is not None if all(need_a) else x is None and not any(need_a)):
        key = _backward_key(dys, x, tensors, h, mask, tuple(scales), dropout_p)

    def run() -> tuple:
        arguments = (list(ws), list(a_list), list(b_list), h, mask, list(scales), seed, dropout_p)
        return function(list(dys), x, *arguments, need_x, list(need_a), list(need_b))

    return _record(_backward, key, run, (*dys, x, *tensors, h, mask, seed), 1, None)

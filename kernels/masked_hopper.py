"""The backward pass of a layer with a masked b on Hopper: dx, dh and the entries of db in one launch."""

from torch import Tensor

from ._config import DeviceFacts, device_facts
from .dropout_mask import dropout_mask
from .hopper import hopper_backward_input
from .hopper_lora import _gradients_of_factors, _padded, _scaled, backward_config
from .lora_backward_factors import factor_counters
from .lora_forward import drop_threshold

# db beside the GEMM: at 32 ranks memory takes the sums of its entries too slowly, at any density
_MOST_RANKS = 16


def masked_backward(
    dy: Tensor, x: Tensor | None, w: Tensor, a: Tensor, b: Tensor, h: Tensor | None, mask: Tensor | None,
    entries: tuple[Tensor, Tensor, int] | None, scale: float, seed: Tensor | None, dropout_p: float,
    need_a: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:  # fmt: skip
    """Return dx, da, and the ``entries`` of db packed, or None where other kernels should serve.

    ``entries``: words, offsets and count of the mask of db, or None. The third result is None, and left to
    the caller, where there are none or the rank is above 16.
    """
    facts: DeviceFacts = device_facts(dy.device)
    (M, N), (R, K) = dy.shape, a.shape
    config = backward_config(M, (N,), K, R, facts)
    if config is None or not config.SIDES or (need_a and x.stride(1) != 1):
        return None
    beside = entries is not None and R <= _MOST_RANKS and entries[1].element_size() == 4
    kept = h if beside else None
    if R % 8:
        b, kept = _padded(b), None if kept is None else _padded(kept)
    if seed is not None and mask is None:
        mask = dropout_mask(seed, M, K, drop_threshold(dropout_p, seed))
    done = hopper_backward_input(
        [dy], [w], [a], [b], kept, _scaled([scale], seed, dropout_p), mask,
        factor_counters(K, R) if need_a else 0, entries if beside else None, config=config,
    )  # fmt: skip
    if done is None:
        return None
    dx, dh, parts, zeros = done
    da, packed = _gradients_of_factors(x, dh if R % 8 == 0 else dh[:, :R], mask, parts, zeros, need_a)
    return dx, da, packed

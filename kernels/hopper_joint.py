"""GEMMs of projections that share x, on Hopper, with hidden factors that exist: those of float32 adapters.

Both return None where other kernels should serve.
"""

from collections.abc import Sequence

from torch import Tensor

from ._cast import beside, cast_pair
from ._config import block_rank, device_facts
from .dropout_mask import dropout_mask
from .hopper import MOST_PROJECTIONS, hopper_input, hopper_outputs
from .hopper_lora import _worthwhile, given_config
from .lora_forward import drop_threshold

__all__ = ["joint_input", "joint_outputs"]


def _serves(
    big: Tensor,
    cols: tuple[int, ...],
    depths: tuple[int, ...],
    ws: Sequence[Tensor],
    factors: Sequence[Tensor],
    ranks: Sequence[int],
) -> bool:
    R = ranks[0]
    return (
        2 <= len(ws) <= MOST_PROJECTIONS
        and big.dtype.itemsize == 2
        and all(size % 8 == 0 for w in ws for size in w.shape)
        and block_rank(R, 128) == R <= 128
        and all(rank == R for rank in ranks)
        and all(t.is_contiguous() for t in factors)
        and _worthwhile(big.shape[0], cols, depths, device_facts(big.device))
    )


def joint_outputs(
    x: Tensor,
    ws: Sequence[Tensor],
    h: Tensor,
    b_list: Sequence[Tensor],
    biases: Sequence[Tensor | None],
) -> list[Tensor] | None:
    """Return every ``y = x wᵀ + h bᵀ + bias``, h (M, P·R) of all projections side by side."""
    given, sizes = [bias for bias in biases if bias is not None], tuple([w.shape[0] for w in ws])
    if len(given) not in (0, len(ws)):
        return None
    if not _serves(x, sizes, x.shape[1:], ws, b_list, [b.shape[1] for b in b_list]):
        return None
    h, b = cast_pair(h, beside(b_list, 0, x.dtype), x.dtype)
    config = given_config("hopper_forward", x.shape[0], sizes, x.shape[1], device_facts(x.device))
    return hopper_outputs(x, ws, h, b.split(sizes), given, config=config)


def joint_input(
    dys: Sequence[Tensor],
    ws: Sequence[Tensor],
    dh: Tensor,
    a: Tensor,
    ranks: Sequence[int],
    seed: Tensor | None,
    dropout_p: float,
) -> Tensor | None:
    """Return ``dx = Σ dy w + drop(dh a)``; dh (M, P·R) and a (P·R, K) of all projections."""
    first, K, sizes = dys[0], a.shape[1], tuple([w.shape[0] for w in ws])
    if not _serves(first, (K,), sizes, ws, [a], ranks):
        return None
    mask, factor = None, 1.0
    if seed is not None:
        threshold = drop_threshold(dropout_p, seed)
        mask, factor = dropout_mask(seed, first.shape[0], K, threshold), 65536 / (65536 - threshold)
    dh, a = cast_pair(dh, a, first.dtype, factor)
    facts = device_facts(first.device)
    config = given_config("hopper_backward_input", first.shape[0], sizes, K, facts)
    return hopper_input(dys, ws, dh, a.split(list(ranks)), mask, config=config)

"""Which entries of all A, or all B, go next: units of the four structures, ranked over all layers."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .largest import largest_entries

__all__ = ["keep_components", "keep_entries"]

_GROUP, _STAYS, _BLOCK = 4, 2, 16
# keys are floats above all that a score may become, and above zero, which is for what is gone
_FIRST = torch.finfo(torch.float32).max
_MOST = 2.0**126
_LIFT = 1 << 23  # from the bits of 0.0 to those of the smallest normal number


def keep_entries(
    structure: str, scores: Sequence[Tensor], alive: Sequence[Tensor], sparsity: float, progress: float
) -> list[Tensor]:
    """Return what is still alive of each tensor, bool, once pruning is at ``progress`` of ``sparsity``.

    Nothing that is dead comes back. Of every tensor at least one unit stays. Ties go by position: the first
    stay.

    Args:
        structure: "unstructured", "2:4" along the last axis, or "blocks".
        scores: of each tensor's entries, at least zero, 2-D.
        alive: bool, of the shapes of ``scores``.
        sparsity: share of all units, of the tensors together, that is pruned in the end.
        progress: in [0, 1].
    """
    shapes = [score.shape for score in scores]
    if structure == "blocks":
        scores = [_block_means(score) for score in scores]
        alive = [_block_means(flags.float()) > 0 for flags in alive]
    keys = [_keys(score, flags) for score, flags in zip(scores, alive, strict=True)]
    kept = _keep_pairs(keys, progress) if structure == "2:4" else _keep_units(keys, sparsity, progress)
    if structure == "blocks":
        kept = [_of_entries(flags, shape) for flags, shape in zip(kept, shapes, strict=True)]
    return kept


def keep_components(
    a_scores: Sequence[Tensor],
    b_scores: Sequence[Tensor],
    alive: Sequence[Tensor],
    sparsity: float,
    progress: float,
) -> list[Tensor]:
    """Return which components of the rank are still alive in each layer, (R,), bool; see ``keep_entries``.

    The score of component c is ‖A[c, :]‖ · ‖B[:, c]‖, which is the norm of its share of the update.

    Args:
        a_scores, b_scores: of the entries of A, (R, K), and B, (N, R).
        alive: (R,), bool.
    """
    norms = [a.norm(dim=1) * b.norm(dim=0) for a, b in zip(a_scores, b_scores, strict=True)]
    keys = [_keys(score, flags) for score, flags in zip(norms, alive, strict=True)]
    return _keep_units(keys, sparsity, progress)


def _keys(scores: Tensor, alive: Tensor) -> Tensor:
    """Return float32 numbers in the order of ``scores``: above zero where ``alive``, and zero elsewhere."""
    scores = scores.detach().float().nan_to_num(nan=0.0).clamp(max=_MOST).contiguous()
    return (scores.view(torch.int32) + _LIFT).view(torch.float32).masked_fill_(~alive, 0)


def _largest(keys: list[Tensor], count: int) -> list[Tensor]:
    return [taken for _, taken in largest_entries(dict(enumerate(keys)), count)]


def _keep_units(keys: list[Tensor], sparsity: float, progress: float) -> list[Tensor]:
    for key in keys:
        if key.numel():
            key.view(-1)[key.argmax()] = _FIRST
    total, floor = sum(key.numel() for key in keys), sum(key.numel() > 0 for key in keys)
    pruned = min(round(sparsity * total), total - floor)
    return _largest(keys, total - round(progress * pruned))


def _keep_pairs(keys: list[Tensor], progress: float) -> list[Tensor]:
    pruned = 0
    for key in keys:
        width = key.shape[-1]
        groups = F.pad(key, (0, -width % _GROUP), value=-1).unflatten(-1, (-1, _GROUP))
        order = groups.argsort(dim=-1, descending=True, stable=True)[..., :_STAYS]
        stays = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True)
        stays = stays.flatten(-2)[..., :width]
        pruned += key.numel() - int(stays.sum())
        key[stays] = _FIRST
    total = sum(key.numel() for key in keys)
    return _largest(keys, total - round(progress * pruned))


def _block_means(scores: Tensor) -> Tensor:
    """Return the mean of each block, over the entries that an edge leaves of it."""
    rows, cols = scores.shape
    sums = _blocked(scores).sum((1, 3))
    heights, widths = (_lengths(size, scores.device) for size in (rows, cols))
    return sums / (heights[:, None] * widths)


def _blocked(values: Tensor) -> Tensor:
    rows, cols = values.shape
    padded = F.pad(values, (0, -cols % _BLOCK, 0, -rows % _BLOCK))
    return padded.view(-(-rows // _BLOCK), _BLOCK, -(-cols // _BLOCK), _BLOCK)


def _lengths(size: int, device: torch.device) -> Tensor:
    starts = torch.arange(0, size, _BLOCK, device=device)
    return (size - starts).clamp(max=_BLOCK)


def _of_entries(flags: Tensor, shape: Sequence[int]) -> Tensor:
    rows, cols = shape
    return flags.repeat_interleave(_BLOCK, 0)[:rows].repeat_interleave(_BLOCK, 1)[:, :cols].contiguous()

"""A trained matrix that exists at the entries of a mask alone: its parameter is the vector of values."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .sparse_mask import SparseMask

__all__ = ["MaskedFactors", "SparseFactor"]


class MaskedFactors(NamedTuple):
    """The update ΔW = scale · B a of one layer, a (R, K), where B (N, R) has ``b_values`` at ``b_mask``.

    ``train_mask``: the entries of B that train, inside ``b_mask``, or None for all.
    """

    a: Tensor
    b_values: Tensor
    b_mask: SparseMask
    scale: float
    train_mask: SparseMask | None = None


class SparseFactor(nn.Module):
    """A (rows, cols) matrix with entries at ``mask``, of which those in ``train_mask`` train.

    The only parameter is ``values``, one number for each entry that trains, in the order of
    ``SparseMask.pack``; so its gradient and an optimizer's state are such vectors too, and no optimizer can
    touch what does not train. Where all entries train there is nothing else but the mask; otherwise ``kept``
    holds all entries, and ``values`` stands in for some of them.

    Args:
        mask: the entries that exist.
        values: all of them, (nnz,), copied.
        train_mask: those that train, inside ``mask``; None for all.

    Memory: the values, and 4 bytes a row and one bit a place for the mask; if not all entries train, all
    values, a second mask, and 8 bytes for each that trains.
    """

    def __init__(self, mask: SparseMask, values: Tensor, train_mask: SparseMask | None = None) -> None:
        super().__init__()
        self.shape, self.nnz = mask.shape, mask.nnz
        self.register_buffer("words", mask.words)
        self.register_buffer("offsets", mask.offsets)
        for name in ("kept", "train_words", "train_offsets"):
            self.register_buffer(name, None)
        self.register_buffer("places", None, persistent=False)
        self.train_nnz = mask.nnz
        values = values.detach()
        if train_mask is not None and train_mask != mask:
            self.train_nnz = train_mask.nnz
            self.kept, self.train_words, self.train_offsets = (
                values.clone(),
                train_mask.words,
                train_mask.offsets,
            )
            self.places = _places(mask, train_mask)
            values = values.new_empty(self.train_nnz) if values.is_meta else values[self.places]
        self.values = nn.Parameter(values.clone())

    @property
    def mask(self) -> SparseMask:
        """The entries that exist."""
        # every forward pass comes here: looked up past nn.Module's own, slow way
        buffers = self._buffers
        return SparseMask(buffers["words"], buffers["offsets"], self.shape, self.nnz)

    @property
    def train_mask(self) -> SparseMask | None:
        """The entries that train, or None where all do."""
        buffers = self._buffers
        if buffers["train_words"] is None:
            return None
        return SparseMask(buffers["train_words"], buffers["train_offsets"], self.shape, self.train_nnz)

    def all_values(self) -> Tensor:
        """Return the values of all entries, (nnz,), differentiable in ``values``."""
        if self._buffers["kept"] is None:
            return self._parameters["values"] if "values" in self._parameters else self.values
        return self.kept.index_copy(0, self.places, self.values)

    def dense(self) -> Tensor:
        """Return (rows, cols), zero where there is no entry, differentiable in ``values``."""
        return self.mask.unpack(self.all_values())

    def extra_repr(self) -> str:
        trains = "" if self.train_words is None else f", trains={self.train_nnz}"
        return f"shape={self.shape}, nnz={self.nnz}{trains}"

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        # they may be on "meta" where the masks, assigned, no longer are
        if self.places is not None and not self.words.is_meta:
            self.places = _places(self.mask, self.train_mask)


def _places(mask: SparseMask, train_mask: SparseMask) -> Tensor:
    if mask.words.is_meta:
        return torch.empty(train_mask.nnz, dtype=torch.int64, device="meta")
    return mask.index_of(train_mask)

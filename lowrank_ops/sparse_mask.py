"""Which entries of a matrix exist: one bit an entry, and where the values of each row begin."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .reference.masked_lora import mask_bits, nonzero

__all__ = ["SparseMask"]

_WORD = 32
_MOST = 2**31 - 1  # of int32


@dataclass(frozen=True, eq=False)
class SparseMask:
    """The places of a (rows, cols) matrix that hold a value; the values themselves are a vector, (nnz,).

    The vector goes through the places row by row, columns ascending. Immutable: every method returns
    something new. Made by :meth:`from_dense`, :meth:`from_words` or :meth:`meta`; the constructor checks
    nothing and reads nothing, so that a module which holds ``words`` and ``offsets`` as buffers may make one
    in every forward pass: ``SparseMask(self.words, self.offsets, shape, nnz)``.

    Args:
        words: (rows, ceil(cols / 32)), int32. Entry (i, j) exists if bit j % 32, from the least significant,
            of word (i, j // 32) is set; bits past the last column are not.
        offsets: (rows + 1,), int32, or int64 from 2³¹ entries on: ``offsets[i]`` entries come before row i.
        shape: (rows, cols).
        nnz: number of entries, ``offsets[rows]``.
    """

    words: Tensor
    offsets: Tensor
    shape: tuple[int, int]
    nnz: int

    @classmethod
    def from_dense(cls, dense: Tensor) -> SparseMask:
        """Return the mask of the True entries of ``dense``, (rows, cols), bool, on its device.

        Raises:
            TypeError: ``dense`` is no bool tensor. ValueError: it is not 2-D.
        """
        if not isinstance(dense, Tensor) or dense.dtype is not torch.bool:
            got = dense.dtype if isinstance(dense, Tensor) else type(dense).__name__
            raise TypeError(f"SparseMask.from_dense: dense must be a bool Tensor, got {got}")
        if dense.dim() != 2:
            raise ValueError(f"SparseMask.from_dense: dense must be (rows, cols), got {tuple(dense.shape)}")
        rows, cols = dense.shape
        width = -(-cols // _WORD)
        bits = torch.zeros(rows, width * _WORD, dtype=torch.uint8, device=dense.device)
        bits[:, :cols] = dense
        weights = 1 << torch.arange(8, dtype=torch.uint8, device=dense.device)
        words = torch.empty(rows, width, dtype=torch.int32, device=dense.device)
        words.view(torch.uint8).copy_((bits.view(rows, width * 4, 8) * weights).sum(2))
        return cls._counted(words, (rows, cols), dense.sum(1))

    @classmethod
    def from_words(cls, words: Tensor, shape: tuple[int, int]) -> SparseMask:
        """Return the mask whose bits are ``words``, as :attr:`words` of a mask of ``shape``.

        Raises:
            TypeError: ``words`` is not int32. ValueError: it does not fit ``shape``, or a bit past the last
            column is set.
        """
        rows, cols = map(int, shape)
        expected = (rows, -(-cols // _WORD))
        if words.dtype is not torch.int32:
            raise TypeError(f"SparseMask.from_words: words must be int32, got {words.dtype}")
        if tuple(words.shape) != expected:
            raise ValueError(
                f"SparseMask.from_words: words must be (rows, ceil(cols / 32)) = {expected}, "
                f"got {tuple(words.shape)}"
            )
        bits = mask_bits(words)
        if bits[:, cols:].any():
            raise ValueError(f"SparseMask.from_words: words must have no bit set past column {cols - 1}")
        return cls._counted(words.contiguous(), (rows, cols), bits.sum(1))

    @classmethod
    def meta(cls, shape: tuple[int, int], nnz: int) -> SparseMask:
        """Return a mask of ``shape`` with ``nnz`` entries, on the meta device: for planning."""
        rows, cols = map(int, shape)
        if not 0 <= nnz <= rows * cols:
            raise ValueError(f"SparseMask.meta: nnz must be in [0, {rows * cols}], got {nnz}")
        words = torch.empty(rows, -(-cols // _WORD), dtype=torch.int32, device="meta")
        offsets = torch.empty(rows + 1, dtype=_offset_type(nnz), device="meta")
        return cls(words, offsets, (rows, cols), int(nnz))

    @classmethod
    def _counted(cls, words: Tensor, shape: tuple[int, int], counts: Tensor) -> SparseMask:
        offsets = torch.zeros(shape[0] + 1, dtype=torch.int64, device=words.device)
        torch.cumsum(counts, 0, out=offsets[1:])
        nnz = int(offsets[-1])
        return cls(words, offsets.to(_offset_type(nnz)), shape, nnz)

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def density(self) -> float:
        """The share of entries that exist, in [0, 1]; 0 where there could be none."""
        return self.nnz / max(1, self.shape[0] * self.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of the mask: an eighth of a byte an entry of the matrix, and 4 a row."""
        return self.words.nbytes + self.offsets.nbytes

    def to(self, device: torch.device | str) -> SparseMask:
        """Return this mask on ``device``."""
        device = torch.device(device)
        if device == self.device:
            return self
        return SparseMask(self.words.to(device), self.offsets.to(device), self.shape, self.nnz)

    def to_dense(self) -> Tensor:
        """Return (rows, cols), bool."""
        return mask_bits(self.words)[:, : self.shape[1]].bool()

    def pack(self, dense: Tensor) -> Tensor:
        """Return the entries of ``dense``, (rows, cols), any dtype, that this mask has: (nnz,).

        Differentiable: the gradient of ``dense`` is zero elsewhere. On a GPU it waits for nothing.
        """
        _check_tensor("pack", "dense", dense)
        if tuple(dense.shape) != self.shape:
            raise ValueError(
                f"SparseMask.pack: dense must be (rows, cols) = {self.shape}, got {tuple(dense.shape)}"
            )
        self._check_device("pack", "dense", dense)
        return _Pack.apply(dense, self)

    def unpack(self, values: Tensor) -> Tensor:
        """Return (rows, cols) with ``values``, (nnz,), any dtype, at the entries, zero elsewhere.

        Differentiable: the gradient of ``values`` is (nnz,). On a GPU it waits for nothing.
        """
        _check_tensor("unpack", "values", values)
        if tuple(values.shape) != (self.nnz,):
            raise ValueError(
                f"SparseMask.unpack: values must be (nnz,) = ({self.nnz},), got {tuple(values.shape)}"
            )
        self._check_device("unpack", "values", values)
        return _Unpack.apply(values, self)

    def index_of(self, subset: SparseMask) -> Tensor:
        """Return where the entries of ``subset`` are in a packed vector of this mask: (subset.nnz,), int64.

        ``mask.pack(dense)[mask.index_of(subset)]`` is ``subset.pack(dense)``.

        Raises:
            ValueError: ``subset`` has another shape or device, or an entry that this mask does not have.
        """
        if not self.contains(subset):
            raise ValueError("SparseMask.index_of: subset must have no entry that the mask does not have")
        return nonzero(self.pack(subset.to_dense()), subset.nnz)

    def contains(self, subset: SparseMask) -> bool:
        """Whether every entry of ``subset``, of the same shape and device, is one of this mask's."""
        self._check_same("contains", subset)
        return not bool((subset.words & ~self.words).any())

    def union(self, other: SparseMask) -> SparseMask:
        """Return the mask of the entries of either."""
        self._check_same("union", other)
        return SparseMask.from_words(self.words | other.words, self.shape)

    def intersection(self, other: SparseMask) -> SparseMask:
        """Return the mask of the entries of both."""
        self._check_same("intersection", other)
        return SparseMask.from_words(self.words & other.words, self.shape)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SparseMask):
            return NotImplemented
        if self is other:
            return True
        if (self.shape, self.nnz, self.device) != (other.shape, other.nnz, other.device):
            return False
        return self.device.type != "meta" and torch.equal(self.words, other.words)

    __hash__ = None

    def __repr__(self) -> str:
        return f"SparseMask(shape={self.shape}, nnz={self.nnz}, density={self.density:.3g}, {self.device})"

    def _positions(self) -> Tensor:
        """Return the places of the entries in the flattened matrix, (nnz,), int64, ascending."""
        return nonzero(self.to_dense().flatten(), self.nnz)

    def _check_device(self, method: str, name: str, value: Tensor) -> None:
        if value.device != self.device:
            raise ValueError(
                f"SparseMask.{method}: {name} must be on the device of the mask, {self.device}, "
                f"got {value.device}"
            )

    def _check_same(self, method: str, other: SparseMask) -> None:
        if other.shape != self.shape:
            raise ValueError(
                f"SparseMask.{method}: the other mask must be of shape {self.shape}, got {other.shape}"
            )
        self._check_device(method, "the other mask", other.words)


class _Pack(torch.autograd.Function):
    """values = the entries of dense at the mask's places; the gradient is _Unpack, and so on."""

    @staticmethod
    def forward(ctx, dense: Tensor, mask: SparseMask) -> Tensor:
        ctx.mask = mask
        return dense.reshape(-1)[mask._positions()]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _Unpack.apply(grad, ctx.mask), None


class _Unpack(torch.autograd.Function):
    """dense = zeros with the values at the mask's places; the gradient is _Pack."""

    @staticmethod
    def forward(ctx, values: Tensor, mask: SparseMask) -> Tensor:
        ctx.mask = mask
        rows, cols = mask.shape
        dense = values.new_zeros(rows * cols)
        return dense.scatter_(0, mask._positions(), values).view(rows, cols)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _Pack.apply(grad, ctx.mask), None


def _check_tensor(method: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"SparseMask.{method}: {name} must be a Tensor, got {type(value).__name__}")


def _offset_type(nnz: int) -> torch.dtype:
    return torch.int32 if nnz <= _MOST else torch.int64

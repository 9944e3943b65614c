"""A wide sparse matrix made dense for the kernels of a layer, in one launch each way."""

from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from .functional import _pick_impl
from .sparse_mask import SparseMask

__all__ = ["expand", "word_offsets"]

_WORD = 32


def expand(values: Tensor, mask: SparseMask, offsets: Tensor | None, *, impl: str = "auto") -> Tensor:
    """Return (rows, cols) with ``values`` at the entries of ``mask``, as ``mask.unpack(values)`` does.

    Args:
        values: (nnz,), differentiable.
        mask: the entries.
        offsets: ``word_offsets(mask)``, kept by who calls this often; None takes stock PyTorch.
        impl: "auto", "triton" or "reference". A copy has no rounding: all give the same bits.
    """
    if offsets is None or not mask.nnz:
        return mask.unpack(values)
    impl, module = _pick_impl("expand", impl, values)
    if impl == "reference" or module is None:
        return mask.unpack(values)
    return _Expand.apply(values, mask.words, offsets, mask.shape[1], module)


def word_offsets(mask: SparseMask) -> Tensor:
    """Return how many entries come before each word of ``mask``, and their number: (words + 1,), int32.

    With them each word is a row of its own, and a program need not count along a long one.
    """
    dense = F.pad(mask.to_dense(), (0, -mask.shape[1] % _WORD))
    counts = dense.view(-1, _WORD).sum(1)
    return F.pad(counts.cumsum(0), (1, 0)).to(mask.offsets.dtype)


class _Expand(torch.autograd.Function):
    """dense (rows, cols) = values at the set bits of words (rows, width); the gradient is packed likewise."""

    @staticmethod
    def forward(ctx, values: Tensor, words: Tensor, offsets: Tensor, cols: int, module: ModuleType) -> Tensor:
        ctx.save_for_backward(words, offsets)
        ctx.module, ctx.count = module, values.shape[0]
        rows, width = words.shape
        dense = module.unpack_values(values.detach(), words.view(-1, 1), offsets, _WORD)
        return dense.view(rows, width * _WORD)[:, :cols].contiguous()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        words, offsets = ctx.saved_tensors
        padded = F.pad(grad, (0, -grad.shape[1] % _WORD)).contiguous()
        out = grad.new_empty(ctx.count)
        ctx.module.pack_sum(padded.view(1, -1, _WORD), words.view(-1, 1), offsets, None, out)
        return out, None, None, None, None

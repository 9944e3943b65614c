"""A layer on a compressed weight: few tokens as it streams by, many from a dense copy made for the call."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ._config import pick_for
from ._matmul import extended_matmul
from .bitmap_codec import pruned_decode
from .lora_backward import lora_backward
from .lora_forward import lora_forward, lora_hidden
from .pruned_few import MOST_TOKENS, overlaps, pruned_few

__all__ = ["PrunedPasses", "plain_matmul", "pruned_backward", "pruned_matmul"]


class PrunedPasses(NamedTuple):
    """The passes that a layer on a compressed weight is made of: Triton's, or those that ``dispatch`` picks.

    ``linear(x, w, bias)`` and ``matmul(dy, w)`` are products with a dense weight and no adapter.
    """

    hidden: Callable[..., Tensor]
    lora_forward: Callable[..., tuple]
    lora_backward: Callable[..., tuple]
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    matmul: Callable[[Tensor, Tensor], Tensor]
    widest_few: int  # bytes of an element up to which few tokens take the compressed weight as it is

    def pruned_matmul(
        self,
        x: Tensor,
        packed: list[Tensor],
        N: int,
        a: Tensor | None,
        b: Tensor | None,
        bias: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor | None]:
        """Return ``y = x wᵀ + h bᵀ + bias``, (M, N), and ``h = scale · x aᵀ``, (M, R), None without a."""
        M, K = x.shape
        if 0 < M <= MOST_TOKENS and K > 0 and N > 0 and x.element_size() <= self.widest_few:
            if a is not None and a.shape[0] > 0 and overlaps(x, packed):
                from .pruned_stream import adapted_stream

                return adapted_stream(x, packed, N, a, b, bias, scale)
            h = None if a is None else self.hidden(x, a, scale, None, 0.0)
            return pruned_few(x, packed, N, h, b, bias), h
        w = pruned_decode(packed, N, K)
        if a is None:
            return self.linear(x, w, bias), None
        return self.lora_forward(x, w, a, b, bias, scale, None, 0.0)[:2]

    def pruned_backward(
        self,
        dy: Tensor,
        x: Tensor | None,
        packed: list[Tensor],
        K: int,
        a: Tensor | None,
        b: Tensor | None,
        h: Tensor | None,
        scale: float,
        need_x: bool,
        need_a: bool,
        need_b: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return ``dx``, (M, K), ``da``, (R, K), and ``db``, (N, R), each None unless needed."""
        w = pruned_decode(packed, dy.shape[1], K) if need_x else None
        if b is None and h is None:
            return self.matmul(dy, w) if need_x else None, None, None
        return self.lora_backward(dy, x, w, a, b, h, None, scale, None, 0.0, need_x, need_a, need_b)


def plain_matmul(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``left right + bias``, rows of ``left`` by columns of ``right``."""
    out = left.new_zeros(left.shape[0], right.shape[1])
    if bias is not None:
        out.copy_(bias)
    config = pick_for("lora_forward", left, left, right.shape[1], left.shape[1], 16)
    return extended_matmul(left, right.T, None, None, None, None, 0, out, config)


_TRITON = PrunedPasses(
    lora_hidden,
    lora_forward,
    lora_backward,
    lambda x, w, bias: plain_matmul(x, w.T, bias),
    plain_matmul,
    8,
)
pruned_matmul = _TRITON.pruned_matmul
pruned_backward = _TRITON.pruned_backward

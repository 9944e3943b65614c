"""A LoRA layer with a masked b: its passes, around a scratch copy of b or, for few tokens, without one."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._config import pick_for
from ._correlate import correlate_parts
from ._masked_matmul import masked_matmul
from ._sum_parts import sum_parts
from .lora_backward import lora_backward_a, lora_backward_hidden, lora_backward_input
from .lora_backward_hidden_b import hidden_b_parts as launch_hidden_b
from .lora_forward import lora_forward, lora_hidden
from .masked_values import pack_sum, unpack_values

__all__ = ["MaskedPasses", "b_parts", "hidden_b_parts", "masked_lora_backward", "masked_lora_forward"]

# tokens up to which y is made of entries: the tiles of more leave no shared memory to expand them in
MOST_EXPANDED = 64


class MaskedPasses(NamedTuple):
    """The passes that the layer is made of; ``dispatch`` has others than the kernels alone.

    The first five as in ``reference``. Of db there are parts, (S, N, R): ``b_parts(dy, h)`` gives them, and
    ``hidden_b_parts(dy, b, h, scale)`` dh and them. ``whole``: as ``masked_hopper.masked_backward``, or None.
    ``expands(x, w, R)``: whether y is made of the entries; where not, of a scratch copy of b.
    """

    lora_hidden: Callable[[Tensor, Tensor, float, Tensor | None, float], Tensor]
    lora_forward: Callable[..., tuple[Tensor, Tensor, Tensor | None]]
    lora_backward_hidden: Callable[[Tensor, Tensor, float], Tensor]
    lora_backward_a: Callable[[Tensor, Tensor, Tensor | None, float], Tensor]
    lora_backward_input: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
    b_parts: Callable[[Tensor, Tensor], Tensor]
    hidden_b_parts: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    expands: Callable[[Tensor, Tensor, int], bool]
    whole: Callable[..., tuple[Tensor, Tensor | None, Tensor | None] | None] | None = None

    def forward(
        self, x: Tensor, w: Tensor, a: Tensor, values: Tensor, words: Tensor, offsets: Tensor,
        bias: Tensor | None, scale: float, seed: Tensor | None, dropout_p: float,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """See ``reference.masked_lora_forward``."""
        if not values.shape[0]:
            return F.linear(x, w, bias), a.new_zeros(x.shape[0], a.shape[0]), None
        if self.expands(x, w, a.shape[0]):
            h = self.lora_hidden(x, a, scale, seed, dropout_p)
            config = pick_for("lora_forward", x, a, *w.shape, a.shape[0])
            return masked_matmul(x, w, h, values, words, offsets, bias, config), h, None
        b = unpack_values(values, words, offsets, a.shape[0])
        return self.lora_forward(x, w, a, b, bias, scale, seed, dropout_p)

    def backward(
        self, dy: Tensor, x: Tensor | None, w: Tensor | None, a: Tensor | None,
        values: Tensor, words: Tensor, offsets: Tensor,
        train_words: Tensor | None, train_offsets: Tensor | None, train_count: int,
        h: Tensor | None, mask: Tensor | None, scale: float, seed: Tensor | None, dropout_p: float,
        need_x: bool, need_a: bool, need_b: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        """See ``reference.masked_lora_backward``."""
        trains = need_b and min(train_count, values.shape[0], dy.shape[0]) > 0
        dvalues = torch.zeros_like(values) if need_b and not trains else None
        if not values.shape[0]:
            return dy @ w if need_x else None, torch.zeros_like(a) if need_a else None, dvalues
        b = unpack_values(values, words, offsets, a.shape[0]) if need_x or need_a else None
        dx = da = parts = done = None
        if need_x and self.whole is not None:
            places = (words, offsets) if train_words is None else (train_words, train_offsets)
            entries = (*places, train_count) if trains else None
            done = self.whole(dy, x, w, a, b, h, mask, entries, scale, seed, dropout_p, need_a)
        if done is not None:
            dx, da, packed = done
            if packed is not None and train_words is None:
                return dx, da, packed
            if packed is not None:
                parts = unpack_values(packed, train_words, train_offsets, h.shape[1])[None]
            elif trains:
                parts = self.b_parts(dy, h)
        else:
            dx, da, parts = self._passes(dy, x, w, a, b, h, scale, seed, dropout_p, need_x, need_a, trains)
        if parts is not None:
            dvalues = pack_sum(parts, words, offsets, train_words, torch.empty_like(values))
        return dx, da, dvalues

    def _passes(
        self, dy: Tensor, x: Tensor | None, w: Tensor | None, a: Tensor | None, b: Tensor | None,
        h: Tensor | None, scale: float, seed: Tensor | None, dropout_p: float,
        need_x: bool, need_a: bool, trains: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        """Return dx, da, and the parts of db, each None unless needed."""
        dx = da = dh = parts = None
        if trains and b is not None:
            dh, parts = self.hidden_b_parts(dy, b, h, scale)
        elif trains:
            parts = self.b_parts(dy, h)
        elif b is not None:
            dh = self.lora_backward_hidden(dy, b, scale)
        if need_x:
            dx = self.lora_backward_input(dy, w, dh, a, seed, dropout_p)
        if need_a:
            da = self.lora_backward_a(dh, x, seed, dropout_p)
        return dx, da, parts


def b_parts(dy: Tensor, h: Tensor) -> Tensor:
    """Return parts of ``dyᵀ h``, (S, N, R), of which it is the sum."""
    return correlate_parts(dy, h, pick_for("lora_backward_a", dy, h, 0, dy.shape[1], h.shape[1]))


def hidden_b_parts(dy: Tensor, b: Tensor, h: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return ``dh = scale · dy b``, (M, R), and parts of ``dyᵀ h``, (S, N, R); dy is not empty."""
    config = pick_for("lora_backward_hidden_b", dy, b, dy.shape[1], 0, b.shape[1])
    dh_parts, db_parts = launch_hidden_b(dy, b, h, scale, config)
    dh = b.new_empty(dy.shape[0], b.shape[1])
    sum_parts((dh_parts, dh))
    return dh, db_parts


_PASSES = MaskedPasses(
    lora_hidden,
    lora_forward,
    lora_backward_hidden,
    lora_backward_a,
    lora_backward_input,
    b_parts,
    hidden_b_parts,
    expands=lambda x, w, R: x.shape[0] <= MOST_EXPANDED,
)
masked_lora_forward, masked_lora_backward = _PASSES.forward, _PASSES.backward

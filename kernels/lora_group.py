"""Several projections of one x: one pass over x for all h, one for all da, and dx as one chain of GEMMs."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._config import pick_for
from ._matmul import extended_matmul
from .lora_backward import lora_backward_a, lora_backward_b, lora_backward_hidden, lora_backward_input
from .lora_backward_hidden_b import lora_backward_hidden_b
from .lora_forward import lora_hidden


class Passes(NamedTuple):
    """The launchers that a group is made of, each called as its namesake in this package is; and two more:

    output      (x, w, h, b, bias) -> y = x wᵀ + h bᵀ + bias
    add_input   (dx, dy, w) -> dx, to which dy w was added in place

    and where there are such, those that serve all projections at once, or give None:
    outputs     (x, ws, h, b_list, biases) -> every y
    inputs      (dys, ws, dh, a, ranks, seed, dropout_p) -> dx = sum of dy w + drop(dh a), dh and a of all
    beside      as torch.cat
    """

    lora_hidden: Callable[..., Tensor]
    output: Callable[..., Tensor]
    lora_backward_hidden: Callable[..., Tensor]
    lora_backward_b: Callable[..., Tensor]
    lora_backward_hidden_b: Callable[..., tuple[Tensor, Tensor]]
    lora_backward_a: Callable[..., Tensor]
    lora_backward_input: Callable[..., Tensor]
    add_input: Callable[..., Tensor]
    outputs: Callable[..., list[Tensor] | None] | None = None
    inputs: Callable[..., Tensor | None] | None = None
    beside: Callable[..., Tensor] = torch.cat

    def forward(
        self,
        x: Tensor,
        ws: list[Tensor],
        a_list: list[Tensor],
        b_list: list[Tensor],
        biases: list[Tensor | None],
        scales: list[float],
        seed: Tensor | None,
        dropout_p: float,
    ) -> tuple[list[Tensor], Tensor, None]:
        """Return every ``y = x wᵀ + h bᵀ + bias``, (M, N), all ``h``, (M, sum of R), and no mask."""
        same = all(scale == scales[0] for scale in scales)
        h = self.lora_hidden(x, self._joined(a_list, 0), scales[0] if same else 1.0, seed, dropout_p)
        hs = h.split([a.shape[0] for a in a_list], 1)
        if not same:
            for own, scale in zip(hs, scales, strict=True):
                own.mul_(scale)
        ys = None if self.outputs is None else self.outputs(x, ws, h, b_list, biases)
        if ys is not None:
            return ys, h, None
        each = zip(ws, hs, b_list, biases, strict=True)
        return [self.output(x, w, own, b, bias) for w, own, b, bias in each], h, None

    def backward(
        self,
        dys: list[Tensor | None],
        x: Tensor | None,
        ws: list[Tensor],
        a_list: list[Tensor],
        b_list: list[Tensor],
        h: Tensor | None,
        mask: Tensor | None,
        scales: list[float],
        seed: Tensor | None,
        dropout_p: float,
        need_x: bool,
        need_a: list[bool],
        need_b: list[bool],
    ) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
        """Return ``dx = sum of dy w + drop(sum of dh a)``, (M, K), and ``da`` and ``db``, None if not needed.

        The first GEMM of the chain takes the update of all projections, under one mask; later ones add to dx.
        """
        # of h and dh, in which b may have fewer
        ranks = [t.shape[0] for t in a_list] or [b.shape[1] for b in b_list]
        hs = [None] * len(dys) if h is None else h.split(ranks, 1)
        need_dh = [dy is not None and (need_x or need) for dy, need in zip(dys, need_a, strict=True)]
        each = zip(dys, b_list, hs, scales, need_dh, need_b, strict=True)
        dhs, dbs = zip(*[self._hidden_and_b(*arguments) for arguments in each], strict=True)
        dx, das = None, [None] * len(dys)
        if need_x:
            used = [i for i, need in enumerate(need_dh) if need]
            dh, a = self._joined([dhs[i] for i in used], 1), self._joined([a_list[i] for i in used], 0)
            own = [dys[i] for i in used], [ws[i] for i in used]
            dx = self._input(*own, dh, a, [ranks[i] for i in used], seed, dropout_p)
        if any(need_a):
            if not need_x or need_a != need_dh:
                dh = self._joined([dh for dh, need in zip(dhs, need_a, strict=True) if need], 1)
            da = self.lora_backward_a(dh, x, seed, dropout_p)
            parts = iter(da.split([rank for rank, need in zip(ranks, need_a, strict=True) if need]))
            das = [next(parts) if need else None for need in need_a]
        return dx, das, list(dbs)

    def _joined(self, tensors: list[Tensor], dim: int) -> Tensor:
        return tensors[0] if len(tensors) == 1 else self.beside(tensors, dim)

    def _input(
        self,
        dys: list[Tensor],
        ws: list[Tensor],
        dh: Tensor,
        a: Tensor,
        ranks: list[int],
        seed: Tensor | None,
        dropout_p: float,
    ) -> Tensor:
        dx = None if self.inputs is None else self.inputs(dys, ws, dh, a, ranks, seed, dropout_p)
        if dx is None:
            dx = self.lora_backward_input(dys[0], ws[0], dh, a, seed, dropout_p)
            for dy, w in zip(dys[1:], ws[1:], strict=True):
                dx = self.add_input(dx, dy, w)
        return dx

    def _hidden_and_b(
        self,
        dy: Tensor | None,
        b: Tensor,
        h: Tensor | None,
        scale: float,
        need_dh: bool,
        need_db: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        if need_dh and need_db:
            return self.lora_backward_hidden_b(dy, b, h, scale)
        dh = self.lora_backward_hidden(dy, b, scale) if need_dh else None
        return dh, self.lora_backward_b(dy, h) if need_db else None


def _output(x: Tensor, w: Tensor, h: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    config = pick_for("lora_forward", x, b, w.shape[0], x.shape[1], b.shape[1])
    return extended_matmul(x, w, h, b, bias, None, 0, x.new_empty(x.shape[0], w.shape[0]), config)


def _add_input(dx: Tensor, dy: Tensor, w: Tensor) -> Tensor:
    config = pick_for("lora_backward_input", dy, w, *w.shape, 1)
    return extended_matmul(dy, w.T, None, None, None, None, 0, dx, config)


_TRITON = Passes(
    lora_hidden,
    _output,
    lora_backward_hidden,
    lora_backward_b,
    lora_backward_hidden_b,
    lora_backward_a,
    lora_backward_input,
    _add_input,
)

lora_group_forward, lora_group_backward = _TRITON.forward, _TRITON.backward

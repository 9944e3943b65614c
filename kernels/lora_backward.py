"""The backward pass: one launcher a gradient, and all together; dh with db is in lora_backward_hidden_b."""

from torch import Tensor

from ._config import TileConfig, pick_for
from ._correlate import correlate
from ._matmul import extended_matmul
from ._project import project
from .lora_backward_hidden_b import lora_backward_hidden_b
from .lora_forward import drop_threshold


def lora_backward_hidden(dy: Tensor, b: Tensor, scale: float, *, config: TileConfig | None = None) -> Tensor:
    """Return ``dh = scale · dy b``, (M, R), dtype of ``b``."""
    N, R = b.shape
    config = config or pick_for("lora_hidden", dy, b, 0, N, R)
    return project(dy, b.T, scale, None, 0, config)


def lora_backward_b(
    dy: Tensor, h: Tensor, *, config: TileConfig | None = None, rank: int | None = None
) -> Tensor:
    """Return ``db = dyᵀ h``, (N, R), dtype of ``h``; of the first ``rank`` columns of h if given."""
    N, R = dy.shape[1], h.shape[1]
    config = config or pick_for("lora_backward_a", dy, h, 0, N, R)
    return correlate(dy, h, None, 0, h.new_empty(N, rank or R), config)


def lora_backward_a(
    dh: Tensor,
    x: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    *,
    config: TileConfig | None = None,
    rank: int | None = None,
) -> Tensor:
    """Return ``da = dhᵀ drop(x)``, (R, K), dtype of ``dh``; of the first ``rank`` columns of dh if given."""
    K, R = x.shape[1], dh.shape[1]
    config = config or pick_for("lora_backward_a", x, dh, 0, K, R, seed)
    da = dh.new_empty(rank or R, K)
    correlate(x, dh, seed, drop_threshold(dropout_p, seed), da.T, config)
    return da


def lora_backward_input(
    dy: Tensor,
    w: Tensor,
    dh: Tensor,
    a: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    *,
    config: TileConfig | None = None,
) -> Tensor:
    """Return ``dx = dy w + drop(dh a)``, (M, K), dtype of ``dy``, with the mask of the forward pass."""
    (M, N), (R, K) = dy.shape, a.shape
    config = config or pick_for("lora_backward_input", dy, a, N, K, R, seed)
    threshold = drop_threshold(dropout_p, seed)
    return extended_matmul(dy, w.T, dh, a.T, None, seed, threshold, dy.new_empty(M, K), config)


def lora_backward(
    dy: Tensor,
    x: Tensor | None,
    w: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    h: Tensor | None,
    mask: Tensor | None,
    scale: float,
    seed: Tensor | None,
    dropout_p: float,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return ``dx``, (M, K), ``da``, (R, K), and ``db``, (N, R), each None unless needed.

    The mask of dropout is made anew from the seed: ``mask`` is not read.
    """
    dx = da = db = dh = None
    if need_b and (need_x or need_a):
        dh, db = lora_backward_hidden_b(dy, b, h, scale)
    elif need_b:
        db = lora_backward_b(dy, h)
    elif need_x or need_a:
        dh = lora_backward_hidden(dy, b, scale)
    if need_x:
        dx = lora_backward_input(dy, w, dh, a, seed, dropout_p)
    if need_a:
        da = lora_backward_a(dh, x, seed, dropout_p)
    return dx, da, db

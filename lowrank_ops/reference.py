"""The definitions in stock PyTorch: what every kernel computes, under the kernel's own name.

Written to be read: no fusion, dtype of the inputs throughout, 2-D tensors. In float64 these are the
truth that errors are measured from; on a CPU they are what runs. Letters: x (M, K), w (N, K), a (R, K),
b (N, R), h (M, R), y (M, N); a gradient is ``d`` + name. Adapters (a, b, h, dh) may be float32 beside
16-bit x, w and dy: then their products are taken in float32, as PEFT takes them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "dropout_keep",
    "keep_threshold",
    "lora_backward",
    "lora_backward_a",
    "lora_backward_b",
    "lora_backward_hidden",
    "lora_backward_hidden_b",
    "lora_backward_input",
    "lora_forward",
    "lora_group_backward",
    "lora_group_forward",
    "lora_hidden",
    "nearest_neighbors",
    "philox",
]

_LOW = 0xFFFFFFFF


def philox(seed: Tensor, c0: Tensor, c1: Tensor, rounds: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four 32-bit words of Philox-4x32 at counter (c0, c1, 0, 0), as int64.

    Args:
        seed: (1,), int64; its low and high halves are the key.
        c0, c1: int64 tensors in [0, 2³²) of shapes that broadcast.
        rounds: 7 passes BigCrush; 10 is the paper's default.

    Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3, section 3.3.
    """
    c0, c1 = torch.broadcast_tensors(c0, c1)
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(rounds):
        # products wrap modulo 2**64, which leaves both halves of an unsigned product intact
        left, right = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((right >> 32) & _LOW) ^ c1 ^ k0, right & _LOW
        c2, c3 = ((left >> 32) & _LOW) ^ c3 ^ k1, left & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def keep_threshold(dropout_p: float) -> int:
    """Return T in [0, 65535]: an element is dropped where its 16 random bits are below T.

    The probability is thus exact to 2⁻¹⁶, and survivors are scaled by 65536 / (65536 - T), which makes
    the expectation exact.
    """
    return min(round(dropout_p * 65536), 65535)


def dropout_keep(seed: Tensor, M: int, K: int, dropout_p: float) -> Tensor:
    """Return the dropout mask, (M, K) bool, True where an element is kept.

    The mask depends on the seed and on the element alone. One Philox call gives eight half-words to the
    eight elements of a row that one thread of a tensor-core tile holds: columns {2t, 2t + 1} + 8 j, j < 4,
    of a block of 32. So element (m, k) takes half-word 2 (k % 32 // 8) + k % 2, low half of a word first,
    of the call at counter (4 (k // 32) + k % 8 // 2, m).
    """
    groups = torch.arange((K + 31) // 32 * 4, device=seed.device)
    words = torch.stack(philox(seed, groups[None, :], torch.arange(M, device=seed.device)[:, None]), -1)
    halves = torch.stack([words & 0xFFFF, words >> 16], -1)  # (M, K / 8, 4, 2)
    halves = halves.unflatten(1, (-1, 4)).transpose(2, 3).flatten(1)  # (M, K / 32, j, t, 2)
    return halves[:, :K] >= keep_threshold(dropout_p)


def _drop(t: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    if seed is None:
        return t
    keep = dropout_keep(seed, *t.shape, dropout_p)
    return torch.where(keep, t, 0) * (65536 / (65536 - keep_threshold(dropout_p)))


def lora_hidden(x: Tensor, a: Tensor, scale: float, seed: Tensor | None, dropout_p: float) -> Tensor:
    """Return ``h = scale · drop(x) aᵀ``, (M, R), dtype of ``a``. No seed, no dropout."""
    return scale * (_drop(x.to(a.dtype), seed, dropout_p) @ a.T)


def lora_forward(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scale: float,
    seed: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return ``y = x wᵀ + h bᵀ + bias``, (M, N), dtype of ``x``, and ``h = scale · drop(x) aᵀ``, (M, R).

    The third value is what an implementation keeps of its dropout mask for :func:`lora_backward`; None here.
    Source: Hu et al. 2021, LoRA, eq. 3 (arXiv:2106.09685).
    """
    h = lora_hidden(x, a, scale, seed, dropout_p)
    return (F.linear(x, w, bias) + h @ b.T).to(x.dtype), h, None


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

    ``h`` and ``mask`` are what :func:`lora_forward` returned. dx needs w, a and b; da needs x and b; db
    needs h: what is not needed may be None.
    """
    dh = lora_backward_hidden(dy, b, scale) if need_x or need_a else None
    dx = lora_backward_input(dy, w, dh, a, seed, dropout_p) if need_x else None
    da = lora_backward_a(dh, x, seed, dropout_p) if need_a else None
    return dx, da, lora_backward_b(dy, h) if need_b else None


def lora_backward_hidden(dy: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return ``dh = scale · dy b``, (M, R), dtype of ``b``: the gradient of ``drop(x) aᵀ``."""
    return scale * (dy.to(b.dtype) @ b)


def lora_backward_b(dy: Tensor, h: Tensor) -> Tensor:
    """Return ``db = dyᵀ h``, (N, R), dtype of ``h``, which already holds the scale."""
    return dy.to(h.dtype).T @ h


def lora_backward_hidden_b(dy: Tensor, b: Tensor, h: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return ``(dh, db)`` as :func:`lora_backward_hidden` and :func:`lora_backward_b` do."""
    return lora_backward_hidden(dy, b, scale), lora_backward_b(dy, h)


def lora_backward_a(dh: Tensor, x: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    """Return ``da = dhᵀ drop(x)``, (R, K), dtype of ``dh``."""
    return dh.T @ _drop(x.to(dh.dtype), seed, dropout_p)


def lora_backward_input(
    dy: Tensor, w: Tensor, dh: Tensor, a: Tensor, seed: Tensor | None, dropout_p: float
) -> Tensor:
    """Return ``dx = dy w + drop(dh a)``, (M, K), dtype of ``dy``, with the mask of the forward pass."""
    return dy @ w + _drop(dh @ a, seed, dropout_p).to(dy.dtype)


def nearest_neighbors(points: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distances from each of ``points``, (M, K), to its nearest and second nearest other, (M,).

    By differences, so that near-duplicates lose nothing; float32, or float64 for float64 points. M ≥ 3.
    Memory: a copy of the points, and blocks of 2²⁴ distances.
    """
    points, M = points.to(torch.promote_types(points.dtype, torch.float32)), points.shape[0]
    # coordinates near 1, by a power of two: else squares of very large or small ones leave float32
    _, exponent = torch.frexp(points.abs().max())
    exponent = exponent.clamp(-126, 126)
    points = torch.ldexp(points, -exponent)
    nearest = []
    for rows in torch.arange(M, device=points.device).split(max(1, 2**24 // M)):
        block = torch.cdist(points[rows], points, compute_mode="donot_use_mm_for_euclid_dist")
        block[torch.arange(rows.numel(), device=rows.device), rows] = torch.inf
        nearest.append(block.topk(2, dim=1, largest=False).values)
    first, second = torch.ldexp(torch.cat(nearest), exponent).unbind(1)
    return first, second


def lora_group_forward(
    x: Tensor,
    ws: list[Tensor],
    a_list: list[Tensor],
    b_list: list[Tensor],
    biases: list[Tensor | None],
    scales: list[float],
    seed: Tensor | None,
    dropout_p: float,
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Return ``y = x wᵀ + h bᵀ + bias``, (M, N), of several projections of one x, and every h side by side.

    A list holds one entry a projection. All see x under one dropout mask; h is (M, sum of R), dtype of a. The
    third value is what an implementation keeps of its mask for :func:`lora_group_backward`; None here.
    """
    dropped = _drop(x.to(a_list[0].dtype), seed, dropout_p)
    hs = [scale * (dropped @ a.T) for a, scale in zip(a_list, scales, strict=True)]
    each = zip(hs, ws, b_list, biases, strict=True)
    ys = [(F.linear(x, w, bias) + h @ b.T).to(x.dtype) for h, w, b, bias in each]
    return ys, torch.cat(hs, 1), None


def lora_group_backward(
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
    """Return ``dx = sum of dy w + drop(sum of dh a)``, (M, K), all ``da`` and all ``db``; None if not needed.

    A dy may be None, for a y that nobody used: its da and db must not be needed then. ``h`` and ``mask`` are
    what :func:`lora_group_forward` returned. dx needs ws and a_list, any da x, any db h: what is not needed
    may be None, or an empty list. Tensors of one list may share their memory's owner, but no memory.
    """
    used = [dy is not None and (need_x or need) for dy, need in zip(dys, need_a, strict=True)]
    each = zip(dys, b_list, scales, used, strict=True)
    dhs = [lora_backward_hidden(dy, b, scale) if use else None for dy, b, scale, use in each]
    dx, das, dbs = None, [None] * len(dys), [None] * len(dys)
    if need_x:
        first, *rest = (dy @ w for dy, w in zip(dys, ws, strict=True) if dy is not None)
        dh, a = zip(*[pair for pair in zip(dhs, a_list, strict=True) if pair[0] is not None], strict=True)
        update = _drop(torch.cat(dh, 1) @ torch.cat(a), seed, dropout_p).to(first.dtype)
        dx = sum(rest, first) + update
    if any(need_a):
        dropped = _drop(x.to(b_list[0].dtype), seed, dropout_p)
        das = [dh.T @ dropped if need else None for dh, need in zip(dhs, need_a, strict=True)]
    if any(need_b):
        hs = h.split([b.shape[1] for b in b_list], 1)
        dbs = [lora_backward_b(*pair) if need else None for *pair, need in zip(dys, hs, need_b, strict=True)]
    return dx, das, dbs

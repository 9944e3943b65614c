"""One frozen linear with a DenseLoRA adapter, as in Llama-3-8B, and a LoRA adapter on the same linear."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_ops import dense, functional

from ..case import Case, Cell, Layer, Provider, Work
from .lora_linear import SCALE

__all__ = ["CASE"]

# (N, K); projections of the same shape are timed once and named together
SHAPES = {"q": (4096, 4096), "up": (14336, 4096), "down": (4096, 14336), "k_v": (1024, 4096)}


def make_inputs(cell: Cell, generator: torch.Generator) -> dict[str, Tensor]:
    """Return x, w, e, c, d (encoder, core, decoder), dy: normal, update and base of one order, d not zero."""

    def normal(*shape: int, std: float, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=cell.device, dtype=dtype).mul_(std)

    M, N, K, R = cell.M, cell.N, cell.K, cell.R
    tensors = {
        "x": normal(M, K, std=1.0, dtype=cell.dtype),
        "w": normal(N, K, std=K**-0.5, dtype=cell.dtype),
        "e": normal(R, K, std=K**-0.5, dtype=cell.adapter_dtype),
        "c": normal(R, R, std=R**-0.5, dtype=cell.adapter_dtype),
        "d": normal(N, R, std=R**-0.5, dtype=cell.adapter_dtype),
        "dy": normal(M, N, std=1.0, dtype=cell.dtype),
    }
    for name in CASE.leaves:
        tensors[name].requires_grad_(not cell.forward_only)
    return tensors


def unfused(x: Tensor, w: Tensor, e: Tensor, c: Tensor, d: Tensor, dropout_p: float) -> Tensor:
    """The layer as one writes it. float32 adapters compute in float32, as in PEFT without autocast."""

    def drop(t: Tensor) -> Tensor:
        return F.dropout(t, dropout_p) if dropout_p else t

    h = drop(F.gelu(F.linear(drop(x.to(e.dtype)), e)))
    update = drop(F.gelu(F.linear(F.linear(h, c), d)))
    return (F.linear(x, w) + SCALE * update).to(x.dtype)


def expected(cell: Cell, t: dict[str, Tensor]) -> Tensor:
    """The definition, in the dtype of x throughout; with dropout, under the masks of lowrank_ops."""
    x, w = t["x"], t["w"]
    factors = [t[name].to(x.dtype) for name in "ecd"]
    if cell.dropout_p:
        return dense.dense_lora_linear(
            x, w, *factors, scale=SCALE, dropout_p=cell.dropout_p, impl="reference"
        )
    return unfused(x, w, *factors, 0.0)


def work(cell: Cell) -> dict[str, Work]:
    """Every large tensor crosses memory once in each pass; backward also reads x, for the encoder."""
    M, N, K, R = cell.M, cell.N, cell.K, cell.R
    size, adapter = cell.dtype.itemsize, cell.adapter_dtype.itemsize * R * (N + K + R)
    base, update = 2 * M * N * K, 2 * M * R * (N + K + R)
    return {
        "fwd": Work(bytes=size * (M * K + N * K + M * N) + adapter, flops=base + update),
        # z once more
        "bwd": Work(
            bytes=size * (M * N + N * K + 2 * M * K) + 2 * adapter, flops=base + 2 * update + 2 * M * N * R
        ),
    }


def _trained(t: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t[name] for name in CASE.leaves}


def _frozen(cell: Cell, t: dict[str, Tensor]) -> Layer:
    return Layer(lambda: F.linear(t["x"], t["w"]), {"x": t["x"]})


def _written_out(t: dict[str, Tensor]) -> list[Tensor]:
    return [t[name] for name in "xwecd"]


def _unfused(cell: Cell, t: dict[str, Tensor]) -> Layer:
    return Layer(lambda: unfused(*_written_out(t), cell.dropout_p), _trained(t))


def _compiled(cell: Cell, t: dict[str, Tensor]) -> Layer:
    layer = torch.compile(unfused, dynamic=False)
    return Layer(lambda: layer(*_written_out(t), cell.dropout_p), _trained(t))


def _lora(cell: Cell, t: dict[str, Tensor]) -> Layer:
    """Plain LoRA on the same base."""
    e, d = (t[name].detach().requires_grad_(not cell.forward_only) for name in "ed")

    def forward() -> Tensor:
        return functional.lora_linear(t["x"], t["w"], e, d, scale=SCALE, dropout_p=cell.dropout_p)

    return Layer(forward, {"x": t["x"]} if cell.forward_only else {"x": t["x"], "e": e, "d": d})


def _ours(cell: Cell, t: dict[str, Tensor], impl: str) -> Layer:
    def forward() -> Tensor:
        return dense.dense_lora_linear(*_written_out(t), scale=SCALE, dropout_p=cell.dropout_p, impl=impl)

    return Layer(forward, _trained(t))


def _on_gpu(cell: Cell) -> bool:
    return cell.device == "cuda"


def _headline(cell: Cell) -> bool:
    # compiling takes longer than timing all the others: only where the comparison is made
    return _on_gpu(cell) and cell.R == 16 and cell.M == 8192


CASE = Case(
    name="dense_lora_linear",
    floor="frozen",
    shapes=SHAPES,
    quick_shapes={"even": (96, 64), "ragged": (50, 33)},
    leaves=("x", "e", "c", "d"),
    providers=(
        Provider("frozen", _frozen),
        Provider("unfused", _unfused),
        # deterministic mode, which poisons, would make it compile a second time
        Provider("compiled", _compiled, poison=False, by_default=_headline),
        Provider("lora", _lora, judged=False),
        Provider("ours", lambda cell, t: _ours(cell, t, "auto"), same_mask=True),
        Provider("ours_triton", lambda cell, t: _ours(cell, t, "triton"), same_mask=True, by_default=_on_gpu),
    ),
    make_inputs=make_inputs,
    expected=expected,
    work=work,
)

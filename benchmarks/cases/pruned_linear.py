"""A frozen linear of which half is pruned, with an adapter: read compressed, against the dense one.

The weight is pruned 2:4, so that both structures of BitmapWeight hold the same matrix; its size as a bitmap
does not depend on where the zeros are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_ops import BitmapWeight, functional, pruned

from ..case import Case, Cell, Layer, Provider, Work
from .lora_linear import SCALE, SHAPES

__all__ = ["CASE"]


def make_inputs(cell: Cell, generator: torch.Generator) -> dict[str, Tensor]:
    """Return x, w with half of every four columns zero, a, b, dy: normal, base and update of one order."""
    if cell.dropout_p:
        raise ValueError(f"pruned_linear: dropout must be 0, got {cell.dropout_p}")

    def normal(*shape: int, std: float, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=cell.device, dtype=dtype).mul_(std)

    M, N, K, R = cell.M, cell.N, cell.K, cell.R
    w = normal(N, -(-K // 4) * 4, std=K**-0.5, dtype=cell.dtype)
    groups = w.view(N, w.shape[1] // 4, 4)
    smallest = groups.abs().topk(2, dim=-1, largest=False).indices
    groups.scatter_(-1, smallest, 0)
    tensors = {
        "x": normal(M, K, std=1.0, dtype=cell.dtype),
        "w": w[:, :K].contiguous(),
        "a": normal(R, K, std=K**-0.5, dtype=cell.adapter_dtype),
        "b": normal(N, R, std=0.5 * R**-0.5, dtype=cell.adapter_dtype),
        "dy": normal(M, N, std=1.0, dtype=cell.dtype),
    }
    for name in CASE.leaves:
        tensors[name].requires_grad_(not cell.forward_only)
    return tensors


def expected(cell: Cell, t: dict[str, Tensor]) -> Tensor:
    """The definition, computing in the dtype of x throughout."""
    a, b = t["a"].to(t["x"].dtype), t["b"].to(t["x"].dtype)
    return F.linear(t["x"], t["w"]) + SCALE * F.linear(F.linear(t["x"], a), b)


def work(cell: Cell) -> dict[str, Work]:
    """The compressed weight, 9 of 16 bits, crosses memory once a pass; backward also reads x, for da."""
    M, N, K, R = cell.M, cell.N, cell.K, cell.R
    size, adapter = cell.dtype.itemsize, cell.adapter_dtype.itemsize * R * (N + K)
    packed = N * K * (size / 2 + 1 / 8)
    base, update = 2 * M * N * K, 2 * M * R * (N + K)
    return {
        "fwd": Work(bytes=size * (M * K + M * N) + packed + adapter, flops=base + update),
        "bwd": Work(bytes=size * (M * N + 2 * M * K) + packed + 2 * adapter, flops=base + 2 * update),
    }


def _frozen(cell: Cell, t: dict[str, Tensor]) -> Layer:
    return Layer(lambda: F.linear(t["x"], t["w"]), {"x": t["x"]})


def _unfused(cell: Cell, t: dict[str, Tensor]) -> Layer:
    return Layer(lambda: expected(cell, t), {name: t[name] for name in CASE.leaves})


def _dense(cell: Cell, t: dict[str, Tensor]) -> Layer:
    call = lambda: functional.lora_linear(t["x"], t["w"], t["a"], t["b"], scale=SCALE)  # noqa: E731
    return Layer(call, {name: t[name] for name in CASE.leaves})


def _ours(cell: Cell, t: dict[str, Tensor], structure: str, impl: str = "auto") -> Layer:
    w = BitmapWeight.from_dense(t["w"], structure)
    call = lambda: pruned.pruned_linear(t["x"], w, t["a"], t["b"], scale=SCALE, impl=impl)  # noqa: E731
    return Layer(call, {name: t[name] for name in CASE.leaves})


def _accelerated(cell: Cell, t: dict[str, Tensor]) -> Layer:
    w = BitmapWeight.from_dense(t["w"], "2:4").accelerate(cell.M)
    call = lambda: pruned.pruned_linear(t["x"], w, t["a"], t["b"], scale=SCALE)  # noqa: E731
    return Layer(call, {name: t[name] for name in CASE.leaves})


def _bare(cell: Cell, t: dict[str, Tensor], structure: str) -> Layer:
    w = BitmapWeight.from_dense(t["w"], structure)
    return Layer(lambda: pruned.pruned_linear(t["x"], w), {"x": t["x"]})


def _on_gpu(cell: Cell) -> bool:
    return cell.device == "cuda"


def _on_sparse_cores(cell: Cell) -> bool:
    # fewer tokens read the compressed weight, accelerated or not
    return _on_gpu(cell) and cell.M >= 2048 and torch.backends.cusparselt.is_available()


CASE = Case(
    name="pruned_linear",
    floor="frozen",
    shapes=SHAPES,
    quick_shapes={"even": (96, 64), "ragged": (50, 33)},
    leaves=("x", "a", "b"),
    providers=(
        Provider("frozen", _frozen),
        Provider("unfused", _unfused),
        Provider("dense", _dense),
        Provider("bitmap", lambda cell, t: _ours(cell, t, "unstructured")),
        Provider(
            "bitmap_triton", lambda cell, t: _ours(cell, t, "unstructured", "triton"), by_default=_on_gpu
        ),
        Provider("two_four", lambda cell, t: _ours(cell, t, "2:4")),
        Provider("two_four_accelerated", _accelerated, by_default=_on_sparse_cores),
        # no adapter: what the compressed weight itself saves
        Provider("bitmap_bare", lambda cell, t: _bare(cell, t, "unstructured"), judged=False),
        Provider("two_four_bare", lambda cell, t: _bare(cell, t, "2:4"), judged=False),
    ),
    make_inputs=make_inputs,
    expected=expected,
    work=work,
    tokens=(1, 4, 16, 64, 2048, 8192),
    dropouts=(0.0,),
)

"""One frozen linear with a LoRA adapter: all seven linears of Llama-3-8B, against those who also do it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowrank_ops import functional

from ..case import Case, Cell, Layer, Provider, Work

__all__ = ["CASE"]

SCALE = 2.0  # lora_alpha = 2 r

# (N, K); projections of the same shape are timed once and named together
SHAPES = {"q_o": (4096, 4096), "gate_up": (14336, 4096), "down": (4096, 14336), "k_v": (1024, 4096)}


def make_inputs(cell: Cell, generator: torch.Generator) -> dict[str, Tensor]:
    """Return x, w, a, b, dy: normal, sized so that base and update are of one order and b is not zero."""

    def normal(*shape: int, std: float, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=cell.device, dtype=dtype).mul_(std)

    M, N, K, R = cell.M, cell.N, cell.K, cell.R
    tensors = {
        "x": normal(M, K, std=1.0, dtype=cell.dtype),
        "w": normal(N, K, std=K**-0.5, dtype=cell.dtype),
        "a": normal(R, K, std=K**-0.5, dtype=cell.adapter_dtype),
        "b": normal(N, R, std=0.5 * R**-0.5, dtype=cell.adapter_dtype),
        "dy": normal(M, N, std=1.0, dtype=cell.dtype),
    }
    for name in CASE.leaves:
        tensors[name].requires_grad_(not cell.forward_only)
    return tensors


def unfused(x: Tensor, w: Tensor, a: Tensor, b: Tensor, dropout_p: float) -> Tensor:
    """The layer as one writes it. float32 adapters compute in float32, as in PEFT without autocast."""
    dropped = F.dropout(x, dropout_p) if dropout_p else x
    update = F.linear(F.linear(dropped.to(a.dtype), a), b)
    return (F.linear(x, w) + SCALE * update).to(x.dtype)


def expected(cell: Cell, t: dict[str, Tensor]) -> Tensor:
    """The definition, computing in the dtype of x throughout; with dropout, under the mask of lowrank_ops."""
    a, b = t["a"].to(t["x"].dtype), t["b"].to(t["x"].dtype)
    if cell.dropout_p:
        return functional.lora_linear(
            t["x"], t["w"], a, b, scale=SCALE, dropout_p=cell.dropout_p, impl="reference"
        )
    return unfused(t["x"], t["w"], a, b, 0.0)


def work(cell: Cell) -> dict[str, Work]:
    """Every large tensor crosses memory once in each pass; backward also reads x, for da."""
    M, N, K, R = cell.M, cell.N, cell.K, cell.R
    size, adapter = cell.dtype.itemsize, cell.adapter_dtype.itemsize * R * (N + K)
    base, update = 2 * M * N * K, 2 * M * R * (N + K)
    return {
        "fwd": Work(bytes=size * (M * K + N * K + M * N) + adapter, flops=base + update),
        "bwd": Work(bytes=size * (M * N + N * K + 2 * M * K) + 2 * adapter, flops=base + 2 * update),
    }


class AddmmLoRAFunction(torch.autograd.Function):
    """y = x wᵀ + s·h bᵀ, h = z aᵀ, every product by cuBLAS and every sum inside its product.

    z is x, or x after dropout (then x and z are separate inputs, and autograd adds their gradients). The
    scheme of hand-written LoRA layers in fine-tuning frameworks; nothing is taken from their code.
    dh = dy b    da = s·dhᵀ z    db = s·dyᵀ h    dx = dy w (+ s·dh a in place)
    """

    @staticmethod
    def forward(ctx, x: Tensor, z: Tensor | None, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        h = (x if z is None else z) @ a.T
        y = F.linear(x, w)
        y.addmm_(h, b.T, alpha=SCALE)
        ctx.dropped = z is not None
        ctx.save_for_backward(x if z is None else z, w, a, b, h)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        z, w, a, b, h = ctx.saved_tensors
        dh = dy @ b
        da = torch.empty_like(a).addmm_(dh.T, z, alpha=SCALE, beta=0)
        db = torch.empty_like(b).addmm_(dy.T, h, alpha=SCALE, beta=0)
        dx = dy @ w
        if ctx.dropped:
            return dx, torch.empty_like(z).addmm_(dh, a, alpha=SCALE, beta=0), None, da, db
        return dx.addmm_(dh, a, alpha=SCALE), None, None, da, db


def _trained(t: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t[name] for name in CASE.leaves}


def _frozen(cell: Cell, t: dict[str, Tensor]) -> Layer:
    return Layer(lambda: F.linear(t["x"], t["w"]), {"x": t["x"]})


def _unfused(cell: Cell, t: dict[str, Tensor]) -> Layer:
    return Layer(lambda: unfused(t["x"], t["w"], t["a"], t["b"], cell.dropout_p), _trained(t))


def _compiled(cell: Cell, t: dict[str, Tensor]) -> Layer:
    layer = torch.compile(unfused, dynamic=False)
    return Layer(lambda: layer(t["x"], t["w"], t["a"], t["b"], cell.dropout_p), _trained(t))


def _addmm(cell: Cell, t: dict[str, Tensor]) -> Layer:
    def forward() -> Tensor:
        x, dtype = t["x"], t["x"].dtype
        z = F.dropout(x, cell.dropout_p) if cell.dropout_p else None
        return AddmmLoRAFunction.apply(x, z, t["w"], t["a"].to(dtype), t["b"].to(dtype))

    return Layer(forward, _trained(t))


def _peft(cell: Cell, t: dict[str, Tensor], dtype: torch.dtype) -> Layer:
    from peft import LoraConfig, inject_adapter_in_model

    # the weight is adopted, not copied; the name "0" is its place in the Sequential
    base = nn.Linear(cell.K, cell.N, bias=False, device="meta")
    base.weight = nn.Parameter(t["w"], requires_grad=False)
    config = LoraConfig(
        r=cell.R,
        lora_alpha=SCALE * cell.R,
        lora_dropout=cell.dropout_p,
        target_modules=["0"],
        init_lora_weights=False,
    )
    layer = inject_adapter_in_model(config, nn.Sequential(base))[0]
    a, b = (nn.Parameter(t[name].detach().to(dtype)) for name in ("a", "b"))
    layer.lora_A["default"].weight, layer.lora_B["default"].weight = a, b
    return Layer(lambda: layer(t["x"]), {"x": t["x"], "a": a, "b": b})


def _ours(cell: Cell, t: dict[str, Tensor], impl: str) -> Layer:
    def forward() -> Tensor:
        return functional.lora_linear(
            t["x"], t["w"], t["a"], t["b"], scale=SCALE, dropout_p=cell.dropout_p, impl=impl
        )

    return Layer(forward, _trained(t))


def _on_gpu(cell: Cell) -> bool:
    return cell.device == "cuda"


def _headline(cell: Cell) -> bool:
    # compiling takes longer than timing all the others: only where the comparison is made
    return _on_gpu(cell) and cell.R == 16 and cell.M == 8192


CASE = Case(
    name="lora_linear",
    floor="frozen",
    shapes=SHAPES,
    quick_shapes={"even": (96, 64), "ragged": (50, 33)},
    leaves=("x", "a", "b"),
    providers=(
        Provider("frozen", _frozen),
        Provider("unfused", _unfused),
        # deterministic mode, which poisons, would make it compile a second time
        Provider("compiled", _compiled, poison=False, by_default=_headline),
        Provider("addmm", _addmm),
        Provider("peft", lambda cell, t: _peft(cell, t, cell.adapter_dtype)),
        Provider("peft_fp32", lambda cell, t: _peft(cell, t, torch.float32)),
        Provider("ours", lambda cell, t: _ours(cell, t, "auto"), same_mask=True),
        Provider("ours_triton", lambda cell, t: _ours(cell, t, "triton"), same_mask=True, by_default=_on_gpu),
    ),
    make_inputs=make_inputs,
    expected=expected,
    work=work,
)

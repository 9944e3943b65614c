"""A frozen linear with a frozen a and a 90%-sparse b, as in LoRI: packed values against a masked dense b."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_ops import functional, masked
from lowrank_ops.sparse_mask import SparseMask

from ..case import Case, Cell, Layer, Provider, Work
from .lora_linear import SHAPES

__all__ = ["CASE"]

SCALE = 2.0  # lora_alpha = 2 r
DENSITY = 0.1


def make_inputs(cell: Cell, generator: torch.Generator) -> dict[str, Tensor]:
    """Return x, w, a, dy, the mask as zeros and ones, and its b three times: values, b and dense.

    ``values`` are the entries. ``b`` and ``dense`` hold the same, (N, R), for those who train them with a
    masked gradient and with a full one: so each finds its own gradient among the expected ones.
    """

    def normal(*shape: int, std: float, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=cell.device, dtype=dtype).mul_(std)

    M, N, K, R = cell.M, cell.N, cell.K, cell.R
    exists = torch.rand(N, R, generator=generator, device=cell.device) < DENSITY
    b = normal(N, R, std=0.5 * (R * DENSITY) ** -0.5, dtype=cell.adapter_dtype) * exists
    tensors = {
        "x": normal(M, K, std=1.0, dtype=cell.dtype),
        "w": normal(N, K, std=K**-0.5, dtype=cell.dtype),
        "a": normal(R, K, std=K**-0.5, dtype=cell.adapter_dtype),
        "values": b[exists],
        "b": b,
        "dense": b.clone(),
        "mask": exists.to(cell.adapter_dtype),
        "dy": normal(M, N, std=1.0, dtype=cell.dtype),
    }
    for name in CASE.leaves:
        tensors[name].requires_grad_(not cell.forward_only)
    return tensors


def expected(cell: Cell, t: dict[str, Tensor]) -> Tensor:
    """The definition in the dtype of x, without dropout; every form of b has the gradient that is its own."""
    mask, b = t["mask"], t["b"] * t["mask"]
    entries = torch.zeros_like(mask).masked_scatter(mask.bool(), t["values"])
    # the value is that of the entries: differences of zero carry gradients alone
    b = (entries + (b - b.detach()) + (t["dense"] - t["dense"].detach())).to(t["x"].dtype)
    return F.linear(t["x"], t["w"]) + SCALE * F.linear(F.linear(t["x"], t["a"].to(t["x"].dtype)), b)


def work(cell: Cell) -> dict[str, Work]:
    """Every large tensor crosses memory once in each pass; x is not read in backward."""
    M, N, K, R = cell.M, cell.N, cell.K, cell.R
    size, adapter = cell.dtype.itemsize, cell.adapter_dtype.itemsize * R * (DENSITY * N + K)
    base, update = 2 * M * N * K, 2 * M * R * (N + K)
    return {
        "fwd": Work(bytes=size * (M * K + N * K + M * N) + adapter, flops=base + update),
        "bwd": Work(bytes=size * (M * N + N * K + M * K) + 2 * adapter, flops=base + update + 2 * M * R * N),
    }


def _frozen(cell: Cell, t: dict[str, Tensor]) -> Layer:
    return Layer(lambda: F.linear(t["x"], t["w"]), {"x": t["x"]})


def _peft(cell: Cell, t: dict[str, Tensor], dtype: torch.dtype) -> Layer:
    """PEFT's layer with a frozen lora_A and the gradient of lora_B masked, as LoRI's authors train it."""
    from peft import LoraConfig, inject_adapter_in_model

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
    a.requires_grad_(False)
    mask = t["mask"].detach().to(dtype)
    b.register_hook(lambda grad: grad * mask)
    layer.lora_A["default"].weight, layer.lora_B["default"].weight = a, b
    return Layer(lambda: layer(t["x"]), {"x": t["x"], "b": b})


def _lora(cell: Cell, t: dict[str, Tensor]) -> Layer:
    """lora_linear of the same rank: a dense b, and a that trains."""

    def forward() -> Tensor:
        return functional.lora_linear(
            t["x"], t["w"], t["a"], t["dense"], scale=SCALE, dropout_p=cell.dropout_p
        )

    return Layer(forward, {name: t[name] for name in ("x", "a", "dense")})


def _ours(cell: Cell, t: dict[str, Tensor], impl: str) -> Layer:
    mask = SparseMask.from_dense(t["mask"].bool())
    a = t["a"].detach()

    def forward() -> Tensor:
        return masked.masked_lora_linear(
            t["x"], t["w"], a, t["values"], mask, scale=SCALE, dropout_p=cell.dropout_p, impl=impl
        )

    return Layer(forward, {name: t[name] for name in ("x", "values")})


def _on_gpu(cell: Cell) -> bool:
    return cell.device == "cuda"


CASE = Case(
    name="masked_lora_linear",
    floor="frozen",
    shapes=SHAPES,
    quick_shapes={"even": (96, 64), "ragged": (50, 33)},
    leaves=("x", "a", "values", "b", "dense"),
    providers=(
        Provider("frozen", _frozen),
        Provider("peft_masked", lambda cell, t: _peft(cell, t, cell.adapter_dtype)),
        Provider("peft_masked_fp32", lambda cell, t: _peft(cell, t, torch.float32)),
        Provider("lora", _lora),
        Provider("ours", lambda cell, t: _ours(cell, t, "auto")),
        Provider("ours_triton", lambda cell, t: _ours(cell, t, "triton"), by_default=_on_gpu),
    ),
    make_inputs=make_inputs,
    expected=expected,
    work=work,
)

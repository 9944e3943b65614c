"""lora_group: projections of Llama-3-8B that share x, one layer each or all together."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_ops import functional, group

from ..case import Case, Cell, Layer, Provider, Work
from .lora_linear import SCALE, AddmmLoRAFunction, unfused

__all__ = ["CASE"]

# (N of all together, K)
SHAPES = {"q_k_v": (6144, 4096), "gate_up": (28672, 4096)}
_SHARES = {"q_k_v": (4, 1, 1)}


def widths(cell: Cell) -> list[int]:
    """Return N of each projection: two halves unless the shape is known to be something else."""
    shares = _SHARES.get(cell.shape, (1, 1))
    return [cell.N * share // sum(shares) for share in shares]


def make_inputs(cell: Cell, generator: torch.Generator) -> dict[str, Tensor]:
    """Return x, w0, w1, ..., a0, ..., b0, ... and dy, which holds dy of one projection after the other."""

    def normal(*shape: int, std: float, dtype: torch.dtype, trains: bool = False) -> Tensor:
        t = torch.randn(shape, generator=generator, device=cell.device, dtype=dtype).mul_(std)
        return t.requires_grad_(trains and not cell.forward_only)

    M, K, R = cell.M, cell.K, cell.R
    tensors = {"x": normal(M, K, std=1.0, dtype=cell.dtype, trains=True)}
    for i, N in enumerate(widths(cell)):
        tensors[f"w{i}"] = normal(N, K, std=K**-0.5, dtype=cell.dtype)
        tensors[f"a{i}"] = normal(R, K, std=K**-0.5, dtype=cell.adapter_dtype, trains=True)
        tensors[f"b{i}"] = normal(N, R, std=0.5 * R**-0.5, dtype=cell.adapter_dtype, trains=True)
    return tensors | {"dy": normal(M * cell.N, std=1.0, dtype=cell.dtype)}


def _each(cell: Cell, t: dict[str, Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [(t[f"w{i}"], t[f"a{i}"], t[f"b{i}"]) for i in range(len(widths(cell)))]


def _together(cell: Cell, t: dict[str, Tensor], impl: str) -> tuple[Tensor, ...]:
    ws, a_list, b_list = zip(*_each(cell, t), strict=True)
    scales = (SCALE,) * len(ws)
    return group.lora_linear_group(
        t["x"], ws, a_list, b_list, scales=scales, dropout_p=cell.dropout_p, impl=impl
    )


def expected(cell: Cell, t: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The definition, computing in the dtype of x throughout; with dropout, under the mask of lowrank_ops."""
    dtype = t["x"].dtype
    cast = {name: value if name == "x" else value.to(dtype) for name, value in t.items()}
    if cell.dropout_p:
        return _together(cell, cast, "reference")
    return tuple(unfused(t["x"], w, a, b, 0.0) for w, a, b in _each(cell, cast))


def work(cell: Cell) -> dict[str, Work]:
    """Every large tensor crosses memory once in each pass; backward also reads x, for da."""
    M, N, K, ranks = cell.M, cell.N, cell.K, cell.R * len(widths(cell))
    size, adapter = cell.dtype.itemsize, cell.adapter_dtype.itemsize * (ranks * K + cell.R * N)
    base, update = 2 * M * N * K, 2 * M * (ranks * K + cell.R * N)
    return {
        "fwd": Work(bytes=size * (M * K + N * K + M * N) + adapter, flops=base + update),
        "bwd": Work(bytes=size * (M * N + N * K + 2 * M * K) + 2 * adapter, flops=base + 2 * update),
    }


class GroupCase(Case):
    """A case whose leaves are those of the cell: x, and a and b of each of its projections."""

    def baseline(self, cell: Cell, tensors: dict[str, Tensor]) -> Layer:
        return Layer(lambda: self.expected(cell, tensors), _trained(cell, tensors))


def _trained(cell: Cell, t: dict[str, Tensor]) -> dict[str, Tensor]:
    factors = [f"{letter}{i}" for i in range(len(widths(cell))) for letter in "ab"]
    return {name: t[name] for name in ("x", *factors)}


def _frozen(cell: Cell, t: dict[str, Tensor]) -> Layer:
    return Layer(lambda: tuple(F.linear(t["x"], w) for w, _, _ in _each(cell, t)), {"x": t["x"]})


def _addmm(cell: Cell, t: dict[str, Tensor]) -> Layer:
    def forward() -> tuple[Tensor, ...]:
        x, dtype, p = t["x"], t["x"].dtype, cell.dropout_p
        return tuple(
            AddmmLoRAFunction.apply(x, F.dropout(x, p) if p else None, w, a.to(dtype), b.to(dtype))
            for w, a, b in _each(cell, t)
        )

    return Layer(forward, _trained(cell, t))


def _peft(cell: Cell, t: dict[str, Tensor], dtype: torch.dtype) -> Layer:
    from peft import LoraConfig, inject_adapter_in_model

    # the weights are adopted, not copied; the names "0", "1", ... are their places in the Sequential
    bases = [nn.Linear(cell.K, N, bias=False, device="meta") for N in widths(cell)]
    for base, (w, _, _) in zip(bases, _each(cell, t), strict=True):
        base.weight = nn.Parameter(w, requires_grad=False)
    config = LoraConfig(
        r=cell.R,
        lora_alpha=SCALE * cell.R,
        lora_dropout=cell.dropout_p,
        target_modules=[str(i) for i in range(len(bases))],
        init_lora_weights=False,
    )
    layers = inject_adapter_in_model(config, nn.Sequential(*bases))
    leaves = {"x": t["x"]}
    for i, layer in enumerate(layers):
        for letter, factors in (("a", layer.lora_A), ("b", layer.lora_B)):
            factors["default"].weight = nn.Parameter(t[f"{letter}{i}"].detach().to(dtype))
            leaves[f"{letter}{i}"] = factors["default"].weight
    return Layer(lambda: tuple(layer(t["x"]) for layer in layers), leaves)


def _apart(cell: Cell, t: dict[str, Tensor]) -> Layer:
    def forward() -> tuple[Tensor, ...]:
        options = {"scale": SCALE, "dropout_p": cell.dropout_p}
        return tuple(functional.lora_linear(t["x"], *each, **options) for each in _each(cell, t))

    return Layer(forward, _trained(cell, t))


def _ours(cell: Cell, t: dict[str, Tensor], impl: str) -> Layer:
    return Layer(lambda: _together(cell, t, impl), _trained(cell, t))


CASE = GroupCase(
    name="lora_group",
    floor="frozen",
    shapes=SHAPES,
    quick_shapes={"q_k_v": (96, 64), "gate_up": (66, 33)},
    leaves=("x",),
    providers=(
        Provider("frozen", _frozen),
        Provider("addmm", _addmm),
        Provider("peft", lambda cell, t: _peft(cell, t, cell.adapter_dtype)),
        Provider("peft_fp32", lambda cell, t: _peft(cell, t, torch.float32)),
        Provider("ours", lambda cell, t: _ours(cell, t, "auto"), same_mask=True),
        Provider(
            "ours_triton",
            lambda cell, t: _ours(cell, t, "triton"),
            same_mask=True,
            by_default=lambda cell: cell.device == "cuda",
        ),
        Provider("ours_apart", _apart),
    ),
    make_inputs=make_inputs,
    expected=expected,
    work=work,
)

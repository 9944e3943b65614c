"""Layers linked by hand, and what shows how they were computed."""

import pytest
import torch
from tiny_models import stir
from torch import Tensor, nn

import lowrank_ops as lo
from lowrank_ops import layer_group
from lowrank_ops.layer_group import LayerGroup


def count_joint(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the number of layers at every joint computation."""
    sizes = []
    compute = layer_group.lora_linear_group

    def counted(x: Tensor, ws: list[Tensor], *args: object, **kwargs: object) -> tuple[Tensor, ...]:
        sizes.append(len(ws))
        return compute(x, ws, *args, **kwargs)

    monkeypatch.setattr(layer_group, "lora_linear_group", counted)
    return sizes


def linked(count: int = 3, **options) -> list[lo.FusedLoRALinear]:
    """Return layers 6 -> 4 in one group, as of a parent whose source would not link them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = lo.LoRAConfig(**{"r": 2, **options})
        layers = [lo.FusedLoRALinear.from_linear(nn.Linear(6, 4), config) for _ in range(count)]
    LayerGroup(layers)
    for i, layer in enumerate(layers):
        stir(layer, i)
    return layers


def alone(layer: lo.FusedLoRALinear, x: Tensor) -> Tensor:
    """Return y of a layer without its group."""
    group, layer.group = layer.group, None
    y = layer(x)
    layer.group = group
    return y


def points() -> Tensor:
    """Return inputs of the linked layers, (5, 6), the same every time."""
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(0))

"""Small LoRI models for tests."""

import torch
from tiny_models import points, stir, tiny_mlp
from torch import Tensor, nn

import lowrank_ops as lo


def dense_mlp(dtype=torch.float32, seed=2, **options) -> nn.Sequential:
    """Return ``tiny_mlp`` with a calibrated LoRI-D adapter of rank 3: 24 + 15 entries of B."""
    return stir(lo.inject(tiny_mlp(dtype), lo.LoRIConfig(**{"r": 3, "lora_alpha": 6, **options})), seed)


def sparse_mlp(dtype=torch.float32, sparsity=0.5, **options) -> nn.Sequential:
    """Return ``dense_mlp`` with the larger half of its entries."""
    model = dense_mlp(dtype, **options)
    return lo.lori.sparsify(model, lo.lori.extract_masks(model, sparsity), keep_values=True)


def dense_b(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every B, (N, R), zero where it has no entry."""
    return {n: m.adapter.factors(m.weight).b.detach().clone() for n, m in adapted(model).items()}


def adapted(model: nn.Module) -> dict[str, lo.FusedMaskedLoRALinear]:
    """Return the LoRI layers by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, lo.FusedMaskedLoRALinear)}


def adamw_steps(model: nn.Module, steps: int = 3, weight_decay: float = 0.0, lr: float = 0.1) -> None:
    """Train with stock AdamW on other points each step."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay
    )
    for step in range(steps):
        x = points(next(model.parameters()).dtype, seed=step)
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

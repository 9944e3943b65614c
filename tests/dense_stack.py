"""Blocks of linear layers with DenseLoRA's adapters, and the gradients of what they share."""

import torch
import torch.nn.functional as F
from tiny_models import stir
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowrank_ops as lo

BLOCKS, WIDTH, RANK = 4, 6, 3


class Block(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH, **options)
        self.mlp = nn.Module()
        self.mlp.up_proj = nn.Linear(WIDTH, 8, bias=False, **options)
        self.mlp.down_proj = nn.Linear(8, WIDTH, bias=False, **options)

    def forward(self, x):
        x = x + self.q_proj(x)
        return x + self.mlp.down_proj(F.gelu(self.mlp.up_proj(x)))


class Stack(nn.Module):
    """Blocks one after the other, each in a checkpoint of the kind that ``reentrant`` says, or in none."""

    def __init__(self, reentrant=None, **options):
        super().__init__()
        self.layers = nn.ModuleList(Block(**options) for _ in range(BLOCKS))
        self.reentrant = reentrant

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


def make_config(**options):
    targets = ["q_proj", "up_proj", "down_proj"]
    return lo.DenseLoRAConfig(**{"r": RANK, "lora_alpha": 6, "target_modules": targets, **options})


def make_stack(dtype=torch.float64, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return stir(lo.inject(Stack(dtype=dtype), make_config(**options)))


def inputs(dtype=torch.float64, seed=1, count=5):
    x = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).requires_grad_()


def gradients(model, x=None, seed=5):
    """Return the gradient of everything that trains, after one backward pass, and clear it."""
    torch.manual_seed(seed)
    model(inputs() if x is None else x).square().sum().backward()
    return taken(model)


def taken(model):
    """Return the gradients that ``model`` holds, and clear them."""
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return grads


def assert_close(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_shared(model):
    for projection in ("q_proj", "mlp.up_proj", "mlp.down_proj"):
        adapters = [layer.get_submodule(projection).adapter for layer in model.layers]
        assert len({id(adapter.encoder) for adapter in adapters}) == 1
        assert len({id(adapter.decoder) for adapter in adapters}) == 1
        assert len({id(adapter.core) for adapter in adapters}) == BLOCKS

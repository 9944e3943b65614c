"""A small SALOR model and its training, for the tests."""

import copy

import torch
from torch import nn

import lowrank_ops as lo
from lowrank_ops.salor import PruningSchedule

STRUCTURES = ["unstructured", "2:4", "blocks", "rank"]
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
}


def make(structure="unstructured", dtype=torch.float64, **options):
    """Return a model of ragged sizes with SALOR adapters, and their config."""
    config = lo.SALORConfig(**{"r": 16, "structure": structure, "every": 5, "total_steps": 40} | options)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(18, 37), nn.GELU(), nn.Linear(37, 21)).to(dtype)
    return lo.inject(model, config), config


def data(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, size, generator=generator, dtype=dtype) for size in (18, 21)]


def train(model, optimizer, schedule, steps, after=None):
    x, target = data()
    for _ in range(steps):
        (model(x) - target).square().mean().backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        if after is not None:
            after()
        optimizer.zero_grad()


def trained(structure="unstructured", steps=40, **options):
    """Return a model after some steps of its schedule, its optimizer, and the schedule."""
    model, config = make(structure, **options)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    schedule = PruningSchedule(model, config, optimizer=optimizer)
    train(model, optimizer, schedule, steps)
    return model, optimizer, schedule


def pairs(model):
    return [pair for layer in (model[0], model[2]) for pair in layer.adapter.pairs()]


def plain_twin(model):
    """Return a plain model of the same base weights."""
    return lo.eject(copy.deepcopy(model))

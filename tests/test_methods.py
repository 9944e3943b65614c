"""The contract that every method keeps, read from METHODS: a new method is tested by existing."""

import copy

import pytest
import torch
from tiny_models import points, stir
from torch import nn
from torch.nn import functional as F

import lowrank_ops as lo
from lowrank_ops.layer_types import LAYERS

SIZES = {"square": (6, 6), "ragged": (6, 7), "one output": (6, 1)}  # (K, N)


def make_layer(method, sizes, dtype=torch.float64):
    torch.manual_seed(0)
    linear = nn.Linear(*sizes, dtype=dtype)
    config = lo.METHODS[method].config_class(r=3)
    return copy.deepcopy(linear), LAYERS[method].from_linear(linear, config)


pytestmark = [
    pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES),
    pytest.mark.parametrize("method", lo.METHODS),
]


def test_a_layer_starts_as_its_base(method, sizes):
    linear, layer = make_layer(method, sizes)
    x = points(torch.float64)
    if layer.adapter.starts_as_base:
        assert torch.equal(layer(x), linear(x))
    else:
        # a method that changes the base starts as what its factors add to it
        a, b, scale = layer.adapter.factors(layer.weight)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight + scale * (b @ a), linear.bias))
        assert not torch.equal(layer.weight, linear.weight)


def test_merged_equals_unmerged_or_merge_refuses(method, sizes):
    _, layer = make_layer(method, sizes)
    stir(layer)
    x = points(torch.float64)
    unmerged = layer(x)
    if layer.config.mergeable:
        layer.merge()
    else:
        with pytest.raises(ValueError, match="merge: weight must have an update that is linear in x, got"):
            layer.merge()
    assert layer.merged == layer.config.mergeable
    torch.testing.assert_close(layer(x), unmerged)


def test_every_adapter_parameter_gets_a_gradient_and_the_base_none(method, sizes):
    _, layer = make_layer(method, sizes)
    stir(layer)
    layer(points(torch.float64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.adapter.parameters())
    assert all(p.grad is None for p in layer.base.parameters())


def test_the_state_dict_round_trips(method, sizes):
    _, layer = make_layer(method, sizes)
    stir(layer)
    _, other = make_layer(method, sizes)
    assert other.load_state_dict(layer.state_dict()) == ([], [])
    x = points(torch.float64)
    assert torch.equal(other(x), layer(x))


def test_factors_have_the_shapes_of_the_update(method, sizes):
    linear, layer = make_layer(method, sizes)
    if not layer.config.mergeable:
        with pytest.raises(ValueError, match="factors: update must be linear in x to have factors, got"):
            layer.adapter.factors(layer.weight)
        return
    a, b, scale = layer.adapter.factors(layer.weight)
    N, K = linear.weight.shape
    rows = 3 + getattr(layer.adapter, "residual_rank", 0)
    assert a.shape == (rows, K)
    assert b.shape == (N, rows)
    assert isinstance(scale, float)

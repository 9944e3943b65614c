"""Siblings with a dense B of LoRI are computed together, and with a sparse one alone."""

import pytest
import torch
from tiny_models import stir, tiny_llama

import lowrank_ops as lo
from lowrank_ops import layer_group


@pytest.fixture
def calls(monkeypatch):
    sizes = []

    def counted(x, ws, *arguments, **options):
        sizes.append(len(ws))
        return lo.lora_linear_group(x, ws, *arguments, **options)

    monkeypatch.setattr(layer_group, "lora_linear_group", counted)
    return sizes


def projections(model):
    attention = model.model.layers[0].self_attn
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def outputs_and_gradients(layers, x):
    for layer in layers:
        layer.adapter.zero_grad()
    ys = [layer(x) for layer in layers]
    sum(y.square().sum() for y in ys).backward()
    found = [p.grad for layer in layers for p in layer.adapter.parameters()]
    return [y.detach() for y in ys], found


def test_dense_siblings_are_one_call_that_keeps_no_input(calls):
    layers = projections(stir(lo.inject(tiny_llama().double(), lo.LoRIConfig(r=3))))
    x = torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        together = outputs_and_gradients(layers, x)
    assert calls == [3]
    assert x.data_ptr() not in kept
    for layer in layers:
        layer.group = None
    torch.testing.assert_close(together, outputs_and_gradients(layers, x))
    assert calls == [3]


def test_sparse_siblings_are_computed_alone(calls):
    model = stir(lo.inject(tiny_llama().double(), lo.LoRIConfig(r=3)))
    x = torch.randn(5, 32, dtype=torch.float64)
    layers = projections(model)
    lo.lori.sparsify(model, lo.lori.extract_masks(model, 0.0), keep_values=True)
    expected = [x @ (m.weight + update(m)).T for m in layers]
    torch.testing.assert_close([layer(x) for layer in layers], expected)
    assert calls == []


def update(layer):
    a, b, scale = layer.adapter.factors(layer.weight)
    return scale * (b @ a)

"""On a GPU too one flat parameter gives the bits of single ones, in eager code and in a CUDA graph."""

import pytest
import torch
from tiny_models import stir
from torch import nn

import lowrank_ops as lo

pytestmark = pytest.mark.gpu


def sparse_model():
    torch.manual_seed(0)
    linears = [nn.Linear(256, 256) for _ in range(3)]
    model = stir(lo.inject(nn.Sequential(*linears).bfloat16(), lo.LoRIConfig(r=16)))
    return lo.lori.sparsify(model, lo.lori.extract_masks(model, 0.9), keep_values=True).cuda()


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def step_of(model, parameters, x, **options):
    optimizer = torch.optim.AdamW(parameters, lr=0.01, fused=True, **options)

    def step():
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()

    return step


def test_fused_adamw_gives_the_bits_of_single_parameters():
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    single, flat, captured = sparse_model(), sparse_model(), sparse_model()
    steps = [step_of(single, trained(single), x), step_of(flat, [lo.flat_parameter(flat)], x)]
    for step in steps:
        for _ in range(10):
            step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step = step_of(captured, [lo.flat_parameter(captured)], x, capturable=True)
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    for _ in range(7):
        graph.replay()
    for p, q, r in zip(trained(single), trained(flat), trained(captured), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(q, r)

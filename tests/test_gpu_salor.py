"""SALOR on a GPU: the compact layer against the dense one, and pruning that does not depend on the device."""

import pytest
import torch
from torch import nn

import lowrank_ops as lo
from lowrank_ops.salor import PruningSchedule
from lowrank_ops.testing import assert_as_accurate

pytestmark = pytest.mark.gpu

STRUCTURES = ["unstructured", "2:4", "blocks", "rank"]


def make(structure, dtype, device="cuda", sizes=(1024, 768)):
    torch.manual_seed(0)
    config = lo.SALORConfig(r=32, structure=structure, every=5, total_steps=40)
    model = nn.Sequential(nn.Linear(*sizes), nn.GELU(), nn.Linear(*reversed(sizes)))
    return lo.inject(model.to(dtype), config).to(device), config


def run(model, config, steps=40, **options):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, **options)
    schedule = PruningSchedule(model, config, optimizer=optimizer)
    device, dtype = model[0].weight.device, model[0].weight.dtype
    x = torch.randn(256, model[0].in_features, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    for _ in range(steps):
        (model(x) - x).float().square().mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return schedule, x


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}], ids=["foreach", "fused"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_pruned_entries_are_zero_bit_for_bit(structure, options):
    model, config = make(structure, torch.bfloat16)
    run(model, config, **options)
    pairs = [pair for layer in (model[0], model[2]) for pair in layer.adapter.pairs()]
    assert any(pruned.any() for _, pruned in pairs)
    for factor, pruned in pairs:
        assert not factor.detach()[pruned].view(torch.int32).any()


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_compact_layer_is_as_accurate_as_pytorch(structure, dtype):
    model, config = make(structure, dtype)
    schedule, x = run(model, config)
    layer = model[0]
    with torch.no_grad():
        a, b, scale = layer.adapter.factors(layer.weight)
    schedule.finish()
    layer = model[0]
    actual = layer(x)
    update = nn.functional.linear(nn.functional.linear(x, a.to(dtype)), b.to(dtype))
    baseline = nn.functional.linear(x, layer.weight, layer.bias) + scale * update
    w = layer.weight.double() + scale * b.double() @ a.double()
    truth = x.double() @ w.T + layer.bias.double()
    assert_as_accurate(actual, baseline, truth, factor=2)
    # training goes on, of all that is left
    actual.float().square().mean().backward()
    for parameter in layer.adapter.parameters():
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_same_scores_are_pruned_as_on_the_cpu(structure):
    here, config = make(structure, torch.float32)
    there, _ = make(structure, torch.float32, device="cpu")
    generator = torch.Generator().manual_seed(3)
    for mine, theirs in zip(
        (p for p in here.parameters() if p.requires_grad),
        (p for p in there.parameters() if p.requires_grad),
        strict=True,
    ):
        # few different values: many ties, and sums that are exact
        values = torch.randint(-8, 9, mine.shape, generator=generator).float()
        mine.data.copy_(values)
        theirs.data.copy_(values)
    for model in (here, there):
        schedule = PruningSchedule(model, config)
        for _ in range(28):
            schedule.step()
    for i in (0, 2):
        for (_, mine), (_, theirs) in zip(here[i].adapter.pairs(), there[i].adapter.pairs(), strict=True):
            assert torch.equal(mine.cpu(), theirs)

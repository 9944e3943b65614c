"""Pruning on a GPU: the same entries as on a CPU, memory that falls, and models that train and reload."""

import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lowrank_ops as lo
from lowrank_ops.salr_pruning import checksum, global_cuts, layer_cut, prune_weight, residual_factors
from lowrank_ops.testing import assert_as_accurate

pytestmark = pytest.mark.gpu


def gaussian(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_model(size=2048, dtype=torch.bfloat16):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(size, 2 * size, bias=False), nn.GELU(), nn.Linear(2 * size, size, bias=False)]
        return nn.Sequential(*layers).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("structure", ["unstructured", "2:4"])
def test_the_gpu_drops_what_the_cpu_drops(structure, dtype):
    w = gaussian(1000, 777, dtype=dtype)
    config = lo.SALRConfig(structure=structure)
    cuts = [layer_cut(t, config) for t in (w, w.cuda())]
    assert cuts[0] == cuts[1]
    here, there = prune_weight(w, cuts[0], structure), prune_weight(w.cuda(), cuts[0], structure)
    assert torch.equal(here, there.cpu())
    assert checksum(here) == checksum(there)
    weights = {"a": w, "b": 0.5 * gaussian(64, 100, dtype=dtype, seed=1)}
    assert global_cuts(weights, 0.3) == global_cuts({n: t.cuda() for n, t in weights.items()}, 0.3)


@pytest.mark.parametrize("shape", [(4096, 1024), (1000, 3000)], ids=str)
def test_the_randomized_residual_is_the_best_one_to_a_thousandth(shape):
    w = gaussian(*shape, dtype=torch.float32).cuda()
    e = w - prune_weight(w, layer_cut(w, lo.SALRConfig()), "unstructured")
    errors = [
        (e - b @ a).norm() for a, b in (residual_factors(e, 64, how) for how in ("exact", "randomized"))
    ]
    assert errors[1] <= 1.001 * errors[0]
    assert errors[1].square() <= (1 - 64 / min(shape)) * e.square().sum()
    again = residual_factors(e, 64, "randomized")
    assert all(torch.equal(x, y) for x, y in zip(again, residual_factors(e, 64, "randomized"), strict=True))


@pytest.mark.parametrize("structure", ["unstructured", "2:4"])
@pytest.mark.parametrize("tokens", [1, 16, 1024])
def test_a_pruned_layer_computes_its_formula_and_gradients(tokens, structure):
    linear = nn.Linear(1024, 768, device="cuda", dtype=torch.bfloat16)
    layer = lo.FusedPrunedLinear.from_linear(linear, lo.SALRConfig(structure=structure))
    with torch.no_grad():
        layer.adapter.b[:, :16] = 0.02 * torch.randn(768, 16, device="cuda")
    x = gaussian(tokens, 1024).cuda().requires_grad_()
    dy = gaussian(tokens, 768, seed=1).cuda()
    parameters = [x, layer.adapter.a, layer.adapter.b]
    actual = (layer(x), *torch.autograd.grad(layer(x), parameters, dy))
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        # float32 factors stay so beside bfloat16, as leaves
        leaves = [t.detach().to(torch.promote_types(t.dtype, dtype)).requires_grad_() for t in parameters]
        x_, a, b = (t.to(dtype) for t in leaves)
        w, bias = layer.weight.to(x_.dtype), linear.bias.detach().to(x_.dtype)
        y = F.linear(x_, w, bias) + layer.adapter.scale * F.linear(F.linear(x_, a), b)
        results.append((y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))))
    for ours, stock, exact in zip(actual, *results, strict=True):
        assert_as_accurate(ours, stock, exact)


def test_memory_of_the_gpu_falls_while_a_model_is_pruned():
    # what libraries keep for themselves is there before
    lo.salr.prune(make_model(1024).cuda(), lo.SALRConfig(), progress=False)
    model = make_model().cuda()
    gc.collect()
    before = torch.cuda.memory_allocated()
    dense = sum(p.nbytes for p in model.parameters())
    torch.cuda.reset_peak_memory_stats()
    lo.salr.prune(model, lo.SALRConfig(), progress=False)
    gc.collect()
    report = lo.report(model)
    adapters = sum(p.nbytes for p in model.parameters())
    slack = 2**20
    assert torch.cuda.memory_allocated() <= before - dense + report.compressed_bytes + adapters + slack
    assert report.bits_per_weight <= 9.3
    # one layer's work in float32 beside the model
    largest = 2048 * 4096
    assert torch.cuda.max_memory_allocated() <= before + 48 * largest


def test_an_interruption_brings_the_weights_back_to_the_gpu(monkeypatch, tmp_path):
    from lowrank_ops import layer_pruned

    model = make_model(512).cuda()
    before = [(p, p.clone(), p.device) for p in model.parameters()]
    original, done = layer_pruned.residual_factors, []

    def stop(*args):
        if done:
            raise KeyboardInterrupt
        done.append(args)
        return original(*args)

    with monkeypatch.context() as patched:
        patched.setattr(layer_pruned, "residual_factors", stop)
        with pytest.raises(KeyboardInterrupt):
            lo.salr.prune(model, lo.SALRConfig(), folder=tmp_path, progress=False)
    assert all(p.device == device and torch.equal(p, old) for p, old, device in before)
    lo.salr.prune(model, lo.SALRConfig(), folder=tmp_path, progress=False)
    assert model[0].base.values.is_cuda


def test_an_adapter_that_a_gpu_made_loads_on_a_cpu(tmp_path):
    model = lo.salr.prune(make_model(256).cuda(), lo.SALRConfig(), progress=False)
    lo.save_adapter(model, tmp_path)
    loaded = lo.load_adapter(make_model(256), tmp_path)
    for layer, other in ((model[0], loaded[0]), (model[2], loaded[2])):
        assert torch.equal(layer.weight.cpu(), other.weight)
        assert torch.equal(layer.adapter.b.cpu(), other.adapter.b)


def test_learning_rates_come_from_the_gpu_too():
    model = lo.salr.prune(make_model(256).cuda(), lo.SALRConfig(separate_residual=True), progress=False)
    x = gaussian(500, 256).cuda()
    rates = lo.salr.residual_learning_rate(model, [x])
    assert rates["0"] == pytest.approx(torch.linalg.matrix_norm(x.float(), 2).item() ** -2, rel=0.02)
    fused = torch.optim.AdamW(lo.salr.parameter_groups(model, 1e-3, rates), fused=True)
    model(x).float().square().mean().backward()
    fused.step()

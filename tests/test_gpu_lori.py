"""LoRI on a GPU: the same A, masks and files as on a CPU, and layers as accurate as PyTorch."""

import copy

import pytest
import torch
from lori_models import adapted
from tiny_models import bits, stir
from torch import nn

import lowrank_ops as lo
from lowrank_ops.seeded import draw_uniform
from lowrank_ops.testing import assert_as_accurate

pytestmark = pytest.mark.gpu


def model(dtype=torch.float32, seed=2):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 384)).to(dtype)
    return stir(lo.inject(plain, lo.LoRIConfig()), seed)


def plain(dtype=torch.float32):
    return lo.eject(model(dtype))


def sparse_on_gpu(dtype=torch.float32):
    made = model(dtype)
    return lo.lori.sparsify(made, lo.lori.extract_masks(made, 0.9), keep_values=True).cuda()


@pytest.mark.parametrize("shape", [(32, 4096), (3, 7), (512, 1000)], ids=str)
def test_a_has_the_same_bits_on_every_device(shape):
    host, device = (draw_uniform(12345, *shape, dtype=torch.float32, device=d) for d in ("cpu", "cuda"))
    assert torch.equal(bits(host), bits(device.cpu()))


def test_masks_are_those_of_the_cpu():
    host, device = model(), model().cuda()
    expected = lo.lori.extract_masks(host)
    for name, mask in lo.lori.extract_masks(device).items():
        assert mask.device.type == "cuda"
        assert mask.to("cpu") == expected[name]


def test_layers_of_one_model_may_be_on_several_devices():
    split, host = model(), model()
    split[0].cuda()
    expected, masks = lo.lori.extract_masks(host), lo.lori.extract_masks(split)
    assert [masks[name].device.type for name in ("0", "2")] == ["cuda", "cpu"]
    assert all(masks[name].to("cpu") == expected[name] for name in masks)
    lo.lori.sparsify(split, expected)
    assert [layer.adapter.b.values.device.type for layer in adapted(split).values()] == ["cuda", "cpu"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_sparse_layer_is_as_accurate_as_pytorch(dtype):
    layer = sparse_on_gpu(dtype)[0]
    stock, exact = copy.deepcopy(layer), copy.deepcopy(layer).double()
    stock.impl = exact.impl = "reference"
    x = torch.randn(200, 256, device="cuda", dtype=dtype, requires_grad=True)
    dy = torch.randn(200, 512, device="cuda", dtype=dtype)
    found = []
    for one, kind in ((layer, dtype), (stock, dtype), (exact, torch.float64)):
        own = x.detach().to(kind).requires_grad_()
        y = one(own)
        y.backward(dy.to(kind))
        found.append((y.detach(), own.grad, one.adapter.b.values.grad))
    for ours, theirs, truth in zip(*found, strict=True):
        assert_as_accurate(ours, theirs, truth)


def test_entries_outside_the_train_mask_keep_their_bits():
    made = sparse_on_gpu()
    before = {name: layer.adapter.factors(None).b.detach().clone() for name, layer in adapted(made).items()}
    masks = lo.lori.extract_masks(model(seed=9), 0.9)
    lo.lori.train_only(made, masks)
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=0.01, fused=True)
    for step in range(100):
        torch.manual_seed(step)
        made(torch.randn(64, 256, device="cuda")).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, layer in adapted(made).items():
        mask, after = masks[name].to_dense().cuda(), layer.adapter.factors(None).b.detach()
        assert torch.equal(bits(after[~mask]), bits(before[name][~mask]))
        assert (after[mask] != before[name][mask]).float().mean() > 0.99


def test_a_continued_adapter_survives_files(tmp_path):
    made = lo.lori.train_only(sparse_on_gpu(), lo.lori.extract_masks(model(seed=9), 0.9))
    lo.save_adapter(made, tmp_path)
    x = torch.randn(64, 256, device="cuda")
    assert torch.equal(lo.load_adapter(plain().cuda(), tmp_path)(x), made(x))
    host = lo.load_adapter(plain(), tmp_path)
    for name, layer in adapted(host).items():
        own = made.get_submodule(name).adapter.factors(None)
        assert all(
            torch.equal(t, o.cpu()) for t, o in zip(layer.adapter.factors(None)[:2], own, strict=False)
        )


def test_a_sparse_step_keeps_no_input():
    layer = sparse_on_gpu(torch.bfloat16)[0]
    x = torch.randn(4096, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer(x[:64])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = layer(x)
    kept = torch.cuda.memory_allocated() - before - y.nbytes
    # h in float32, and small change
    assert kept <= 4096 * 32 * 4 + 2**16

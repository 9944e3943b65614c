"""Models as other tools hand them over: wrapped, offloaded, made in inference mode."""

import io

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import assert_untouched, fingerprint, injected_mlp, points, stir, tiny_mlp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lowrank_ops as lo


@pytest.fixture
def distributed(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield nn.parallel.DistributedDataParallel
    torch.distributed.destroy_process_group()


def assert_wrapped_model_works(wrap, tmp_path):
    plain = injected_mlp()
    model = wrap(injected_mlp())
    expected = plain(points())
    lo.save_adapter(model, tmp_path / "a")
    lo.save_adapter(plain, tmp_path / "b")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert first.keys() == second.keys()
    assert torch.equal(lo.load_adapter(tiny_mlp(), tmp_path / "a")(points()), expected)
    assert lo.load_adapter(stir(model, seed=8), tmp_path / "a") is model
    assert torch.equal(model(points()), expected)
    assert str(lo.report(model)) == str(lo.report(plain))
    assert lo.merge(model) is model
    assert lo.unmerge(model) is model
    assert lo.eject(model) is model
    assert type(model.module[0]) is nn.Linear


def test_a_data_parallel_model_is_taken_as_the_one_inside(tmp_path):
    assert_wrapped_model_works(nn.DataParallel, tmp_path)
    model = nn.DataParallel(tiny_mlp())
    assert lo.inject(model, lo.LoRAConfig(r=3, target_modules=r"[02]")) is model
    lo.save_adapter(model, tmp_path)
    model = nn.DataParallel(tiny_mlp())
    assert lo.load_adapter(model, tmp_path) is model


def test_a_distributed_model_is_taken_as_the_one_inside(distributed, tmp_path):
    assert_wrapped_model_works(distributed, tmp_path)


@pytest.mark.parametrize("structure", ["unstructured", "2:4"])
def test_a_compressed_base_goes_through_a_process_group(structure, distributed):
    model = nn.Sequential(nn.Linear(6, 16))
    lo.inject(model, lo.SALRConfig(r=2, residual_rank=2, structure=structure))
    expected, buffer = model(points()), io.BytesIO()
    assert torch.equal(distributed(model)(points()), expected)
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(points()), expected)


@pytest.mark.parametrize("config", [lo.LoRAConfig(r=3), lo.SALORConfig(r=3)])
def test_adapters_in_shards_are_neither_saved_nor_filled(config, distributed, tmp_path):
    model = lo.inject(tiny_mlp(), config)
    lo.save_adapter(model, tmp_path)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    for call in (lo.save_adapter, lo.load_adapter):
        with pytest.raises(ValueError, match=r"_adapter: adapter of '0' must be whole, got a sharded"):
            call(model, tmp_path)


def test_adapters_that_a_reducer_would_not_see_are_refused(distributed, tmp_path):
    lo.save_adapter(injected_mlp(), tmp_path / "adapter")
    model = distributed(tiny_mlp())
    before = fingerprint(model)
    with pytest.raises(ValueError, match="inject: model must not be in DistributedDataParallel yet"):
        lo.inject(model, lo.LoRAConfig(r=3))
    with pytest.raises(ValueError, match="load_adapter: model must not be in DistributedDataParallel yet"):
        lo.load_adapter(model, tmp_path / "adapter")
    assert_untouched(before, model)


@pytest.mark.parametrize("sequential", [False, True])
def test_a_layer_that_accelerate_offloads_is_refused(sequential):
    hooks = pytest.importorskip("accelerate.hooks")
    model = tiny_mlp()
    weights = {name: value.clone() for name, value in model[2].state_dict().items()}
    hook = hooks.AlignDevicesHook(execution_device="cpu", offload=True, weights_map=weights)
    hooks.add_hook_to_module(model[2], hooks.SequentialHook(hooks.ModelHook(), hook) if sequential else hook)
    before = fingerprint(model)
    with pytest.raises(ValueError, match="target '2' must hold its weight, got one that accelerate offloads"):
        lo.inject(model, lo.LoRAConfig(r=3))
    assert_untouched(before, model)


def loss_gradients(model):
    model(points()).sum().backward()
    return [p.grad for p in model.parameters() if p.requires_grad]


def test_what_is_made_in_inference_mode_trains_afterwards(tmp_path):
    lo.save_adapter(injected_mlp(), tmp_path)
    injected, loaded, merged = tiny_mlp(), tiny_mlp(), injected_mlp()
    with torch.inference_mode():
        lo.inject(injected, lo.LoRAConfig(r=3))
        lo.load_adapter(loaded, tmp_path)
        fused = lo.FusedLoRALinear.from_linear(nn.Linear(6, 8), lo.LoRAConfig(r=3, bias="none"))
        lo.merge(merged)
    assert not merged[0].weight.is_inference()
    assert not fused.adapter.a.is_inference()
    for model in (injected, loaded, lo.unmerge(merged)):
        gradients = loss_gradients(model)
        assert len(gradients) == 4
        assert all(gradient is not None for gradient in gradients)

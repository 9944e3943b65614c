"""The fused layer alone: numbers, copies, dtypes, merging, and what reads it as a linear layer."""

import copy
import pickle

import pytest
import torch
from tiny_models import points, stir
from torch import nn
from torch.nn import functional as F

import lowrank_ops as lo
from lowrank_ops.testing import assert_as_accurate

X = points()
CLONES = {"deepcopy": copy.deepcopy, "pickle": lambda module: pickle.loads(pickle.dumps(module))}


def make_layer(dtype=torch.float32, bias=True, **options):
    torch.manual_seed(0)
    linear = nn.Linear(6, 8, bias=bias, dtype=dtype).eval()
    return stir(lo.FusedLoRALinear.from_linear(linear, lo.LoRAConfig(**{"r": 3, **options})))


def definition(layer, x, dtype):
    """Return what the layer must compute, as PyTorch computes it in ``dtype``."""
    base, adapter = layer.base, layer.adapter
    bias = None if base.bias is None else base.bias.to(dtype)
    update = (x.to(dtype) @ adapter.a.to(dtype).T) @ adapter.b.to(dtype).T
    return F.linear(x.to(dtype), base.weight.to(dtype), bias) + adapter.scale * update


@pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_forward_is_as_accurate_as_pytorch(dtype, bias):
    layer, x = make_layer(dtype, bias), X.to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert_as_accurate(y, definition(layer, x, dtype), definition(layer, x, torch.float64))


@pytest.mark.parametrize("shape", [(6,), (2, 3, 6), (0, 6)], ids=str)
def test_any_leading_dimensions_work(shape):
    layer = make_layer()
    x = torch.randn(shape)
    assert layer(x).shape == (*shape[:-1], 8)


@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_adapters_are_at_least_float32(base, adapter):
    layer = make_layer(base)
    assert {p.dtype for p in layer.adapter.parameters()} == {adapter}


def test_the_start_is_drawn_from_torch_and_bounded_as_in_a_linear_layer():
    layers = [lo.FusedLoRALinear.from_linear(nn.Linear(64, 8), lo.LoRAConfig()) for _ in range(2)]
    first, second = (layer.adapter for layer in layers)
    assert not torch.equal(first.a, second.a)
    assert 0.9 / 8 < first.a.abs().max() <= 1 / 8
    assert not first.b.any()


def test_from_linear_keeps_the_layer_and_freezes_it():
    linear = nn.Linear(6, 8)
    layer = lo.FusedLoRALinear.from_linear(linear, lo.LoRAConfig(r=3))
    assert layer.base is linear
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"adapter.a", "adapter.b"}


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_from_linear_trains_the_bias_that_the_config_names(bias):
    layer = lo.FusedLoRALinear.from_linear(nn.Linear(6, 8), lo.LoRAConfig(bias=bias))
    assert layer.bias.requires_grad
    assert not layer.weight.requires_grad
    layer(X).sum().backward()
    assert layer.bias.grad is not None


def test_the_name_picks_the_patterns():
    config = lo.LoRAConfig(r=3, rank_pattern={"q_proj": 5}, alpha_pattern={"q_proj": 10})
    layer = lo.FusedLoRALinear.from_linear(nn.Linear(6, 8), config, name="layers.0.q_proj")
    assert (layer.adapter.rank, layer.adapter.scale) == (5, 2.0)
    assert layer.adapter.a.shape == (5, 6)


def test_weights_that_something_else_provides_are_used():
    layer, expected = make_layer(), make_layer()
    for module in (layer.base, layer.adapter):
        for name in list(module._parameters):
            # as sharding does while a layer runs: a plain tensor where the parameter was
            tensor = 2 * module._parameters.pop(name).detach()
            object.__setattr__(module, name, tensor)
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter *= 2
    assert torch.equal(layer(X), expected(X))


def test_a_fused_layer_reads_as_a_linear_layer():
    layer = make_layer(bias=False)
    assert (layer.in_features, layer.out_features, layer.bias) == (6, 8, None)
    assert layer.weight is layer.base.weight


def test_dropout_acts_in_training_only():
    layer = make_layer(lora_dropout=0.5)
    assert torch.equal(layer(X), layer(X))
    layer.train()
    assert not torch.equal(layer(X), layer(X))
    torch.manual_seed(3)
    first = layer(X)
    torch.manual_seed(3)
    assert torch.equal(layer(X), first)


def test_the_layer_takes_over_the_mode_of_its_base():
    assert not lo.FusedLoRALinear.from_linear(nn.Linear(6, 8).eval(), lo.LoRAConfig()).training
    assert lo.FusedLoRALinear.from_linear(nn.Linear(6, 8), lo.LoRAConfig()).training


def test_impl_reaches_the_operation():
    layer = make_layer()
    layer.impl = "reference"
    layer(X)
    layer.impl = "fast"
    with pytest.raises(ValueError, match="impl must be"):
        layer(X)


@pytest.mark.parametrize("clone", CLONES.values(), ids=CLONES)
@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
def test_copies_compute_the_same_and_merge_on_their_own(clone, merged):
    layer = make_layer()
    original = layer.weight.detach().clone()
    if merged:
        layer.merge()
    twin = clone(layer)
    assert torch.equal(twin(X), layer(X))
    assert twin.config == layer.config
    twin.merge()
    twin.unmerge()
    assert torch.equal(twin.weight, original)
    assert layer.merged == merged


@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
def test_a_state_dict_describes_the_unmerged_layer(merged):
    layer, other = make_layer(), stir(make_layer(), seed=9)
    expected = layer(X)
    if merged:
        layer.merge()
    state = layer.state_dict()
    assert set(state) == {"base.weight", "base.bias", "adapter.a", "adapter.b"}
    other.load_state_dict(state)
    assert torch.equal(other(X), expected)


def test_conversions_reach_base_and_adapter():
    layer = make_layer().half()
    assert {p.dtype for p in layer.parameters()} == {torch.float16}
    assert layer(X.half()).dtype == torch.float16
    assert make_layer().to(torch.float64)(X.double()).dtype == torch.float64


def test_autocast_computes_in_its_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        assert make_layer()(X).dtype == torch.bfloat16


def test_meta_layers_merge_and_unmerge():
    with torch.device("meta"):
        layer = lo.FusedLoRALinear.from_linear(nn.Linear(6, 8, dtype=torch.bfloat16), lo.LoRAConfig(r=3))
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    layer.merge()
    assert layer.merged
    layer.unmerge()
    assert layer.weight.is_meta
    assert layer.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_merging_rounds_once(dtype):
    layer = make_layer(dtype)
    weight, a, b = layer.weight.detach().double(), layer.adapter.a.double(), layer.adapter.b.double()
    truth = weight + layer.adapter.scale * (b @ a)
    layer.merge()
    error = (layer.weight.double() - truth).abs()
    unit = torch.finfo(dtype).eps / 2 * truth.abs()
    # sums of three products in float32 (or float64) come before the rounding
    summing = 4 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * truth.abs().max()
    assert (error <= unit + summing).all()


def test_merging_is_exact_under_autocast():
    layer, other = make_layer(), make_layer()
    layer.merge()
    with torch.autocast("cpu", torch.bfloat16):
        other.merge()
    assert torch.equal(layer.weight, other.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_unmerging_restores_the_bits(dtype):
    layer = make_layer(dtype)
    parameter, original = layer.weight, layer.weight.detach().clone()
    layer.merge()
    assert not torch.equal(layer.weight, original)
    layer.unmerge()
    assert torch.equal(layer.weight, original)
    assert layer.weight is parameter


def test_merging_twice_and_unmerging_twice_change_nothing():
    layer = make_layer()
    original = layer.weight.detach().clone()
    layer.unmerge()
    layer.merge()
    once = layer.weight.detach().clone()
    layer.merge()
    assert torch.equal(layer.weight, once)
    layer.unmerge()
    layer.unmerge()
    assert torch.equal(layer.weight, original)


def test_a_merged_layer_trains_nothing_and_drops_nothing():
    layer = make_layer(lora_dropout=0.5, bias=False)
    layer.merge()
    layer.train()
    assert torch.equal(layer(X), F.linear(X, layer.weight))
    assert not layer(X).requires_grad


def test_a_merge_that_overflows_leaves_the_layer_as_it_was():
    layer = make_layer(torch.float16)
    with torch.no_grad():
        layer.adapter.b.fill_(1e5)
    original = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="must be finite in torch.float16"):
        layer.merge()
    assert not layer.merged
    assert torch.equal(layer.weight, original)


def test_conversion_while_merged_converts_the_original_as_well():
    layer, plain = make_layer(), make_layer().half()
    layer.merge()
    layer.half()
    layer.unmerge()
    assert torch.equal(layer.weight, plain.weight)


def test_the_printed_layer_says_method_rank_and_scale():
    text = str(make_layer(lora_dropout=0.25))
    assert "method=lora, rank=3, scale=10.6667, dropout=0.25, impl=auto, merged=False" in text


@pytest.mark.parametrize("K", [0, 1])
def test_a_layer_of_nearly_no_inputs_works(K):
    linear = nn.Linear(1, 4)
    linear.weight = nn.Parameter(torch.zeros(4, K))
    linear.in_features = K
    layer = lo.FusedLoRALinear.from_linear(linear, lo.LoRAConfig(r=2))
    assert layer.adapter.a.shape == (2, K)
    layer.merge()

"""Merging, unmerging and ejecting whole models, with PEFT's merge as the oracle."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import (
    assert_untouched,
    fingerprint,
    injected_mlp,
    points,
    stir,
    tiny_llama,
    tiny_mlp,
    tokens,
)
from torch import nn

import lowrank_ops as lo
from lowrank_ops.testing import assert_as_accurate


def peft_twin(model, dtype):
    """Return a PEFT model with the adapters of ``model``, which was injected into ``tiny_mlp``."""
    config = LoraConfig(r=3, lora_alpha=32, target_modules="all-linear")
    wrapped = get_peft_model(tiny_mlp(dtype), config)
    for name in ("0", "2"):
        theirs, ours = wrapped.base_model.model.get_submodule(name), model.get_submodule(name).adapter
        theirs.lora_A["default"].weight.data = ours.a.data.clone()
        theirs.lora_B["default"].weight.data = ours.b.data.clone()
    return wrapped


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_merged_weights_are_as_accurate_as_those_of_peft(dtype):
    model = stir(lo.inject(tiny_mlp(dtype), lo.LoRAConfig(r=3)))
    truths = [
        layer.weight.double() + layer.adapter.scale * layer.adapter.b.double() @ layer.adapter.a.double()
        for layer in (model[0], model[2])
    ]
    theirs = peft_twin(model, dtype).merge_and_unload()
    lo.merge(model)
    for index, truth in zip((0, 2), truths, strict=True):
        assert_as_accurate(model[index].weight, theirs[index].weight, truth)


def test_a_merged_model_computes_what_it_did():
    model = stir(lo.inject(tiny_llama().double(), lo.LoRAConfig(r=3)))
    unmerged = model(tokens()).logits
    assert lo.merge(model) is model
    assert lo.report(model).merged == 14
    torch.testing.assert_close(model(tokens()).logits, unmerged)


def test_unmerging_restores_every_bit():
    model = injected_mlp()
    before = fingerprint(model)
    lo.merge(model)
    assert lo.unmerge(model) is model
    assert_untouched(before, model)


def test_merging_twice_and_unmerging_twice_change_nothing():
    model = injected_mlp()
    before = fingerprint(model)
    lo.unmerge(model)
    lo.merge(lo.merge(model))
    lo.unmerge(lo.unmerge(model))
    assert_untouched(before, model)


def test_a_merge_that_fails_half_way_is_taken_back():
    model = injected_mlp()
    model[2].adapter.b.data[0, 0] = float("inf")
    before = fingerprint(model)
    with pytest.raises(ValueError, match="weight of '2' must be finite"):
        lo.merge(model)
    assert_untouched(before, model)
    assert lo.report(model).merged == 0


def test_a_merge_that_fails_leaves_merged_layers_merged():
    model = injected_mlp()
    model[0].merge()
    model[2].adapter.b.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        lo.merge(model)
    assert model[0].merged
    assert not model[2].merged


def test_ejecting_gives_the_plain_model_back():
    plain, model = tiny_mlp(), injected_mlp()
    assert lo.eject(model) is model
    assert [type(module) for module in model] == [nn.Linear, nn.GELU, nn.Linear]
    assert torch.equal(model(points()), plain(points()))
    assert list(model.state_dict()) == list(plain.state_dict())


def test_ejecting_a_merged_model_keeps_the_update():
    model = injected_mlp()
    lo.merge(model)
    expected = model(points())
    assert torch.equal(lo.eject(model)(points()), expected)
    assert type(model[0]) is nn.Linear


def test_an_ejected_model_is_frozen_and_can_be_injected_again():
    model = lo.eject(injected_mlp())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert lo.report(lo.inject(model, lo.LoRAConfig())).layers == 2


def test_a_lone_fused_layer_merges_and_ejects():
    layer = lo.FusedLoRALinear.from_linear(nn.Linear(6, 8), lo.LoRAConfig())
    assert lo.merge(layer) is layer
    assert lo.eject(layer) is layer.base


def tied_llama():
    model = tiny_llama(tie_word_embeddings=True)
    return stir(lo.inject(model, lo.LoRAConfig(r=3, target_modules=["lm_head", "q_proj"])))


def test_merging_a_tied_head_leaves_the_embedding_alone():
    model = tied_llama().double()
    unmerged = model(tokens()).logits
    embedding = model.model.embed_tokens.weight.detach().clone()
    lo.merge(model)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    torch.testing.assert_close(model(tokens()).logits, unmerged)


@pytest.mark.parametrize("clone", [lambda model: model, copy.deepcopy], ids=["itself", "deepcopy"])
def test_unmerging_a_tied_head_ties_it_again(clone):
    model = clone(lo.merge(tied_llama()))
    lo.unmerge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.gpu
def test_the_original_of_a_gpu_weight_waits_in_host_memory():
    model = injected_mlp().cuda()
    before = model[0].weight.detach().clone()
    held = torch.cuda.memory_allocated()
    lo.merge(model)
    assert torch.cuda.memory_allocated() <= held
    assert torch.equal(lo.unmerge(model)[0].weight, before)
    assert model[0].weight.is_cuda


def test_adapters_train_on_after_unmerging():
    model = lo.unmerge(lo.merge(injected_mlp()))
    model(points()).square().sum().backward()
    assert model[0].adapter.a.grad.abs().max() > 0


def test_a_head_fused_by_hand_is_merged_beside_the_embedding_it_is_tied_to():
    model = tiny_llama(tie_word_embeddings=True)
    before = model.model.embed_tokens.weight.detach().clone()
    model.lm_head = stir(lo.FusedLoRALinear.from_linear(model.lm_head, lo.LoRAConfig(r=3)))
    lo.merge(model)
    assert torch.equal(model.model.embed_tokens.weight, before)
    assert not torch.equal(model.lm_head.weight, before)


def test_a_merged_model_loads_a_state_dict_and_stays_merged():
    model, other = injected_mlp(), stir(injected_mlp(), seed=9)
    with torch.no_grad():
        other[0].weight.add_(1)
    lo.merge(model).load_state_dict(other.state_dict())
    assert lo.report(model).merged == 2
    assert torch.equal(model(points()), lo.merge(other)(points()))
    for ours, theirs in zip(lo.unmerge(model).parameters(), lo.unmerge(other).parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_state_dict_that_cannot_be_merged_is_loaded_whole_and_named():
    model = lo.merge(injected_mlp())
    state = copy.deepcopy(model.state_dict())
    state["0.adapter.b"].fill_(torch.inf)
    with pytest.raises(RuntimeError, match="merge: weight must be finite .* the layer is now unmerged"):
        model.load_state_dict(state)
    assert [model[0].merged, model[2].merged] == [False, True]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

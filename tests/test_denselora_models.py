"""What copies, files, merging and other tools make of a model with DenseLoRA's shared adapters."""

import copy
import json
import pickle

import pytest
import torch
from dense_stack import BLOCKS, RANK, Stack, assert_shared, gradients, inputs, make_config, make_stack
from safetensors.torch import load_file, save_file
from tiny_models import assert_untouched, fingerprint, stir
from torch import nn

import lowrank_ops as lo


def used(model):
    """Return ``model`` after a forward pass whose graph it may still hold something of."""
    model(inputs(next(model.parameters()).dtype))
    return model


def to_other_memory(model):
    """Return a copy of ``model`` whose parameters were all made anew."""
    state = model.state_dict()
    with torch.device("meta"):
        fresh = copy.deepcopy(model).to("meta")
    fresh.to_empty(device="cpu").load_state_dict(state)
    return fresh


def assigned(model):
    fresh = lo.inject(Stack(dtype=torch.float64), make_config())
    fresh.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    return fresh


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "to_empty": to_other_memory,
    "assign": assigned,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_share_among_themselves_and_not_with_the_original(copied):
    model = used(make_stack())
    other = copied(model)
    assert_shared(other)
    mine, theirs = model.layers[0].q_proj.adapter, other.layers[0].q_proj.adapter
    assert mine.pair is not theirs.pair
    x = inputs()
    y = model(x)
    assert torch.equal(other(x), y)
    with torch.no_grad():
        theirs.encoder.zero_()
    assert torch.equal(model(x), y)
    assert not torch.equal(other(x), y)


def test_conversions_keep_the_layers_together():
    model = used(make_stack())
    pair = model.layers[0].q_proj.adapter.pair
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model.to(dtype)
        assert_shared(model)
        assert model.layers[1].q_proj.adapter.pair is pair
        gradient = gradients(model, inputs(dtype))["layers.0.q_proj.adapter.pair.encoder"]
        assert gradient.dtype is dtype
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("base", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_adapters_beside_a_sixteen_bit_base_are_float32(base):
    adapter = lo.FusedDenseLoRALinear.from_linear(nn.Linear(6, 7, dtype=base), make_config()).adapter
    expected = torch.float64 if base is torch.float64 else torch.float32
    assert {p.dtype for p in adapter.parameters()} == {expected}


def test_a_state_dict_round_trips_and_names_the_pair_in_every_layer():
    model, other = make_stack(), stir(make_stack(), seed=9)
    state = model.state_dict()
    assert sum(name.endswith("q_proj.adapter.pair.encoder") for name in state) == BLOCKS
    assert other.load_state_dict(state) == ([], [])
    assert_shared(other)
    assert torch.equal(other(inputs()), model(inputs()))


def test_the_file_holds_what_is_shared_once(tmp_path):
    model = used(make_stack(torch.float32))
    lo.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == lo.report(model).trainable
    fields = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert fields["shared"]["layers.3.q_proj.encoder"] == "layers.0.q_proj.encoder"
    assert len(fields["shared"]) == 3 * 2 * (BLOCKS - 1)
    assert fields["activation"] == "gelu"


@pytest.mark.parametrize("activation", ["gelu", None])
@pytest.mark.parametrize("is_injected", [False, True], ids=["plain", "injected"])
def test_a_loaded_model_shares_and_computes_the_same(activation, is_injected, tmp_path):
    model = make_stack(torch.float32, activation=activation, projections=["q_proj", "up_proj", "down_proj"])
    lo.save_adapter(model, tmp_path)
    other = lo.eject(copy.deepcopy(model))
    if is_injected:
        lo.inject(other, model.layers[0].q_proj.config)
    assert lo.load_adapter(other, tmp_path) is other
    assert_shared(other)
    assert other.layers[0].q_proj.config == model.layers[0].q_proj.config
    assert torch.equal(other(inputs(torch.float32)), model(inputs(torch.float32)))
    assert lo.report(other) == lo.report(model)
    before, after = (gradients(m, inputs(torch.float32)) for m in (model, other))
    assert all(torch.equal(after[name], before[name]) for name in before)


def damage(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def drop(tensors):
    del tensors["layers.0.q_proj.encoder"]


def reshape(tensors):
    tensors["layers.2.q_proj.core"] = torch.zeros(2, 2)


DAMAGES = {
    "must hold 'layers.0.q_proj.encoder', which 'layers.1.q_proj.encoder' shares, got none": drop,
    r"core of 'layers.2.q_proj' must be \(3, 3\), got \(2, 2\)": reshape,
}


@pytest.mark.parametrize(("message", "change"), DAMAGES.items(), ids=["lost", "shape"])
@pytest.mark.parametrize("is_injected", [False, True], ids=["plain", "injected"])
def test_a_broken_file_leaves_the_model_as_it_was(message, change, is_injected, tmp_path):
    lo.save_adapter(make_stack(torch.float32), tmp_path)
    damage(tmp_path, change)
    model = make_stack(torch.float32) if is_injected else Stack()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        lo.load_adapter(model, tmp_path)
    assert_untouched(before, model)


def test_a_file_whose_layers_disagree_about_what_they_share_is_refused(tmp_path):
    lo.save_adapter(make_stack(torch.float32), tmp_path)
    path = tmp_path / "adapter_config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    del fields["shared"]["layers.1.q_proj.encoder"]
    path.write_text(json.dumps(fields), encoding="utf-8")
    damage(tmp_path, lambda tensors: tensors.update({"layers.1.q_proj.encoder": torch.ones(3, 6)}))
    model = Stack()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="encoder of 'layers.1.q_proj' must be that of 'layers.0.q_proj'"):
        lo.load_adapter(model, tmp_path)
    assert_untouched(before, model)


def test_a_file_of_another_activation_is_refused(tmp_path):
    lo.save_adapter(make_stack(activation=None), tmp_path)
    model = make_stack()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="model must have the config of the files, .*activation=None"):
        lo.load_adapter(model, tmp_path)
    assert_untouched(before, model)


def test_merging_a_model_with_an_activation_is_refused_and_changes_nothing():
    model = make_stack()
    before, y = fingerprint(model), model(inputs())
    with pytest.raises(ValueError, match=r"merge: weight of 'layers.0.q_proj' .* linear in x, got .*'gelu'"):
        lo.merge(model)
    assert_untouched(before, model)
    assert lo.report(model).merged == 0
    assert torch.equal(model(inputs()), y)


def test_a_model_without_an_activation_merges_and_unmerges():
    model = make_stack(activation=None)
    before, y = fingerprint(model), model(inputs())
    assert lo.merge(model) is model
    assert lo.report(model).merged == 3 * BLOCKS
    torch.testing.assert_close(model(inputs()), y)
    plain = lo.eject(copy.deepcopy(model))
    assert type(plain.layers[0].q_proj) is nn.Linear
    assert torch.equal(plain(inputs()), model(inputs()))
    lo.unmerge(model)
    assert_untouched(before, model)


def test_an_ejected_model_is_plain_again():
    torch.manual_seed(0)
    base = Stack(dtype=torch.float64)
    model = lo.eject(stir(lo.inject(copy.deepcopy(base), make_config())))
    assert torch.equal(model(inputs()), base(inputs()))
    assert list(model.state_dict()) == list(base.state_dict())


def test_a_layer_says_what_it_is():
    layer = make_stack(lora_dropout=0.25).layers[0].q_proj
    assert f"method=denselora, rank={RANK}, scale=2, dropout=0.25" in repr(layer)
    assert f"activation=gelu, sharing={BLOCKS}" in repr(layer)

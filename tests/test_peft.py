"""PEFT as the independent oracle: outputs, every gradient, and models taken over from it."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import assert_untouched, fingerprint, points, stir, tiny_llama, tiny_mlp, tokens
from torch import nn

import lowrank_ops as lo

DTYPES = [torch.float32, torch.float64]


def peft_llama(dtype=torch.float32, **options):
    options = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", **options}
    wrapped = get_peft_model(tiny_llama(attention_bias=True).to(dtype), LoraConfig(**options))
    return stir(wrapped).eval()


def peft_mlp(dtype=torch.float32, **options):
    options = {"r": 3, "target_modules": "all-linear", **options}
    return stir(get_peft_model(tiny_mlp(dtype), LoraConfig(**options))).eval()


def gradients(model, **names):
    """Return the gradient of a loss for every parameter that trains, under PEFT's names."""
    model.zero_grad()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").replace(".default.weight", "")
            for ours, theirs in (("adapter.a", "lora_A"), ("adapter.b", "lora_B"), ("base.", "base_layer.")):
                name = name.replace(ours, theirs)
            found[name] = parameter.grad.clone()
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_outputs_and_every_gradient_are_those_of_peft(dtype, bias):
    theirs = peft_llama(dtype, bias=bias)
    logits, expected = theirs(tokens()).logits, gradients(theirs)
    ours = lo.from_peft(theirs)
    torch.testing.assert_close(ours(tokens()).logits, logits)
    actual = gradients(ours)
    assert actual.keys() == expected.keys()
    assert len(actual) >= 28
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("base", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [True, False], ids=["float32 adapters", "16-bit adapters"])
def test_adapters_keep_their_dtype(base, autocast):
    config = LoraConfig(r=3, target_modules="all-linear")
    wrapped = get_peft_model(tiny_mlp(base), config, autocast_adapter_dtype=autocast)
    ours = lo.from_peft(stir(wrapped))
    expected = torch.float32 if autocast else base
    assert {p.dtype for p in ours[0].adapter.parameters()} == {expected}
    assert ours(points(base)).dtype == base


def test_parameters_are_taken_over_and_an_optimizer_stays_valid():
    theirs = peft_mlp()
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.1)
    a = theirs.base_model.model[0].lora_A["default"].weight
    ours = lo.from_peft(theirs)
    assert ours[0].adapter.a is a
    before = a.detach().clone()
    ours(points()).square().sum().backward()
    optimizer.step()
    assert not torch.equal(ours[0].adapter.a, before)


def test_what_trains_and_the_mode_stay_as_they_are():
    theirs = peft_mlp(lora_dropout=0.5).train()
    theirs.base_model.model[0].lora_A["default"].weight.requires_grad_(False)
    ours = lo.from_peft(theirs)
    trains = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert trains == {"0.adapter.b", "2.adapter.a", "2.adapter.b"}
    assert ours[0].training
    assert ours[0].dropout_p == 0.5


def test_dropout_that_was_changed_by_hand_is_kept():
    theirs = peft_mlp(lora_dropout=0.5)
    for module in theirs.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert lo.from_peft(theirs)[0].dropout_p == 0.0


def test_scales_that_were_changed_by_hand_are_kept_and_written(tmp_path):
    theirs = peft_mlp(rank_pattern={"2": 5})
    theirs.base_model.model[0].set_scale("default", 3)
    expected = theirs(points())
    ours = lo.from_peft(theirs)
    torch.testing.assert_close(ours(points()), expected)
    lo.save_adapter(ours, tmp_path)
    torch.testing.assert_close(lo.load_adapter(tiny_mlp(), tmp_path)(points()), expected)


def test_the_active_adapter_is_taken_and_others_are_dropped():
    theirs = peft_mlp()
    theirs.add_adapter("second", LoraConfig(r=2, target_modules=["0"]))
    theirs.set_adapter("second")
    stir(theirs, seed=6)
    expected = theirs(points())
    ours = lo.from_peft(theirs)
    assert type(ours[2]) is nn.Linear
    assert ours[0].adapter.rank == 2
    torch.testing.assert_close(ours(points()), expected)


def test_a_model_taken_over_is_written_as_peft_would(tmp_path):
    options = {"bias": "lora_only", "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
    theirs = peft_llama(lora_dropout=0.25, **options)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lo.from_peft(theirs)
    lo.save_adapter(ours, tmp_path / "ours")
    files = [tmp_path / name / "adapter_config.json" for name in ("ours", "theirs")]
    written, expected = (json.loads(file.read_text()) for file in files)
    for fields in (written, expected):
        fields["target_modules"].sort()
    assert written == {name: expected[name] for name in written}
    tensors, wanted = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("ours", "theirs"))
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)


def test_the_base_model_forgets_peft():
    ours = lo.from_peft(peft_llama())
    assert not hasattr(ours, "peft_config")
    lo.eject(ours)
    get_peft_model(ours, LoraConfig(target_modules="all-linear"))


def two_active():
    model = peft_mlp()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["0"]))
    model.base_model.set_adapter(["default", "second"])
    return model


def merged():
    model = peft_mlp()
    model.merge_adapter()
    return model


def disabled():
    model = peft_mlp()
    model.base_model.disable_adapter_layers()
    return model


def odd_dtype():
    model = peft_mlp()
    model.base_model.model[0].lora_A["default"].half()
    return model


def embedding():
    return get_peft_model(tiny_llama(), LoraConfig(r=3, target_modules=["embed_tokens"]))


def subclass():
    class Scaled(nn.Linear):
        pass

    return get_peft_model(nn.Sequential(Scaled(6, 8)), LoraConfig(r=3, target_modules=["0"]))


def hooked():
    model = peft_mlp()
    model.base_model.model[0].register_forward_hook(lambda *args: None)
    return model


REFUSED = {
    "two active": (two_active, ValueError, "must have one active adapter, got 2"),
    "merged": (merged, ValueError, "layer '0' must not be merged"),
    "disabled": (disabled, ValueError, "layer '0' must be enabled"),
    "dora": (lambda: peft_mlp(use_dora=True), NotImplementedError, "plain LoRA, got DoraLinearVariant"),
    "lora bias": (lambda: peft_mlp(lora_bias=True), NotImplementedError, "plain LoRA, got lora_bias"),
    "whole modules": (
        lambda: peft_mlp(target_modules=["0"], modules_to_save=["2"]),
        NotImplementedError,
        "modules_to_save must be off",
    ),
    "changed base": (lambda: peft_mlp(init_lora_weights="pissa"), NotImplementedError, "init_lora_weights"),
    "dtype": (odd_dtype, TypeError, "lora_A of '0' must be torch.float32, got torch.float16"),
    "embedding": (embedding, TypeError, "must be PEFT's lora.Linear, got Embedding"),
    "subclass": (subclass, TypeError, "base of layer '0' must be a plain nn.Linear, got Scaled"),
    "hooks": (hooked, ValueError, "layer '0' must have no hooks"),
}


@pytest.mark.parametrize(("make", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_plain_lora_is_refused_and_left_as_it_was(make, kind, message):
    model = make()
    before = fingerprint(model)
    with pytest.raises(kind, match=message) as caught:
        lo.from_peft(model)
    assert str(caught.value).startswith("from_peft: ")
    assert_untouched(before, model)

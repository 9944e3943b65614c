"""Adapter files in PEFT's format, both ways, and that no failure leaves anything half done."""

import json
import os
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
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

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
OPTIONS = {
    "defaults": {},
    "suffixes": {"target_modules": ["q_proj", "down_proj"]},
    "regex": {"target_modules": r".*\.1\.self_attn\.(q|k)_proj"},
    "rslora": {"use_rslora": True, "r": 5},
    "patterns": {"rank_pattern": {"^model.layers.0.*": 2, "q_proj": 7}, "alpha_pattern": {"up_proj": 4.5}},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only", "target_modules": ["v_proj"]},
    "dropout": {"lora_dropout": 0.25},
}


def biased_llama():
    return tiny_llama(attention_bias=True)


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def edit(folder, **fields):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_peft_reads_what_we_write(options, tmp_path):
    model = stir(lo.inject(biased_llama(), lo.LoRAConfig(**{"r": 3, **options})))
    lo.save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(biased_llama(), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model))
    assert not torch.equal(logits(model), logits(biased_llama()))
    for name in ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "rank_pattern", "alpha_pattern"):
        expected = getattr(lo.LoRAConfig(**{"r": 3, **options}), name)
        assert getattr(theirs.peft_config["default"], name) == expected


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_we_read_what_peft_writes(options, tmp_path):
    options = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", **options}
    theirs = stir(get_peft_model(biased_llama(), LoraConfig(**options)))
    theirs.eval().save_pretrained(tmp_path)
    model = lo.load_adapter(biased_llama(), tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs))
    assert not torch.equal(logits(model), logits(biased_llama()))
    bias_trains = options.get("bias", "none") != "none"
    assert model.model.layers[1].self_attn.v_proj.bias.requires_grad == bias_trains


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_saved_model_loads_here_bit_for_bit(options, tmp_path):
    model = stir(lo.inject(biased_llama(), lo.LoRAConfig(**{"r": 3, **options})))
    lo.save_adapter(model, tmp_path)
    before = torch.get_rng_state()
    loaded = lo.load_adapter(biased_llama(), tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(logits(loaded), logits(model))
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == trains
    ours, again = (
        next(module.config for module in each.modules() if isinstance(module, lo.FusedLoRALinear))
        for each in (model, loaded)
    )
    if ours.target_modules != "all-linear":
        assert again == ours
    lo.save_adapter(loaded, tmp_path / "again")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_an_injected_model_is_filled(tmp_path):
    saved, model = injected_mlp(bias="all"), stir(injected_mlp(bias="all"), seed=7)
    lo.save_adapter(saved, tmp_path)
    parameter = model[0].adapter.a
    assert lo.load_adapter(model, tmp_path) is model
    assert torch.equal(model(points()), saved(points()))
    assert model[0].adapter.a is parameter


def test_filling_keeps_frozen_adapters_frozen_and_dropout_as_it_is(tmp_path):
    lo.save_adapter(injected_mlp(), tmp_path)
    model = injected_mlp(lora_dropout=0.5).requires_grad_(False)
    lo.load_adapter(model, tmp_path)
    assert not any(p.requires_grad for p in model.parameters())
    assert model[0].dropout_p == 0.5


@pytest.mark.parametrize("base", [torch.float16, torch.bfloat16], ids=str)
def test_tensors_keep_their_dtype_on_disk_and_take_that_of_the_adapter_when_read(base, tmp_path):
    model = stir(lo.inject(tiny_mlp(base), lo.LoRAConfig(r=3)))
    lo.save_adapter(model, tmp_path / "float32")
    lo.save_adapter(model.to(base), tmp_path / "half")
    assert {t.dtype for t in load_file(tmp_path / "float32" / WEIGHTS).values()} == {torch.float32}
    assert {t.dtype for t in load_file(tmp_path / "half" / WEIGHTS).values()} == {base}
    loaded = lo.load_adapter(tiny_mlp(base), tmp_path / "half")
    assert loaded[0].adapter.a.dtype == torch.float32
    assert torch.equal(loaded[0].adapter.a, model[0].adapter.a.float())


def test_a_merged_model_saves_the_same_files(tmp_path):
    model = injected_mlp()
    lo.save_adapter(model, tmp_path / "unmerged")
    lo.save_adapter(lo.merge(model), tmp_path / "merged")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "unmerged" / name).read_bytes()


def test_names_that_end_alike_are_told_apart_in_peft(tmp_path):
    def plain():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.ReLU(), nn.Linear(6, 6)))

    model = stir(lo.inject(plain(), lo.LoRAConfig(r=3)))
    lo.save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(plain(), tmp_path)
    torch.testing.assert_close(theirs(points()), model(points()))


def test_ranks_and_scales_set_by_hand_are_written_as_patterns(tmp_path):
    model = injected_mlp()
    model[2].adapter.scale = 0.125
    lo.save_adapter(model, tmp_path)
    assert lo.load_adapter(tiny_mlp(), tmp_path)[2].adapter.scale == 0.125
    theirs = PeftModel.from_pretrained(tiny_mlp(), tmp_path)
    torch.testing.assert_close(theirs(points()), model(points()))


def test_the_origin_of_an_adapter_is_kept(tmp_path):
    lo.save_adapter(injected_mlp(), tmp_path / "one")
    edit(tmp_path / "one", base_model_name_or_path="someone/base", task_type="CAUSAL_LM", revision="main")
    lo.save_adapter(lo.load_adapter(tiny_mlp(), tmp_path / "one"), tmp_path / "two")
    fields = json.loads((tmp_path / "two" / CONFIG).read_text())
    assert fields["base_model_name_or_path"] == "someone/base"
    assert fields["task_type"] == "CAUSAL_LM"
    assert fields["revision"] == "main"
    assert fields["inference_mode"] is True


def test_the_name_of_a_transformers_model_is_recorded(tmp_path):
    model = tiny_llama()
    model.name_or_path = "someone/llama"
    lo.save_adapter(lo.inject(model, lo.LoRAConfig(r=3)), tmp_path)
    fields = json.loads((tmp_path / CONFIG).read_text())
    assert fields["base_model_name_or_path"] == "someone/llama"
    assert fields["auto_mapping"]["base_model_class"] == "LlamaForCausalLM"


@pytest.mark.parametrize(
    "narrowed",
    [
        {"exclude_modules": ["k_proj"], "target_modules": ["k_proj", "q_proj"]},
        {"layers_to_transform": [1], "target_modules": ["q_proj"]},
    ],
    ids=["exclude_modules", "layers_to_transform"],
)
def test_targets_that_peft_narrows_are_read_from_the_tensors(narrowed, tmp_path):
    theirs = stir(get_peft_model(tiny_llama(), LoraConfig(r=3, **narrowed))).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = lo.load_adapter(tiny_llama(), tmp_path / "theirs")
    torch.testing.assert_close(logits(model), logits(theirs))
    lo.save_adapter(model, tmp_path / "ours")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours")
    torch.testing.assert_close(logits(again), logits(theirs))


def test_an_older_pickle_is_read_without_running_code(tmp_path):
    model = injected_mlp()
    lo.save_adapter(model, tmp_path)
    torch.save(load_file(tmp_path / WEIGHTS), tmp_path / PICKLE)
    (tmp_path / WEIGHTS).unlink()
    assert torch.equal(lo.load_adapter(tiny_mlp(), tmp_path)(points()), model(points()))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("made-by-a-pickle",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lo.save_adapter(injected_mlp(), tmp_path)
    (tmp_path / WEIGHTS).unlink()
    torch.save({"base_model.model.0.lora_A.weight": Evil()}, tmp_path / PICKLE)
    with pytest.raises(ValueError, match=f"{PICKLE} must be a complete file of tensors"):
        lo.load_adapter(tiny_mlp(), tmp_path)
    assert not (tmp_path / "made-by-a-pickle").exists()


def test_nan_is_read_as_it_is(tmp_path):
    model = injected_mlp()
    model[0].adapter.a.data[0, 0] = float("nan")
    lo.save_adapter(model, tmp_path)
    assert lo.load_adapter(tiny_mlp(), tmp_path)[0].adapter.a[0, 0].isnan()


def test_a_meta_model_reads_shapes(tmp_path):
    lo.save_adapter(injected_mlp(), tmp_path)
    assert lo.load_adapter(tiny_mlp().to("meta"), tmp_path)[0].adapter.a.is_meta


def test_a_compiled_model_writes_its_own_names(tmp_path):
    model = injected_mlp()
    lo.save_adapter(torch.compile(model, backend="eager"), tmp_path)
    loaded = lo.load_adapter(torch.compile(tiny_mlp(), backend="eager"), tmp_path)
    assert torch.equal(loaded._orig_mod(points()), model(points()))


def test_an_interrupted_save_keeps_the_earlier_adapter(tmp_path, monkeypatch):
    first, second = injected_mlp(), stir(injected_mlp(), seed=9)
    lo.save_adapter(first, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        lo.save_adapter(second, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_save_replaces_an_earlier_adapter_and_leaves_two_files(tmp_path):
    lo.save_adapter(injected_mlp(), tmp_path / "new" / "folder")
    second = stir(injected_mlp(), seed=9)
    lo.save_adapter(second, tmp_path / "new" / "folder")
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {CONFIG, WEIGHTS}
    assert torch.equal(lo.load_adapter(tiny_mlp(), tmp_path / "new" / "folder")(points()), second(points()))


def drop(key):
    def change(folder):
        tensors = load_file(folder / WEIGHTS)
        del tensors[key]
        save_file(tensors, folder / WEIGHTS)

    return change


def put(key, tensor):
    return lambda folder: save_file({**load_file(folder / WEIGHTS), key: tensor}, folder / WEIGHTS)


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def drop_layer(folder):
    drop("base_model.model.2.lora_A.weight")(folder)
    drop("base_model.model.2.lora_B.weight")(folder)


def add_layer(folder):
    put("base_model.model.7.lora_A.weight", torch.zeros(3, 6))(folder)
    put("base_model.model.7.lora_B.weight", torch.zeros(8, 3))(folder)


A0, A2 = "base_model.model.0.lora_A.weight", "base_model.model.2.lora_A.weight"
BROKEN = {
    "no folder": (shutil.rmtree, "folder must be a directory"),
    "no config": (lambda f: (f / CONFIG).unlink(), "folder must hold adapter_config.json"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "folder must hold adapter_model.safetensors or"),
    "cut header": (cut(WEIGHTS, 20), "adapter_model.safetensors must be a complete file"),
    "cut data": (cut(WEIGHTS, -8), "adapter_model.safetensors must be a complete file"),
    "empty weights": (cut(WEIGHTS, 0), "adapter_model.safetensors must be a complete file"),
    "garbage": (write(WEIGHTS, bytes(range(256)) * 9), "adapter_model.safetensors must be a complete file"),
    "cut config": (cut(CONFIG, 50), "adapter_config.json must be JSON"),
    "binary config": (write(CONFIG, b"\xff\xfe\x00"), "adapter_config.json must be JSON"),
    "list config": (write(CONFIG, b"[]"), "adapter_config.json must hold a JSON object, got list"),
    "kind": (lambda f: edit(f, peft_type="IA3"), "peft_type must be \"LORA\", got 'IA3'"),
    "no kind": (lambda f: edit(f, peft_type=None), 'peft_type must be "LORA", got None'),
    "dora": (lambda f: edit(f, use_dora=True), "use_dora must be off, got True"),
    "lora bias": (lambda f: edit(f, lora_bias=True), "lora_bias must be off"),
    "transposed": (lambda f: edit(f, fan_in_fan_out=True), "fan_in_fan_out must be off"),
    "whole modules": (lambda f: edit(f, modules_to_save=["0"]), "modules_to_save must be off"),
    "changed base": (lambda f: edit(f, init_lora_weights="pissa_niter_4"), "init_lora_weights must leave"),
    "rank type": (lambda f: edit(f, r="3"), "options must be valid, got LoRAConfig: r must be an int"),
    "rank range": (lambda f: edit(f, r=0), "options must be valid, got LoRAConfig: r must be in 1..512"),
    "rank": (lambda f: edit(f, r=4), r"lora_A and lora_B of '0' must have the config's rank 4, got \(3, 6\)"),
    "null rank": (lambda f: edit(f, r=None), "LoRAConfig: r must be an int, got NoneType"),
    "null scale": (lambda f: edit(f, lora_alpha=None), "lora_alpha must be a number, got NoneType"),
    "targets": (lambda f: edit(f, target_modules=["zz"]), "target_modules must select all layers of the"),
    "shape": (put(A2, torch.zeros(3, 9)), r"lora_A of '2' must be \(R, K\) = \(3, 8\), got \(3, 9\)"),
    "integers": (put(A2, torch.zeros(3, 8, dtype=torch.int32)), "must be floating point, got torch.int32"),
    "half a pair": (drop(A0), "must hold lora_A and lora_B of '0', got lora_B alone"),
    "a layer less": (drop_layer, "got layers where it lacks '2'"),
    "a layer more": (add_layer, "target_modules must select all layers of the adapter, got not '7'"),
    "another tensor": (put("base_model.model.0.weight", torch.zeros(1)), "must hold lora_A, lora_B and"),
    "embedding": (put("base_model.model.0.lora_embedding_A", torch.zeros(1)), "must be plain LoRA, got"),
    "a bias more": (put("base_model.model.0.base_layer.bias", torch.zeros(8)), "where it adds '0.bias'"),
    "biases missing": (lambda f: edit(f, bias="all"), "lacks '0.bias' and 1 more|bias must be 'none' as in"),
    "no tensors": (lambda f: save_file({}, f / WEIGHTS), "must hold lora_A and lora_B of a layer, got none"),
}


REFUSALS = (ValueError, TypeError, FileNotFoundError, NotImplementedError)


@pytest.mark.parametrize("make", [tiny_mlp, lambda: stir(injected_mlp(), seed=5)], ids=["plain", "injected"])
@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_adapter_is_named_and_leaves_the_model_as_it_was(change, message, make, tmp_path):
    lo.save_adapter(injected_mlp(target_modules=["0", "2"]), tmp_path / "adapter")
    change(tmp_path / "adapter")
    model = make()
    before = fingerprint(model)
    with pytest.raises(REFUSALS, match=message) as caught:
        lo.load_adapter(model, tmp_path / "adapter")
    assert str(caught.value).startswith("load_adapter: ")
    assert_untouched(before, model)


MISFITS = {
    "rank": (lambda: injected_mlp(r=4), "rank of '0' must be 4 as in the model, got 3"),
    "scale": (lambda: injected_mlp(lora_alpha=6), "scale of '0' must be 2.0 as in the model, got 10.66"),
    "layers": (lambda: injected_mlp(target_modules=["0"]), "got layers where it adds '2'"),
    "bias": (lambda: injected_mlp(bias="all"), "bias must be 'all' as in the model, got 'none'"),
    "merged": (lambda: lo.merge(injected_mlp()), "layer '0' must not be merged"),
    "PEFT": (
        lambda: get_peft_model(tiny_mlp(), LoraConfig(target_modules="all-linear")).base_model.model,
        "got PEFT's Linear at '0'; use from_peft",
    ),
    "class": (lambda: nn.Sequential(nn.Bilinear(6, 1, 8), nn.GELU(), nn.Linear(8, 5)), "got Bilinear"),
    "hooks": (lambda: hook(tiny_mlp()), "must have no hooks"),
}


def hook(model):
    model[2].register_forward_hook(lambda *args: None)
    return model


@pytest.mark.parametrize(("make", "message"), MISFITS.values(), ids=MISFITS)
def test_a_model_that_does_not_fit_is_left_as_it_was(make, message, tmp_path):
    lo.save_adapter(injected_mlp(), tmp_path)
    model = make()
    before = fingerprint(model)
    with pytest.raises((ValueError, TypeError), match=message):
        lo.load_adapter(model, tmp_path)
    assert_untouched(before, model)


def test_unknown_options_are_named_in_a_warning(tmp_path):
    lo.save_adapter(injected_mlp(), tmp_path)
    edit(tmp_path, use_magic=True)
    with pytest.warns(UserWarning, match="options use_magic are not known"):
        lo.load_adapter(tiny_mlp(), tmp_path)

"""Adapter folders: both files or neither, and the base weights that PEFT puts beside an adapter."""

import json
import os

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import assert_untouched, fingerprint, injected_mlp, stir, tiny_llama, tokens

import lowrank_ops as lo

CONFIG = "adapter_config.json"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


@pytest.mark.parametrize("injected", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("save_embedding_layers", ["auto", True])
def test_an_adapter_on_the_head_is_read_as_peft_writes_it(tied, injected, save_embedding_layers, tmp_path):
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "lm_head"])
    theirs = stir(get_peft_model(tiny_llama(tie_word_embeddings=tied), config)).eval()
    theirs.save_pretrained(tmp_path, save_embedding_layers=save_embedding_layers)
    model = tiny_llama(tie_word_embeddings=tied)
    if injected:
        lo.inject(model, lo.LoRAConfig(r=3, lora_alpha=6, target_modules=["q_proj", "lm_head"]))
    lo.load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs))
    assert not torch.equal(logits(model), logits(tiny_llama(tie_word_embeddings=tied)))


def test_base_weights_are_compared_in_the_coarser_dtype(tmp_path):
    theirs = get_peft_model(tiny_llama(), LoraConfig(r=3, target_modules=["lm_head"]))
    theirs.save_pretrained(tmp_path)
    assert lo.report(lo.load_adapter(tiny_llama().bfloat16(), tmp_path)).layers == 1


def test_an_adapter_of_another_base_is_refused(tmp_path):
    get_peft_model(tiny_llama(), LoraConfig(r=3, target_modules=["lm_head"])).save_pretrained(tmp_path)
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    before = fingerprint(model)
    with pytest.raises(ValueError, match="^load_adapter: model must have the base .* weight of 'lm_head'$"):
        lo.load_adapter(model, tmp_path)
    assert_untouched(before, model)


def test_all_linear_does_not_select_the_head(tmp_path):
    get_peft_model(tiny_llama(), LoraConfig(r=3, target_modules=["lm_head"])).save_pretrained(tmp_path)
    path = tmp_path / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": "all-linear"}))
    with pytest.raises(ValueError, match="load_adapter: adapter must fit the model"):
        lo.load_adapter(tiny_llama(), tmp_path)


def test_a_directory_in_the_place_of_a_file_is_named_before_anything_is_written(tmp_path):
    lo.save_adapter(injected_mlp(), tmp_path)
    (tmp_path / CONFIG).unlink()
    (tmp_path / CONFIG).mkdir()
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="save_adapter: adapter_config.json must be a file or absent"):
        lo.save_adapter(stir(injected_mlp(), seed=9), tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("earlier", [False, True])
def test_a_rename_that_fails_takes_the_first_one_back(earlier, tmp_path, monkeypatch):
    if earlier:
        lo.save_adapter(injected_mlp(), tmp_path)
    before, replace = contents(tmp_path), os.replace

    def refuse(source, target):
        if str(target).endswith(CONFIG):
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    sentence = "^save_adapter: folder must be a directory that can be written, got .*Permission denied"
    with pytest.raises(PermissionError, match=sentence) as caught:
        lo.save_adapter(stir(injected_mlp(), seed=9), tmp_path)
    assert caught.value.errno == 13
    assert contents(tmp_path) == before

"""Injection into whole models: what is replaced, what trains, and that a failure changes nothing."""

import copy
import pickle

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
from transformers import LlamaConfig, LlamaForCausalLM

import lowrank_ops as lo


def fused_names(model):
    return {name for name, module in model.named_modules() if isinstance(module, lo.FusedLoRALinear)}


def peft_names(model, **options):
    wrapped = get_peft_model(model, LoraConfig(r=3, **options)).base_model.model
    return {name for name, module in wrapped.named_modules() if hasattr(module, "lora_A")}


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    "targets",
    ["all-linear", ["q_proj", "v_proj"], {"layers.1.mlp.up_proj"}, r".*\.1\..*(gate|down)_proj", ["lm_head"]],
    ids=str,
)
def test_targets_are_those_of_peft(targets):
    model = lo.inject(tiny_llama(), lo.LoRAConfig(r=3, target_modules=targets))
    listed = list(targets) if isinstance(targets, set) else targets
    assert fused_names(model) == peft_names(tiny_llama(), target_modules=listed)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_the_same_biases_train_as_in_peft(bias):
    model = lo.inject(tiny_llama(attention_bias=True), lo.LoRAConfig(target_modules=["q_proj"], bias=bias))
    wrapped = get_peft_model(
        tiny_llama(attention_bias=True), LoraConfig(target_modules=["q_proj"], bias=bias)
    ).base_model.model
    names = {n.replace("base_layer", "base") for n in trainable(wrapped) if n.endswith("bias")}
    assert {n for n in trainable(model) if n.endswith("bias")} == names


def test_only_the_adapters_train():
    model = lo.inject(tiny_llama(), lo.LoRAConfig(r=3))
    assert all(".adapter." in name for name in trainable(model))
    assert len(trainable(model)) == 2 * 7 * 2


def test_an_injected_model_computes_what_it_did_and_is_the_same_object():
    model = tiny_llama()
    before = model(tokens()).logits
    assert lo.inject(model, lo.LoRAConfig()) is model
    assert torch.equal(model(tokens()).logits, before)


def test_ranks_and_scales_follow_the_patterns_as_in_peft():
    options = {"r": 4, "lora_alpha": 6, "use_rslora": True}
    options |= {"rank_pattern": {"layers.0.*q_proj": 2, "up_proj": 8}, "alpha_pattern": {r"v_proj": 3.5}}
    model = lo.inject(tiny_llama(), lo.LoRAConfig(**options))
    config = LoraConfig(target_modules="all-linear", **options)
    wrapped = get_peft_model(tiny_llama(), config).base_model.model
    for name in fused_names(model):
        ours, theirs = model.get_submodule(name).adapter, wrapped.get_submodule(name)
        assert ours.rank == theirs.r["default"]
        assert ours.scale == theirs.scaling["default"]


def test_a_pattern_that_matches_nothing_is_named_in_a_warning():
    with pytest.warns(UserWarning, match="rank_pattern has 'q_prj'"):
        lo.inject(tiny_mlp(), lo.LoRAConfig(rank_pattern={"q_prj": 2}))


def test_gradients_reach_the_adapters_only():
    model = injected_mlp(lora_dropout=0.5).train()
    model(points()).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trainable(model)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_an_injected_model_know_their_config(clone):
    model = injected_mlp(rank_pattern={"0": 2})
    twin = clone(model)
    assert torch.equal(twin(points()), model(points()))
    assert twin[0].config == model[0].config
    assert str(lo.report(twin)) == str(lo.report(model))


def test_a_state_dict_round_trips():
    model, other = injected_mlp(), stir(injected_mlp(), seed=8)
    assert other.load_state_dict(model.state_dict()) == ([], [])
    assert torch.equal(other(points()), model(points()))


class Shared(nn.Module):
    """One linear layer under two names, and a second layer that shares its weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = self.first
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.first.weight

    def forward(self, x):
        return self.tied(self.again(self.first(x)))


@pytest.mark.parametrize("targets", ["all-linear", ["again", "tied"]], ids=str)
def test_a_module_under_two_names_becomes_one_fused_layer(targets):
    model = lo.inject(Shared(), lo.LoRAConfig(r=3, target_modules=targets))
    assert model.first is model.again
    assert isinstance(model.first, lo.FusedLoRALinear)
    assert model.tied.weight is model.first.weight
    assert lo.report(model).layers == 2


def test_a_shared_parent_is_injected_once():
    block = tiny_mlp()
    model = lo.inject(nn.ModuleList([block, block]), lo.LoRAConfig(r=3))
    assert model[0] is model[1]
    assert lo.report(model).layers == 2


def test_all_linear_takes_plain_linear_layers_only():
    class Scaled(nn.Linear):
        pass

    layers = {"plain": nn.Linear(6, 6), "other": Scaled(6, 6), "attention": nn.MultiheadAttention(6, 2)}
    model = nn.ModuleDict(layers)
    lo.inject(model, lo.LoRAConfig(r=3))
    assert fused_names(model) == {"plain"}


def test_a_compiled_model_is_injected_under_its_own_names():
    model = torch.compile(tiny_mlp(), backend="eager")
    lo.inject(model, lo.LoRAConfig(r=3, rank_pattern={"^0": 2}))
    assert model._orig_mod[0].adapter.rank == 2
    assert model(points()).shape == (4, 5)


def test_an_injected_model_compiles_without_graph_breaks():
    # a second scale makes the compiler treat it as a variable
    for alpha in (32, 7):
        model = injected_mlp(lora_alpha=alpha, lora_dropout=0.5)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(points()), model(points()))


def test_a_layer_of_an_encoder_is_taken_where_its_fast_path_is_off():
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    was_on = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        stir(lo.inject(layer, lo.LoRAConfig(r=3)).eval())
        x = points()[None]
        with torch.no_grad():
            adapted = layer(x)
            assert not torch.equal(adapted, lo.eject(layer)(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(was_on)


def llama_8b(dtype=torch.bfloat16):
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=32, num_key_value_heads=8)).to(dtype)


@pytest.mark.parametrize(("r", "trains"), [(16, 41_943_040), (32, 83_886_080)])
def test_an_8b_model_is_planned_on_meta(r, trains):
    model = lo.inject(llama_8b(), lo.LoRAConfig(r=r))
    report = lo.report(model)
    assert report.trainable == trains
    assert report.total == 8_030_261_248 + trains
    assert report.share == trains / report.total
    assert (report.layers, report.ranks, report.method, report.impl) == (224, {r: 224}, "lora", "auto")
    assert model.model.layers[0].mlp.up_proj.adapter.a.dtype == torch.float32
    lo.eject(lo.merge(model))
    assert lo.report(model).total == 8_030_261_248


def test_a_report_counts_tied_parameters_once():
    model = lo.inject(Shared(), lo.LoRAConfig(r=3))
    assert lo.report(model).total == 36 + 6 + 6 + 2 * 3 * 12
    assert lo.report(model).trainable == 2 * 3 * 12


def test_a_report_fits_one_screen():
    model = injected_mlp(rank_pattern={"2": 2})
    lines = str(lo.report(model)).splitlines()
    assert lines == [
        "method     lora",
        "layers     2",
        "rank       2 (1 layers), 3 (1 layers)",
        "trainable  68 of 169 parameters (40.2367 %)",
        "impl       reference",
    ]
    assert "2, 2 merged" in str(lo.report(lo.merge(model)))


def test_a_report_of_a_plain_model_says_so():
    report = lo.report(tiny_mlp())
    assert (report.layers, report.method, report.impl, report.share) == (0, "none", "none", 1.0)


def hooked():
    model = tiny_mlp()
    model[2].register_forward_hook(lambda *args: None)
    return model


def quantised():
    model = tiny_mlp()
    model[2].weight = nn.Parameter(torch.zeros(5, 8, dtype=torch.int8), requires_grad=False)
    return model


def parametrised():
    model = tiny_mlp()
    nn.utils.parametrizations.weight_norm(model[2])
    return model


FAILURES = {
    "no such target": (tiny_mlp, {"target_modules": ["0", "q_proj"]}),
    "another class": (tiny_mlp, {"target_modules": ["0", "1"]}),
    "hooks": (hooked, {}),
    "integers": (quantised, {}),
    "parametrised": (parametrised, {"target_modules": ["0", "2"]}),
    "injected": (injected_mlp, {}),
    "fast path": (lambda: nn.Sequential(nn.Linear(6, 6), nn.TransformerEncoderLayer(6, 2)), {}),
}


@pytest.mark.parametrize(("make", "options"), FAILURES.values(), ids=FAILURES)
def test_a_failed_injection_leaves_the_model_as_it_was(make, options):
    model = make()
    before = fingerprint(model)
    with pytest.raises((TypeError, ValueError)):
        lo.inject(model, lo.LoRAConfig(r=3, **options))
    assert_untouched(before, model)


def test_a_failed_allocation_leaves_model_and_generator_as_they_were(monkeypatch):
    model = tiny_mlp()
    before = fingerprint(model)
    make = lo.METHODS["lora"].__init__

    def out_of_memory(self, config, weight):
        if weight.shape[0] == 5:
            raise MemoryError
        make(self, config, weight)

    monkeypatch.setattr(lo.METHODS["lora"], "__init__", out_of_memory)
    with pytest.raises(MemoryError):
        lo.inject(model, lo.LoRAConfig(r=3))
    assert_untouched(before, model)


def test_nothing_is_printed(capsys):
    model = lo.inject(tiny_mlp(), lo.LoRAConfig())
    lo.report(lo.eject(lo.merge(model)))
    assert capsys.readouterr() == ("", "")

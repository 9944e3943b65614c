"""Models whose layers share inputs: what inject links, and that nothing else about the model changes."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch._dynamo.testing
from linked_layers import count_joint
from tiny_models import injected_mlp, stir, tiny_llama, tokens
from torch import Tensor, nn

import lowrank_ops as lo


@pytest.fixture
def joint(monkeypatch) -> list[int]:
    """Collect the sizes of all joint computations."""
    return count_joint(monkeypatch)


def llama(**options) -> nn.Module:
    return stir(lo.inject(tiny_llama(), lo.LoRAConfig(**{"r": 3, **options})))


def fused(model: nn.Module) -> list[lo.FusedLoRALinear]:
    return [module for module in model.modules() if isinstance(module, lo.FusedLoRALinear)]


def ungrouped(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for layer in fused(model):
        layer.group = None
    return model


def test_a_llama_computes_what_it_does_without_groups(joint):
    model = llama()
    apart = ungrouped(model)
    results = []
    for each in (model, apart):
        loss = each(tokens(), labels=tokens()).loss
        loss.backward()
        results.append([loss, *(p.grad for p in each.parameters() if p.requires_grad)])
    assert joint == [3, 2, 3, 2]
    assert torch.equal(results[0][0], results[1][0])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_names_parameters_and_modules_stay_those_of_the_layers():
    model = llama()
    apart = ungrouped(model)
    assert list(model.state_dict()) == list(apart.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in apart.named_modules()]
    assert repr(model) == repr(apart)


def test_groups_are_the_layers_that_a_parent_calls_on_one_tensor():
    layer = llama().model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    assert attention.q_proj.group is attention.k_proj.group is attention.v_proj.group is not None
    assert mlp.gate_proj.group is mlp.up_proj.group is not None
    assert attention.q_proj.group is not mlp.up_proj.group is not llama().model.layers[0].mlp.up_proj.group
    assert attention.o_proj.group is mlp.down_proj.group is None
    only = llama(target_modules=["q_proj", "v_proj", "down_proj"]).model.layers[0]
    assert only.self_attn.q_proj.group is only.self_attn.v_proj.group is not None
    assert only.mlp.down_proj.group is None
    assert all(layer.group is None for layer in fused(injected_mlp()))


def test_adapters_that_are_loaded_or_come_from_peft_are_grouped(tmp_path, joint):
    peft = pytest.importorskip("peft")
    model = llama()
    lo.save_adapter(model, tmp_path)
    loaded = lo.load_adapter(tiny_llama(), tmp_path)
    wrapped = lo.from_peft(peft.PeftModel.from_pretrained(tiny_llama(), tmp_path))
    wanted = model(tokens()).logits
    for other in (loaded, wrapped):
        joint.clear()
        assert torch.equal(other(tokens()).logits, wanted)
        assert joint == [3, 2, 3, 2]


def test_generation_gives_the_same_tokens(joint):
    model = llama()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    got = model.generate(tokens(), **options)
    assert joint == [3, 2, 3, 2] * 4
    assert torch.equal(got, ungrouped(model).generate(tokens(), **options))


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])
def test_a_copy_of_a_model_has_groups_of_its_own(duplicate, joint):
    model = llama()
    wanted = model(tokens()).logits
    other = duplicate(model)
    assert not {id(layer.group) for layer in fused(model) if layer.group} & {
        id(layer.group) for layer in fused(other)
    }
    for each in (other, model):
        joint.clear()
        assert torch.equal(each(tokens()).logits, wanted)
        assert joint == [3, 2, 3, 2]


def test_ejected_and_merged_models_compute_as_before():
    model = llama()
    wanted = model(tokens()).logits
    torch.testing.assert_close(lo.merge(model)(tokens()).logits, wanted)
    assert torch.equal(lo.unmerge(model)(tokens()).logits, wanted)
    lo.eject(lo.merge(model))
    torch.testing.assert_close(model(tokens()).logits, wanted)


def train_once(model: nn.Module, run: Callable[..., Tensor]) -> list[Tensor]:
    torch.manual_seed(5)
    run(model.train()).backward()
    grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return grads


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_repeats_groups_and_masks(use_reentrant, joint):
    model = llama(lora_dropout=0.5)
    plain = train_once(model, lambda m: m(tokens(), labels=tokens()).loss)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    joint.clear()
    again = train_once(model, lambda m: m(tokens(), labels=tokens(), use_cache=False).loss)
    assert sorted(joint) == [2] * 4 + [3] * 4
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_a_model_compiles_into_one_graph_once():
    model = llama()
    del model.model.layers[1:]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    embedded = torch.randn(2, 7, 32)
    wanted = ungrouped(model)(inputs_embeds=embedded, use_cache=False).logits
    for _ in range(2):
        got = compiled(inputs_embeds=embedded, use_cache=False).logits
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
        got.sum().backward()
    assert counter.frame_count == 1
    functions = [node for node in counter.graphs[0].graph.nodes if "autograd_function" in str(node.target)]
    assert len(functions) == 2 + 2
    assert all(layer.group._traced is None for layer in fused(model) if layer.group)

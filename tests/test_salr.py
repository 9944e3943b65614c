"""SALR layers and models: how they start, train, merge, and go through files."""

import copy
import pickle

import pytest
import torch
from tiny_models import points, stir, tiny_llama, tiny_mlp, tokens
from torch import nn
from torch.nn import functional as F

import lowrank_ops as lo
from lowrank_ops.salr_pruning import layer_cut, prune_weight, residual_factors

ONE_LAYER = {"exact": {}, "2:4": {"structure": "2:4"}, "odd scale": {"lora_alpha": 5}}
FORMS = {"joined": {}, "separate": {"separate_residual": True}, "frozen": {"train_residual": False}}


def config_of(**options):
    return lo.SALRConfig(**{"r": 3, "residual_rank": 2, **options})


def make_linear(dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(6, 8, dtype=dtype)


def make_layer(dtype=torch.float64, **options):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return lo.FusedPrunedLinear.from_linear(make_linear(dtype), config_of(**options))


def pruned_mlp(dtype=torch.float32, **options):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return lo.salr.prune(tiny_mlp(dtype), config_of(**options), progress=False)


def same_numbers(one, other, x=None):
    x = points() if x is None else x
    return torch.equal(one(x), other(x))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("options", ONE_LAYER.values(), ids=ONE_LAYER)
def test_a_layer_starts_as_its_weight_less_what_the_residual_leaves_out(options, form):
    linear, layer = make_linear(), make_layer(**options, **form)
    w = linear.weight.detach()
    kept = prune_weight(w, layer_cut(w, layer.config), layer.config.structure)
    a, b = residual_factors(w - kept, 2, "exact")
    x = points(torch.float64)
    torch.testing.assert_close(layer(x), F.linear(x, kept + b @ a, linear.bias))
    torch.testing.assert_close(layer(x), F.linear(x, w - (w - kept - b @ a), linear.bias))
    assert torch.equal(layer.weight, kept)
    torch.testing.assert_close(layer.adapter.residual, (a, b))
    if options.get("lora_alpha") is None and form is not FORMS["joined"]:
        assert torch.equal(layer.adapter.residual[1], b)


def test_a_power_of_two_as_scale_leaves_the_residual_its_bits():
    joined, separate = make_layer(lora_alpha=6), make_layer(lora_alpha=6, separate_residual=True)
    assert joined.adapter.scale == 2.0
    assert all(map(torch.equal, joined.adapter.residual, separate.adapter.residual))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_gradients_are_those_of_the_dense_formula(form):
    layer = stir(make_layer(**form))
    x = points(torch.float64).requires_grad_()
    parameters = [p for p in layer.adapter.parameters() if p.requires_grad]
    actual = torch.autograd.grad(layer(x).square().sum(), [x, *parameters])
    a, b, scale = layer.adapter.factors(layer.weight)
    y = F.linear(x, layer.weight) + scale * F.linear(F.linear(x, a), b) + layer.bias
    torch.testing.assert_close(actual, torch.autograd.grad(y.square().sum(), [x, *parameters]))


def test_separate_factors_step_as_joined_ones_do_where_the_scale_is_one():
    layers = [make_layer(lora_alpha=3), make_layer(lora_alpha=3, separate_residual=True)]
    for layer in layers:
        optimizer = torch.optim.AdamW(layer.adapter.parameters(), lr=0.01)
        for _ in range(3):
            layer(points(torch.float64)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(layers[0](points(torch.float64)), layers[1](points(torch.float64)))


def test_a_frozen_residual_keeps_its_bits_under_weight_decay():
    layer = make_layer(train_residual=False)
    before = [t.clone() for t in layer.adapter.residual]
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
    layer(points(torch.float64)).square().sum().backward()
    optimizer.step()
    assert all(map(torch.equal, before, layer.adapter.residual))
    assert layer.adapter.a.grad is not None
    assert not layer.adapter.residual_a.requires_grad


def test_a_residual_of_rank_0_leaves_lora_on_the_pruned_base():
    layer = make_layer(residual_rank=0)
    x = points(torch.float64)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("structure", ["unstructured", "2:4"])
def test_merging_adds_everything_and_unmerging_gives_the_compressed_layer_back(structure):
    layer = stir(make_layer(structure=structure))
    x = points(torch.float64)
    y, pruned, bits = layer(x), layer.weight, layer.compressed.values.clone()
    a, b, scale = layer.adapter.factors(layer.weight)
    layer.merge()
    assert layer.merged
    torch.testing.assert_close(layer.weight, pruned + scale * b @ a)
    torch.testing.assert_close(layer(x), y)
    assert "merged_weight" not in layer.state_dict()
    layer.unmerge()
    assert torch.equal(layer(x), y)
    assert torch.equal(layer.compressed.values, bits)


def test_ejecting_gives_plain_layers_of_what_was_computed():
    model = stir(pruned_mlp())
    y, kept = model(points()), model[0].weight
    merged = lo.eject(lo.merge(copy.deepcopy(model)))
    assert type(merged[0]) is nn.Linear
    torch.testing.assert_close(merged(points()), y)
    pruned = lo.eject(model)
    assert type(pruned[0]) is type(pruned[2]) is nn.Linear
    assert torch.equal(pruned[0].weight, kept)
    assert not pruned[0].weight.requires_grad
    assert pruned[0].bias is not None


def test_a_merge_that_overflows_leaves_the_model_unmerged():
    model = pruned_mlp(torch.float16)
    with torch.no_grad():
        model[2].adapter.a.fill_(1e4)
        model[2].adapter.b.fill_(1e4)
    with pytest.raises(ValueError, match=r"merge: weight of '2' must be finite in torch.float16 once merged"):
        lo.merge(model)
    assert not model[0].merged


def test_a_state_dict_loads_over_a_base_with_another_number_of_entries():
    source, target = stir(make_layer()), make_layer(sparsity=0.2)
    assert target.compressed.nnz != source.compressed.nnz
    assert target.load_state_dict(source.state_dict()) == ([], [])
    assert same_numbers(source, target, points(torch.float64))
    target.merge()
    target.load_state_dict(source.state_dict())
    assert target.merged
    torch.testing.assert_close(target(points(torch.float64)), source(points(torch.float64)))


def test_a_broken_compressed_weight_in_a_state_dict_is_named():
    layer = make_layer()
    state = layer.state_dict()
    state["base.mask"] = state["base.mask"][..., :1]
    with pytest.raises(RuntimeError, match="mask must be"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same(copied):
    layer = stir(make_layer())
    assert same_numbers(copied(layer), layer, points(torch.float64))


def test_casting_a_layer_casts_what_is_stored():
    layer = make_layer(torch.float32)
    wide = copy.deepcopy(layer).double()
    assert wide.compressed.dtype == torch.float64
    torch.testing.assert_close(wide(points(torch.float64)).float(), layer(points()))


def test_a_layer_compiles_whole():
    layer = stir(make_layer(torch.float32))
    x = points().requires_grad_()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    expected = torch.autograd.grad(layer(x).sum(), [x, layer.adapter.a, layer.adapter.b])
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x).sum(), [x, layer.adapter.a, layer.adapter.b]), expected
    )


def test_dropout_that_is_set_later_is_refused_in_training_alone():
    layer = make_layer()
    layer.dropout_p = 0.1
    with pytest.raises(ValueError, match="FusedPrunedLinear: dropout_p must be 0, got 0.1"):
        layer(points(torch.float64))
    layer.eval()(points(torch.float64))


def test_only_the_adapters_of_a_pruned_model_train():
    model = lo.salr.prune(tiny_llama(), config_of(), progress=False)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {n for n, _ in model.named_parameters() if ".adapter." in n}
    assert not any("base.weight" in name for name in model.state_dict())
    report = lo.report(model)
    linears = [m for n, m in tiny_llama().named_modules() if type(m) is nn.Linear and n != "lm_head"]
    assert report.layers == len(linears) == 14
    assert report.dense_bytes == 4 * sum(m.weight.numel() for m in linears)
    assert (
        report.compressed_bytes
        == sum(m.compressed.nbytes for m in model.modules() if hasattr(m, "compressed")) / 2
    )
    assert report.trainable == sum((3 + 2) * (m.in_features + m.out_features) for m in linears)
    assert " bits each" in str(report)


def test_inject_and_prune_make_the_same_model():
    torch.manual_seed(3)
    injected = lo.inject(tiny_mlp(), config_of())
    assert same_numbers(injected, pruned_mlp())


def test_training_lowers_the_loss_of_a_pruned_model():
    model, batch = lo.salr.prune(tiny_llama(), config_of(), progress=False), tokens()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(5):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_global_scope_drops_the_share_of_all_layers_together():
    model = tiny_mlp()
    with torch.no_grad():
        model[2].weight.mul_(0.01)
    total = sum(p.weight.numel() for p in (model[0], model[2]))
    lo.salr.prune(model, config_of(scope="global"), progress=False)
    left = [model[i].compressed.nnz for i in (0, 2)]
    assert sum(left) == total - total // 2
    # the layer of small weights loses all of them, the other the rest of the share
    assert left[1] == 0


def test_layers_that_share_a_weight_are_pruned_each_and_leave_it_to_the_others():
    model = tiny_mlp()
    model.add_module("other", nn.Embedding(8, 6))
    model.other.weight = model[0].weight
    weight = model.other.weight.clone()
    lo.salr.prune(model, config_of(), progress=False)
    assert torch.equal(model.other.weight, weight)
    lo.merge(model)
    assert torch.equal(model.other.weight, weight)


def test_a_model_on_meta_is_planned_and_takes_a_state_dict():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5))
    lo.salr.prune(model, config_of(), progress=False)
    source = pruned_mlp()
    assert lo.report(model).compressed_bytes == lo.report(source).compressed_bytes
    model.load_state_dict(source.state_dict(), assign=True)
    assert same_numbers(model, source)

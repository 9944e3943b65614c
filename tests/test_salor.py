"""SALOR: what is pruned stays pruned; the compact form computes, trains and is stored as the dense one."""

import copy

import pytest
import torch
from salor_models import OPTIMIZERS, STRUCTURES, data, make, pairs, plain_twin, train, trained
from tiny_models import assert_untouched, fingerprint, tiny_llama, tokens
from torch import nn

import lowrank_ops as lo
from lowrank_ops.expand import word_offsets
from lowrank_ops.layer_salor import FusedSALORLinear
from lowrank_ops.salor import PruningSchedule


def test_the_schedule_is_a_cubic_between_warm_up_and_end():
    model, config = make(every=1, total_steps=100)
    schedule = PruningSchedule(model, config)
    assert [schedule.progress_at(step) for step in (0, 10, 40, 70, 99)] == [0, 0, 0.875, 1, 1]
    values = [schedule.progress_at(step) for step in range(101)]
    assert values == sorted(values)


def test_the_schedule_moves_every_so_many_steps_and_at_its_end():
    model, config = make(every=25, total_steps=100)
    schedule = PruningSchedule(model, config)
    values = [schedule.progress_at(step) for step in range(101)]
    assert [step for step in range(1, 101) if values[step] != values[step - 1]] == [35, 60, 70]


def test_ratios_are_taken_as_decimals():
    model, config = make()
    schedule = PruningSchedule(model, config, total_steps=10)
    assert (schedule.start, schedule.end) == (1, 7)


@pytest.mark.parametrize(
    ("structure", "optimizer", "knows_optimizer"),
    [
        *((structure, "adamw", True) for structure in STRUCTURES),
        ("unstructured", "adamw", False),
        ("unstructured", "sgd", True),
    ],
)
def test_pruned_entries_are_zero_bit_for_bit_and_stay_so(structure, optimizer, knows_optimizer):
    model, config = make(structure, total_steps=100)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    schedule = PruningSchedule(model, config, optimizer=optimizer if knows_optimizer else None)
    seen = [pruned.clone() for _, pruned in pairs(model)]

    def check():
        for old, (factor, pruned) in zip(seen, pairs(model), strict=True):
            assert not (old & ~pruned).any()
            assert not factor.detach()[pruned].view(torch.int64).any()
            assert not factor.grad[pruned].any()
            old.copy_(pruned)

    train(model, optimizer, schedule, 100, check)
    assert schedule.finished
    assert any(pruned.any() for pruned in seen[::2])
    assert any(pruned.any() for pruned in seen[1::2])


def test_the_number_of_pruned_entries_follows_the_schedule_exactly():
    model, config = make(sparsity_a=0.3, sparsity_b=0.8)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    schedule = PruningSchedule(model, config, optimizer=optimizer)

    def check():
        progress = schedule.progress_at(schedule.steps)
        for i, sparsity in ((0, 0.3), (1, 0.8)):
            flags = [pruned for _, pruned in pairs(model)[i::2]]
            final = round(sparsity * sum(pruned.numel() for pruned in flags))
            assert sum(int(pruned.sum()) for pruned in flags) == round(progress * final)

    train(model, optimizer, schedule, 40, check)


def test_the_optimizer_forgets_what_is_pruned():
    model, optimizer, _ = trained()
    for factor, pruned in pairs(model):
        state = optimizer.state[factor]
        assert all(not state[name][pruned].any() for name in ("exp_avg", "exp_avg_sq"))
        assert all(state[name][~pruned].all() for name in ("exp_avg", "exp_avg_sq"))


def test_a_gradient_that_is_not_finite_does_not_bring_an_entry_back():
    model, _, _ = trained()
    x, _ = data()
    x[0, 0] = torch.inf
    model(x).sum().backward()
    assert all(not factor.grad[pruned].any() for factor, pruned in pairs(model))


def test_a_copy_masks_its_gradients_too():
    model = copy.deepcopy(trained()[0])
    model(data()[0]).sum().backward()
    assert all(not factor.grad[pruned].any() for factor, pruned in pairs(model))


def test_magnitude_times_gradient_keeps_what_the_loss_depends_on():
    model, config = make(score="magnitude_gradient")
    schedule = PruningSchedule(model, config)
    with torch.no_grad():
        for factor, _ in pairs(model):
            factor.fill_(1.0)
    for _ in range(schedule.end):
        for factor, _ in pairs(model):
            factor.grad = torch.zeros_like(factor)
            factor.grad[0] = 1.0
        schedule.step()
    # the first rows hold fewer entries than stay of B: all of them do
    assert all(not pruned[0].any() for _, pruned in pairs(model))


def test_two_runs_give_the_same_bits_and_a_resumed_run_too():
    whole, _, _ = trained(score="magnitude_gradient")
    half, optimizer, schedule = trained(score="magnitude_gradient", steps=17)
    model, config = make(score="magnitude_gradient")
    resumed = OPTIMIZERS["adamw"](model.parameters())
    continued = PruningSchedule(model, config, optimizer=resumed)
    model.load_state_dict(half.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    continued.load_state_dict(schedule.state_dict())
    train(model, resumed, continued, 23)
    for (expected, mask), (actual, same) in zip(pairs(whole), pairs(model), strict=True):
        assert torch.equal(mask, same)
        assert torch.equal(expected, actual)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_compact_form_computes_the_same(structure):
    model, _, schedule = trained(structure)
    before = lo.report(model).trainable
    x, _ = data()
    dense = copy.deepcopy(model)
    left = sum(int((~pruned).sum()) for _, pruned in pairs(model))
    assert schedule.finish() is model
    torch.testing.assert_close(model(x), dense(x), rtol=1e-12, atol=1e-12)
    assert lo.report(model).trainable == left < before
    for layer, old in ((model[0], dense[0]), (model[2], dense[2])):
        for new in (layer, old):
            new.merge()
        torch.testing.assert_close(layer.weight, old.weight, rtol=1e-12, atol=1e-12)
        layer.unmerge()
    assert isinstance(model[0], lo.FusedLoRALinear if structure == "rank" else lo.FusedMaskedLoRALinear)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_training_goes_on_in_the_compact_form_as_in_the_dense_one(structure):
    dense, dense_optimizer, dense_schedule = trained(structure, steps=30)
    model, optimizer, schedule = trained(structure, steps=30)
    schedule.finish()
    train(dense, dense_optimizer, dense_schedule, 10)
    # what is finished may still be called
    train(model, optimizer, schedule, 10)
    x, _ = data()
    torch.testing.assert_close(model(x), dense(x), rtol=1e-10, atol=1e-10)
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert held >= {p for p in model.parameters() if p.requires_grad}


def test_rank_pruning_ends_in_a_plain_lora_of_smaller_ranks_that_peft_reads(tmp_path):
    from peft import PeftModel

    model, _, schedule = trained("rank", sparsity_a=0.6, sparsity_b=0.6)
    group = model[0]
    kept = [int((~layer.adapter.a_pruned).any(1).sum()) for layer in (model[0], model[2])]
    schedule.finish()
    assert model[0] is group
    assert [layer.adapter.rank for layer in (model[0], model[2])] == kept
    assert sum(kept) == 2 * 16 - round(0.6 * 32)
    assert lo.report(model).method == "lora"
    lo.save_adapter(model, tmp_path)
    plain = nn.Sequential(copy.deepcopy(model[0].base), nn.GELU(), copy.deepcopy(model[2].base))
    x, _ = data()
    theirs = PeftModel.from_pretrained(plain, tmp_path, autocast_adapter_dtype=False)
    torch.testing.assert_close(theirs(x), model(x))


@pytest.mark.parametrize("is_compact", [False, True])
@pytest.mark.parametrize("structure", ["unstructured", "2:4", "blocks"])
def test_files_hold_what_is_left_and_load_compact(structure, is_compact, tmp_path):
    model, _, schedule = trained(structure)
    plain, x = plain_twin(model), data()[0]
    if is_compact:
        schedule.finish()
    lo.save_adapter(model, tmp_path)
    loaded = lo.load_adapter(plain, tmp_path)
    assert all(type(layer) is FusedSALORLinear for layer in (loaded[0], loaded[2]))
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-12, atol=1e-12)
    assert lo.salor.densities(loaded) == lo.salor.densities(model)
    assert all(p.requires_grad for layer in (loaded[0], loaded[2]) for p in layer.adapter.parameters())


def test_a_file_fills_a_dense_model_with_its_masks_and_a_compact_one_of_the_same(tmp_path):
    model, _, schedule = trained()
    fresh, _ = make()
    lo.save_adapter(model, tmp_path)
    lo.load_adapter(fresh, tmp_path)
    for (expected, mask), (actual, same) in zip(pairs(model), pairs(fresh), strict=True):
        assert torch.equal(mask, same)
        assert torch.equal(expected, actual)
    schedule.finish()
    with torch.no_grad():
        model[0].adapter.b.values.zero_()
    lo.load_adapter(model, tmp_path)
    assert torch.equal(model(data()[0]), lo.salor.compact(fresh)(data()[0]))


def test_a_file_with_another_mask_does_not_fill_a_compact_model(tmp_path):
    model, _, schedule = trained(steps=30)
    other, _, _ = trained(lora_alpha=32, steps=40, score="magnitude")
    other[0].adapter.a_pruned.logical_not_()
    lo.save_adapter(other, tmp_path)
    schedule.finish()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="a_words of '0' must be the mask of the model, got another"):
        lo.load_adapter(model, tmp_path)
    assert_untouched(before, model)


@pytest.mark.parametrize(("structure", "is_compact"), [("2:4", False), ("2:4", True), ("rank", True)])
def test_an_export_is_a_plain_lora(structure, is_compact, tmp_path):
    model, _, schedule = trained(structure)
    plain, x = plain_twin(model), data()[0]
    if is_compact:
        schedule.finish()
    lo.salor.export_peft(model, tmp_path)
    loaded = lo.load_adapter(plain, tmp_path)
    assert loaded[0].config.method == "lora"
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_model_without_data_can_be_planned(structure):
    config = lo.SALORConfig(r=16, structure=structure)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 32))
    lo.salor.compact(lo.inject(model, config))
    a, b = (round((1 - s) * 16 * n) for s, n in ((config.sparsity_a, 64), (config.sparsity_b, 32)))
    assert lo.report(model).trainable == a + b


def test_a_compact_state_brings_its_masks():
    scores = "magnitude", "magnitude_gradient"
    model, other = (trained("2:4", score=score)[2].finish() for score in scores)
    assert model[0].adapter.a.mask != other[0].adapter.a.mask
    other.load_state_dict(model.state_dict())
    x, _ = data()
    assert torch.equal(other(x), model(x))
    assert torch.equal(other[0].adapter.a_word_offsets, word_offsets(model[0].adapter.a.mask))


def test_siblings_are_computed_together_while_they_are_dense():
    model = lo.inject(tiny_llama(), lo.SALORConfig(r=4))
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.group is not None is not attention.k_proj.group
    alone = copy.deepcopy(model)
    for module in alone.modules():
        if isinstance(module, lo.FusedLoRALinear):
            module.group = None
    for each in (model, alone):
        each(tokens()).logits.square().mean().backward()
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("is_compact", [False, True])
def test_a_layer_compiles_to_one_graph(is_compact):
    model, _, schedule = trained()
    if is_compact:
        schedule.finish()
    x, _ = data()
    compiled = torch.compile(model[0], backend="aot_eager", fullgraph=True)
    (expected,) = torch.autograd.grad(model[0](x).square().sum(), next(model[0].adapter.parameters()))
    (actual,) = torch.autograd.grad(compiled(x).square().sum(), next(model[0].adapter.parameters()))
    torch.testing.assert_close(actual, expected)

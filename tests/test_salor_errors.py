"""What SALOR refuses, and that it is then as before."""

import dataclasses
import re

import pytest
import torch
from salor_models import make, plain_twin, trained
from tiny_models import assert_untouched, fingerprint, tiny_mlp

import lowrank_ops as lo
from lowrank_ops.salor import PruningSchedule

CONFIGS = [
    ({"structure": "3:4"}, 'structure must be "unstructured" or "2:4" or "blocks" or "rank", got \'3:4\''),
    ({"score": "l2"}, 'score must be "magnitude" or "magnitude_gradient", got \'l2\''),
    ({"sparsity_a": 1.0}, "sparsity_a must be in [0, 1), got 1.0"),
    ({"sparsity_b": -0.1}, "sparsity_b must be in [0, 1), got -0.1"),
    ({"warmup_ratio": 0.05}, "warmup_ratio and end_ratio must be 0.1 <= warmup_ratio < end_ratio <= 1, "),
    ({"end_ratio": 1.5}, "warmup_ratio and end_ratio must be 0.1 <= warmup_ratio < end_ratio <= 1, "),
    ({"every": 0}, "every must be at least 1, got 0"),
    ({"every": 2.0}, "every must be an int, got float"),
    ({"total_steps": 0}, "total_steps must be at least 1, got 0"),
    ({"structure": "2:4", "r": 6}, 'r must be a multiple of 4 with structure="2:4", got 6'),
    (
        {"structure": "2:4", "sparsity_b": 0.9},
        'sparsity_a and sparsity_b must be 0.5 with structure="2:4", got 0.5 and 0.9',
    ),
    ({"structure": "blocks", "r": 8}, 'r must be at least 16 with structure="blocks", got 8'),
    ({"structure": "rank", "sparsity_a": 0.3}, 'sparsity_a must be sparsity_b with structure="rank", '),
]


@pytest.mark.parametrize(("options", "message"), CONFIGS, ids=[message[:24] for _, message in CONFIGS])
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises((TypeError, ValueError), match=f"^SALORConfig: {re.escape(message)}"):
        lo.SALORConfig(**options)


def merged():
    model, config = make()
    model[2].merge()
    return model, config


def compacted():
    model, config = make()
    return lo.salor.compact(model), config


def other_config():
    model, config = make()
    return model, dataclasses.replace(config, every=7)


def no_total():
    return make(total_steps=None)


def too_short():
    return make(total_steps=2)


def other_method():
    return lo.inject(tiny_mlp(), lo.LoRAConfig(r=3)), lo.SALORConfig(r=3)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (compacted, "layer '0' must have dense SALOR factors, got CompactSALOR"),
        (other_method, "layer '0' must have dense SALOR factors, got LoRA"),
        (other_config, "config must be that of layer '0', "),
        (no_total, "total_steps must be given here or in config, got None in both"),
        (too_short, "total_steps must leave a step between warm-up and end, got 2 with "),
        (lambda: (tiny_mlp(), lo.SALORConfig()), "model must have fused layers, got a Sequential without"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(start, message):
    model, config = start()
    with pytest.raises(ValueError, match=f"^PruningSchedule: {re.escape(message)}"):
        PruningSchedule(model, config)


def test_a_merged_layer_stops_pruning_before_anything_changes():
    model, config = make()
    schedule = PruningSchedule(model, config)
    for _ in range(8):
        schedule.step()
    model[2].merge()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="PruningSchedule: layer '2' must not be merged, got merged"):
        schedule.step()
    assert schedule.steps == 8
    assert_untouched(before, model)


@pytest.mark.parametrize("structure", ["unstructured", "rank"])
def test_pruning_stops_where_the_model_was_made_compact_by_other_means(structure):
    model, config = make(structure)
    schedule = PruningSchedule(model, config)
    for _ in range(8):
        schedule.step()
    lo.salor.compact(model)
    with pytest.raises(ValueError, match="model must have the layers of the start, got another at '0'"):
        schedule.step()


def test_a_score_by_gradients_needs_them():
    model, config = make(score="magnitude_gradient")
    with pytest.raises(RuntimeError, match="call step\\(\\) before zero_grad"):
        PruningSchedule(model, config).step()


def test_finish_waits_for_the_end_of_the_schedule():
    schedule = trained(steps=10)[2]
    with pytest.raises(RuntimeError, match="steps must be at least 28, when pruning ends, got 10"):
        schedule.finish()


def test_a_state_of_another_run_is_refused():
    schedule = trained(steps=1)[2]
    with pytest.raises(ValueError, match="state must be of a run of 40 steps, got one of 50"):
        schedule.load_state_dict({**schedule.state_dict(), "total_steps": 50})


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (merged, "layer '2' must not be merged, got merged; unmerge the model first"),
        (compacted, "layer '0' must have dense SALOR factors, got CompactSALOR"),
    ],
)
def test_what_cannot_be_compacted_is_left_alone(start, message):
    model, _ = start()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=f"^compact: {re.escape(message)}"):
        lo.salor.compact(model)
    assert_untouched(before, model)


def test_compact_refuses_an_optimizer_of_something_else():
    model, _ = make()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="optimizer must hold the adapters, got one without that of '0'"):
        lo.salor.compact(model, torch.optim.SGD(tiny_mlp().parameters()))
    assert_untouched(before, model)


def test_densities_and_exports_need_salor_layers(tmp_path):
    with pytest.raises(ValueError, match="model must have SALOR layers, got a Sequential without"):
        lo.salor.densities(tiny_mlp())
    with pytest.raises(ValueError, match="export_peft: model must have SALOR layers, got one without"):
        lo.salor.export_peft(tiny_mlp(), tmp_path)
    with pytest.raises(ValueError, match="export_peft: model must have SALOR layers, got lori"):
        lo.salor.export_peft(lo.inject(tiny_mlp(), lo.LoRIConfig(r=2)), tmp_path)
    with pytest.raises(ValueError, match="export_peft: model must contain the layers, got a bare one"):
        lo.salor.export_peft(lo.inject(tiny_mlp(), lo.SALORConfig(r=2))[0], tmp_path)


def test_a_file_that_is_damaged_says_where(tmp_path):
    from safetensors.torch import load_file, save_file

    model, _, _ = trained()
    lo.save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["0.b_values"] = tensors["0.b_values"][1:].clone()
    save_file(tensors, path)
    plain = plain_twin(model)
    with pytest.raises(ValueError, match="b_values of '0' must be [0-9]+ floating-point numbers, got"):
        lo.load_adapter(plain, tmp_path)

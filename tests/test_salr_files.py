"""Pruning that is stopped, refused or resumed, SALR's files, and its learning rates."""

import re
import sys

import pytest
import torch
from safetensors import safe_open
from test_salr import config_of, pruned_mlp, same_numbers
from tiny_models import assert_untouched, fingerprint, points, stir, tiny_llama, tiny_mlp
from torch import nn

import lowrank_ops as lo
from lowrank_ops import layer_pruned


def stop_at(call, monkeypatch, exception=KeyboardInterrupt):
    """Make decomposition number ``call`` raise; return the list of those that were done."""
    original, done = layer_pruned.residual_factors, []

    def counted(*args):
        if len(done) == call:
            raise exception
        done.append(args[1])
        return original(*args)

    monkeypatch.setattr(layer_pruned, "residual_factors", counted)
    return done


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_pruning_goes_on_where_it_was_stopped(scope, tmp_path, monkeypatch):
    config = config_of(scope=scope, lora_alpha=5)
    whole = pruned_mlp(scope=scope, lora_alpha=5)
    model = tiny_mlp()
    with monkeypatch.context() as patched:
        done = stop_at(1, patched)
        before = fingerprint(model)
        with pytest.raises(KeyboardInterrupt):
            lo.salr.prune(model, config, folder=tmp_path / "new" / "folder", progress=False)
        assert len(done) == 1
    assert_untouched(before, model)
    done = stop_at(None, monkeypatch)
    torch.manual_seed(3)
    assert lo.salr.prune(model, config, folder=str(tmp_path / "new" / "folder"), progress=False) is model
    assert len(done) == 1
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        "0.safetensors",
        "2.safetensors",
    ]
    state, expected = model.state_dict(), whole.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


def test_pruning_that_is_stopped_without_a_folder_leaves_the_model_alone(monkeypatch):
    model = tiny_llama()
    before = fingerprint(model)
    stop_at(5, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        lo.salr.prune(model, config_of(), progress=False)
    assert_untouched(before, model)


@pytest.mark.parametrize("change", ["weight", "config", "rank", "cut", "file"])
def test_a_folder_of_another_model_or_config_is_refused(change, tmp_path):
    options = {"config": {"sparsity": 0.4}, "rank": {"residual_rank": 1}, "cut": {"scope": "global"}}
    lo.salr.prune(tiny_mlp(), config_of(), folder=tmp_path, progress=False)
    model = tiny_mlp()
    if change == "weight":
        with torch.no_grad():
            model[2].weight[0, 0] += 1
    expected = "folder must hold layers of this model and config, got another's"
    if change == "file":
        (tmp_path / "2.safetensors").write_bytes((tmp_path / "2.safetensors").read_bytes()[:-9])
        expected = "2.safetensors must be a complete file, got one that is not"
    before = fingerprint(model)
    with pytest.raises(ValueError, match=f"prune: {expected}"):
        lo.salr.prune(model, config_of(**options.get(change, {})), folder=tmp_path, progress=False)
    assert_untouched(before, model)


def test_the_lora_rank_may_change_between_two_calls_with_one_folder(tmp_path):
    for r in (3, 2):
        model = lo.salr.prune(tiny_mlp(), config_of(r=r), folder=tmp_path, progress=False)
        assert model[0].adapter.rank == r


def test_a_weight_that_is_not_finite_is_named_and_nothing_changes():
    for scope in ("layer", "global"):
        model = tiny_mlp()
        with torch.no_grad():
            model[2].weight[1, 1] = float("nan")
        before = fingerprint(model)
        with pytest.raises(
            ValueError, match="prune: weight of '2' must be finite, got 1 values that are not"
        ):
            lo.salr.prune(model, config_of(scope=scope), progress=False)
        assert_untouched(before, model)


def test_a_bar_without_tqdm_is_refused_before_anything_changes(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    model = tiny_mlp()
    before = fingerprint(model)
    with pytest.raises(RuntimeError, match="prune: progress must be False where tqdm is not installed"):
        lo.salr.prune(model, config_of())
    assert_untouched(before, model)


def test_the_bar_counts_layers(capsys):
    lo.salr.prune(tiny_mlp(), config_of())
    assert "2/2" in capsys.readouterr().err


@pytest.mark.parametrize("form", [{}, {"separate_residual": True}, {"structure": "2:4"}, {"scope": "global"}])
def test_an_adapter_loads_onto_the_plain_model_and_prunes_it_alike(form, tmp_path):
    model = stir(pruned_mlp(**form))
    lo.save_adapter(model, tmp_path)
    loaded = lo.load_adapter(tiny_mlp(), tmp_path)
    assert same_numbers(loaded, model)
    assert loaded[0].config == model[0].config
    filled = lo.load_adapter(pruned_mlp(**form), tmp_path)
    assert same_numbers(filled, model)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        # the factors, and three numbers a layer instead of its weight
        assert {name.rpartition(".")[2] for name in file.keys()} <= {  # noqa: SIM118
            "a", "b", "residual_a", "residual_b", "origin",
        }  # fmt: skip


def test_an_adapter_made_in_bfloat16_loads_onto_the_same_weights_in_float32(tmp_path):
    model = tiny_mlp(torch.bfloat16)
    wide = tiny_mlp(torch.bfloat16).float()
    lo.save_adapter(lo.salr.prune(model, config_of(), progress=False), tmp_path)
    lo.load_adapter(wide, tmp_path)
    assert torch.equal(wide[0].weight, model[0].weight.float())


@pytest.mark.parametrize("plain", [True, False])
def test_an_adapter_is_refused_on_another_base(plain, tmp_path):
    lo.save_adapter(pruned_mlp(), tmp_path)
    model = tiny_mlp()
    with torch.no_grad():
        # the largest entry is kept, whatever is dropped
        model[2].weight.flatten()[model[2].weight.abs().argmax()] += 0.5
    if not plain:
        lo.inject(model, config_of())
    before = fingerprint(model)
    with pytest.raises(ValueError, match="load_adapter: base weight of '2' must be the one that was pruned"):
        lo.load_adapter(model, tmp_path)
    assert_untouched(before, model)


def test_a_file_without_what_was_dropped_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    lo.save_adapter(pruned_mlp(), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["0.origin"]
    save_file(tensors, path)
    for model in (tiny_mlp(), pruned_mlp()):
        with pytest.raises(
            ValueError, match=re.escape("origin of '0' must be (3,) of torch.int64, got none")
        ):
            lo.load_adapter(model, tmp_path)


def wide_model():
    """Return a pruned model of more inputs than the power iteration has vectors, and batches for it."""
    generator = torch.Generator().manual_seed(5)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 5))
    batches = [torch.randn(2, 25, 40, generator=generator) for _ in range(3)]
    return lo.salr.prune(model, config_of(), progress=False), batches


def test_the_learning_rate_is_one_over_the_square_of_the_largest_singular_value():
    model, batches = wide_model()
    with torch.no_grad():
        inputs = {"0": torch.cat(batches).flatten(0, 1)}
        inputs["2"] = model[1](model[0](inputs["0"]))
    rates = lo.salr.residual_learning_rate(model, batches)
    assert model[0].training
    for name, x in inputs.items():
        assert rates[name] == pytest.approx(torch.linalg.matrix_norm(x, 2).item() ** -2, rel=1e-3)
    assert not model[0]._forward_pre_hooks


def test_the_rate_of_inputs_of_low_rank_is_that_of_all_directions():
    # fewer rows than the vectors of all passes: what is left of a product is rounding
    model = lo.salr.prune(nn.Sequential(nn.Linear(96, 8)), config_of(), progress=False)
    x = torch.randn(10, 96, generator=torch.Generator().manual_seed(5))
    rate = lo.salr.residual_learning_rate(model, [x], passes=20)["0"]
    assert rate == pytest.approx(torch.linalg.matrix_norm(x, 2).item() ** -2, rel=1e-3)


def test_more_passes_give_a_smaller_rate():
    model, batches = wide_model()
    rates = [lo.salr.residual_learning_rate(model, batches, passes=n)["0"] for n in (1, 2, 4)]
    assert rates[0] > rates[1] > rates[2]


def test_a_step_at_the_papers_rate_lowers_the_quadratic_loss_of_the_product():
    model = pruned_mlp(separate_residual=True)
    x = points()
    rate = lo.salr.residual_learning_rate(model, [x])["0"]
    delta, target = torch.zeros(8, 6), torch.ones(4, 8)
    losses = []
    for _ in range(20):
        left = x @ delta.T - target
        losses.append(left.square().sum().item())
        delta -= rate * left.T @ x
    assert losses == sorted(losses, reverse=True)


def test_groups_hold_every_parameter_once_and_the_rates_of_the_residuals():
    model = pruned_mlp(separate_residual=True)
    groups = lo.salr.parameter_groups(model, 1e-3, {"0": 0.5, "2": float("inf")})
    assert [(g["name"], g["lr"], len(g["params"])) for g in groups] == [
        ("lora", 1e-3, 4), ("0", 0.5, 2), ("2", 1e-3, 2),
    ]  # fmt: skip
    trains = {id(p) for p in model.parameters() if p.requires_grad}
    assert trains == {id(p) for group in groups for p in group["params"]}
    torch.optim.SGD(groups)
    frozen = pruned_mlp(train_residual=False)
    assert [g["name"] for g in lo.salr.parameter_groups(frozen, 1e-3)] == ["lora"]


CONFIGS = [
    ({"sparsity": 0}, ValueError, "sparsity must be in (0, 1), got 0"),
    ({"sparsity": 1.0}, ValueError, "sparsity must be in (0, 1), got 1.0"),
    ({"sparsity": float("nan")}, ValueError, "sparsity must be in (0, 1), got nan"),
    ({"sparsity": "half"}, TypeError, "sparsity must be a number, got str"),
    ({"residual_rank": -1}, ValueError, "residual_rank must be in 0..496, 512 - r, got -1"),
    ({"residual_rank": 500}, ValueError, "residual_rank must be in 0..496, 512 - r, got 500"),
    ({"residual_rank": 2.0}, TypeError, "residual_rank must be an int, got float"),
    ({"scope": "model"}, ValueError, 'scope must be "layer" or "global", got \'model\''),
    ({"structure": "4:8"}, ValueError, 'structure must be "unstructured" or "2:4", got \'4:8\''),
    ({"svd": None}, ValueError, 'svd must be "auto" or "exact" or "randomized", got None'),
    ({"structure": "2:4", "sparsity": 0.4}, ValueError, "for structure \"2:4\", got 0.4 and 'layer'"),
    ({"structure": "2:4", "scope": "global"}, ValueError, "for structure \"2:4\", got 0.5 and 'global'"),
    ({"train_residual": 1}, TypeError, "train_residual must be a bool, got int"),
    ({"lora_dropout": 0.1}, ValueError, "lora_dropout must be 0, got 0.1"),
]


@pytest.mark.parametrize(("options", "error", "message"), CONFIGS, ids=lambda value: str(value)[:40])
def test_a_bad_option_gets_one_sentence(options, error, message):
    with pytest.raises(error, match="SALRConfig: .*" + re.escape(message)):
        lo.SALRConfig(**options)


rate, groups = lo.salr.residual_learning_rate, lo.salr.parameter_groups
CALLS = [
    (lambda m: lo.salr.prune(m, lo.LoRAConfig()), ValueError, "config must be of a known method, salr, got"),
    (lambda m: lo.salr.prune(m, config_of(), folder=3), TypeError, "prune: folder must be a str or a path"),
    (lambda m: lo.salr.prune(nn.Linear(2, 2), config_of()), TypeError, "model must contain linear layers"),
    (lambda m: lo.salr.prune(pruned_mlp(), config_of()), ValueError, "prune: model must have no adapters"),
    (lambda m: rate(m, [points()]), ValueError, "model must have pruned layers, got none"),
    (lambda m: rate(pruned_mlp(), []), ValueError, "batches must hold calibration data"),
    (lambda m: rate(pruned_mlp(), [1], passes=0), ValueError, "passes must be at least 1"),
    (lambda m: rate(pruned_mlp(), [1], passes=1.0), TypeError, "passes must be an int"),
    (lambda m: groups(pruned_mlp(), 0.1), ValueError, "residuals in parameters of their own"),
    (
        lambda m: groups(pruned_mlp(separate_residual=True), 0.1, {"0": 1.0}),
        ValueError,
        "residual_rates must name every pruned layer, got none for '2'",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), CALLS, ids=[str(i) for i in range(len(CALLS))])
def test_a_bad_call_gets_one_sentence(call, error, message):
    model = tiny_mlp()
    before = fingerprint(model)
    with pytest.raises(error, match=re.escape(message)):
        call(model)
    assert before[0] == fingerprint(model)[0]

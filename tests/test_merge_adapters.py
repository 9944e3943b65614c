"""Merging adapters: the identities of both methods, what they take, and that PEFT agrees."""

import math

import pytest
import torch
from lori_models import adapted, dense_mlp, sparse_mlp
from tiny_models import injected_mlp, points, stir, tiny_llama, tiny_mlp, tokens
from torch import Tensor

import lowrank_ops as lo
from lowrank_ops.methods import Factors


def random_factors(rank: int, scale: float, seed: int, names=("0", "2")) -> dict[str, Factors]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"0": (8, 6), "2": (5, 8)}
    found = {}
    for name in names:
        N, K = shapes[name]
        a = torch.randn(rank, K, generator=generator, dtype=torch.float64)
        found[name] = Factors(a, torch.randn(N, rank, generator=generator, dtype=torch.float64), scale)
    return found


def delta(own: Factors) -> Tensor:
    return own.scale * own.b @ own.a


def assert_to_rounding(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype is expected.dtype is torch.float64
    assert (actual - expected).abs().max() <= 64 * torch.finfo(torch.float64).eps * expected.abs().max()


@pytest.mark.parametrize("weights", [(0.4, 0.4, 0.4), (1.0, -0.5, 0.0)], ids=str)
def test_cat_is_the_weighted_sum_for_any_ranks(weights):
    adapters = [random_factors(2, 2.0, 0), random_factors(5, 0.7, 1), random_factors(3, 1.3, 2)]
    merged = lo.merge_adapters(adapters, weights)
    for name, own in merged.factors.items():
        assert own.a.shape[0] == own.b.shape[1] == 10
        assert own.scale == 1.0
        parts = [weight * delta(adapter[name]) for weight, adapter in zip(weights, adapters, strict=True)]
        assert_to_rounding(delta(own), sum(parts))


@pytest.mark.parametrize("weights", [(0.4, 0.3), (1.0, -0.5)], ids=str)
def test_linear_is_cat_and_its_cross_terms(weights):
    adapters = [random_factors(3, 2.0, 0), random_factors(3, 0.7, 1)]
    merged = lo.merge_adapters(adapters, weights, method="linear")
    for name, own in merged.factors.items():
        assert own.a.shape[0] == 3
        roots = [math.sqrt(abs(w) * ad[name].scale) for w, ad in zip(weights, adapters, strict=True)]
        signs = [math.copysign(1.0, w) for w in weights]
        expected = sum(
            roots[i] * signs[j] * roots[j] * adapters[i][name].b @ adapters[j][name].a
            for i in (0, 1)
            for j in (0, 1)
        )
        assert_to_rounding(delta(own), expected)
        squares = sum(w * delta(ad[name]) for w, ad in zip(weights, adapters, strict=True))
        assert (delta(own) - squares).abs().max() > 0.1


def test_linear_with_one_a_is_exact():
    one = random_factors(3, 2.0, 0)
    two = {name: Factors(own.a, own.b.flip(0), own.scale) for name, own in one.items()}
    merged = lo.merge_adapters([one, two], [0.5, 0.5], "linear")
    for name, own in merged.factors.items():
        # cross terms double what w = 0.5 halves
        assert_to_rounding(delta(own), delta(one[name]) + delta(two[name]))


@pytest.mark.parametrize("method", ["cat", "linear"])
def test_a_layer_that_an_adapter_lacks_is_merged_of_the_others(method):
    one, two = random_factors(3, 2.0, 0), random_factors(3, 1.0, 1, names=("2",))
    merged = lo.merge_adapters([one, two], [0.5, 0.5], method)
    assert_to_rounding(delta(merged.factors["0"]), 0.5 * delta(one["0"]))


def test_folders_models_and_states_are_taken_alike(tmp_path):
    model = sparse_mlp()
    lo.save_adapter(model, tmp_path / "own")
    lo.lori.export_peft(model, tmp_path / "peft")
    own = {name: layer.adapter.factors(layer.weight) for name, layer in adapted(model).items()}
    lora = {name: Factors(*(t.detach() for t in f[:2]), f.scale) for name, f in own.items()}
    state = {}
    for name, factors in lora.items():
        state[f"base_model.model.{name}.lora_A.weight"] = factors.a
        state[f"base_model.model.{name}.lora_B.weight"] = factors.b
    pair = (state, lo.LoRAConfig(r=3, lora_alpha=6))
    expected = lo.merge_adapters([lora, lora], [0.5, 0.3])
    for source in (tmp_path / "own", str(tmp_path / "peft"), model, pair, lo.merge_adapters([model], [1.0])):
        merged = lo.merge_adapters([source, lora], [0.5, 0.3])
        for name, factors in merged.factors.items():
            torch.testing.assert_close(delta(factors), delta(expected.factors[name]))
            assert factors.a.dtype is torch.float32


def test_rank_stabilised_scales_count(tmp_path):
    model = injected_mlp(r=4, use_rslora=True)
    lo.save_adapter(model, tmp_path)
    merged = lo.merge_adapters([tmp_path], [1.0])
    expected = model[0].adapter
    assert expected.scale == 16.0
    torch.testing.assert_close(delta(merged.factors["0"]), (16 * expected.b @ expected.a).detach())


@pytest.mark.parametrize("method", ["cat", "linear"])
def test_a_merged_adapter_loads_here_and_in_peft(method, tmp_path):
    from peft import PeftModel

    folders = []
    for seed in (0, 1):
        model = stir(lo.inject(tiny_llama(), lo.LoRIConfig(r=4, lora_alpha=8, seed=seed)), seed=seed)
        lo.lori.sparsify(model, lo.lori.extract_masks(model, 0.5), keep_values=True)
        folders.append(tmp_path / str(seed))
        lo.save_adapter(model, folders[-1])
    merged = lo.merge_adapters(folders, [0.4, 0.3], method)
    merged.save(tmp_path / "merged")
    ours = lo.load_adapter(tiny_llama(), tmp_path / "merged")
    peft = PeftModel.from_pretrained(tiny_llama(), tmp_path / "merged")
    assert lo.report(ours).ranks == {8 if method == "cat" else 4: 14}
    torch.testing.assert_close(ours(tokens()).logits, peft(tokens()).logits)
    summed = tiny_llama()
    with torch.no_grad():
        for name, own in merged.factors.items():
            summed.get_submodule(name).weight += delta(own)
    torch.testing.assert_close(ours(tokens()).logits, summed(tokens()).logits)


@pytest.mark.parametrize("method", ["cat", "linear"])
def test_peft_merges_to_the_same_update(method, tmp_path):
    from peft import PeftModel

    for seed in (0, 1):
        lo.save_adapter(stir(injected_mlp(), seed=seed), tmp_path / str(seed))
    peft = PeftModel.from_pretrained(tiny_mlp(), tmp_path / "0", adapter_name="0")
    peft.load_adapter(tmp_path / "1", adapter_name="1")
    peft.add_weighted_adapter(["0", "1"], [0.5, 0.3], "merged", combination_type=method)
    peft.set_adapter("merged")
    lo.merge_adapters([tmp_path / "0", tmp_path / "1"], [0.5, 0.3], method).save(tmp_path / "merged")
    ours = lo.load_adapter(tiny_mlp(), tmp_path / "merged")
    torch.testing.assert_close(ours(points()), peft(points()))


def test_layers_of_other_ranks_and_scales_survive_the_file(tmp_path):
    from peft import PeftModel

    one = {"0": random_factors(2, 2.0, 0)["0"], "2": random_factors(3, 0.5, 1)["2"]}
    two = random_factors(3, 1.0, 2, names=("0",))
    merged = lo.merge_adapters([one, two], [0.5, 0.5])
    merged.save(tmp_path)
    again = lo.merge_adapters([tmp_path], [1.0])
    for name, own in merged.factors.items():
        assert_to_rounding(delta(again.factors[name]), delta(own))
    ours = lo.load_adapter(tiny_mlp(torch.float64), tmp_path)
    assert lo.report(ours).ranks == {3: 1, 5: 1}
    x = points(torch.float64)
    torch.testing.assert_close(PeftModel.from_pretrained(tiny_mlp(torch.float64), tmp_path)(x), ours(x))


FACTORS = random_factors(3, 1.0, 0)
TURNED = Factors(FACTORS["0"].b, FACTORS["0"].a, 1.0)
ERRORS = {
    "folders_or_states and weights must be lists or tuples, got str and list": ("folder", [1.0]),
    "weights must be as many as folders_or_states, at least one, got 1 for 2": ([FACTORS, FACTORS], [1.0]),
    "weights must be as many as folders_or_states, at least one, got 0 for 0": ([], []),
    "weights[0] must be a number, got str": ([FACTORS], ["1"]),
    "weights[0] must be finite, got nan": ([FACTORS], [float("nan")]),
    'method must be "cat" or "linear", got \'ties\'': ([FACTORS], [1.0], "ties"),
    "ranks of '0' must be equal for method=\"linear\", got [3, 4]": (
        [FACTORS, random_factors(4, 1.0, 0)], [1.0, 1.0], "linear",
    ),
    "ranks of '0' must add up to at most 512, got 513": ([FACTORS] * 171, [1.0] * 171),
    "updates of '0' must be (N, K) = (8, 6), got (5, 8)": ([FACTORS, {"0": FACTORS["2"]}], [1.0, 1.0]),
    "folders_or_states[0] must be a folder, an injected model, a dict of Factors, or a": ([3], [1.0]),
    "folders_or_states[0] must map names to Factors, got Tensor for '0'": ([{"0": torch.ones(3)}], [1.0]),
    "factors of '0' must be (R, K), (N, R) and a finite scale": ([{"0": TURNED}], [1.0]),
    "folders_or_states[0] must have fused layers, got a Sequential without": ([tiny_mlp()], [1.0]),
    "folder must be a directory on this machine": (["nowhere"], [1.0]),
    "adapters must train no biases, got some of '0'": ([injected_mlp(bias="all")], [1.0]),
}  # fmt: skip


@pytest.mark.parametrize("message", ERRORS, ids=str)
def test_errors_name_the_argument(message):
    kinds = (ValueError, TypeError, FileNotFoundError, NotImplementedError)
    with pytest.raises(kinds) as caught:
        lo.merge_adapters(*ERRORS[message])
    assert str(caught.value).startswith("merge_adapters: ")
    assert message in str(caught.value)


def test_a_folder_that_trains_biases_is_refused(tmp_path):
    lo.save_adapter(injected_mlp(bias="all"), tmp_path)
    with pytest.raises(NotImplementedError, match="adapters must train no biases, got '0.bias'"):
        lo.merge_adapters([tmp_path], [1.0])


def test_dense_and_sparse_adapters_merge(tmp_path):
    dense, sparse = dense_mlp(torch.float64), sparse_mlp(torch.float64)
    merged = lo.merge_adapters([dense, sparse], [0.5, 0.5])
    for name, own in merged.factors.items():
        parts = [0.5 * delta(Factors(*m.get_submodule(name).adapter.factors(None))) for m in (dense, sparse)]
        assert_to_rounding(delta(own), sum(parts).detach())

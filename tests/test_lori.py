"""LoRI: masks, sparse layers, the recipes, and what they promise about counts, bits and memory."""

import copy

import pytest
import torch
from lori_models import adamw_steps, adapted, dense_b, dense_mlp, sparse_mlp
from tiny_models import bits, points, stir, tiny_mlp
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lowrank_ops as lo
from lowrank_ops.largest import largest_entries
from lowrank_ops.seeded import draw_uniform, layer_seed

LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
# of release 0.1.0; files hold the seed and not A, so these may never change
GOLDEN_SEED = 4117733072516773929
GOLDEN_A = [
    [0.15854676067829132, 0.3603571355342865, 0.22905176877975464],
    [-0.3068244457244873, -0.16129028797149658, -0.11713714152574539],
]


def meta_llama() -> nn.Module:
    with torch.device("meta"):
        return lo.inject(LlamaForCausalLM(LlamaConfig(**LLAMA_3_8B)), lo.LoRIConfig(r=32))


def test_llama_3_8b_has_the_papers_counts_and_fits_in_20_mb():
    model = meta_llama()
    assert lo.report(model).trainable == 44_040_192
    masks = lo.lori.extract_masks(model, 0.9)
    assert sum(mask.nnz for mask in masks.values()) == 4_404_019
    lo.lori.sparsify(model, masks)
    assert lo.report(model).trainable == 4_404_019
    files = [layer.file_tensors() for layer in adapted(model).values()]
    assert len(files) == 224
    in_bf16 = sum(2 * t["b_values"].numel() + t["b_mask"].nbytes + t["a_seed"].nbytes for t in files)
    # the header of safetensors has some 100 bytes a tensor
    assert in_bf16 + 100 * 3 * 224 < 20e6


@pytest.mark.parametrize("form", ["dense", "sparse", "continued"])
def test_a_state_is_assigned_to_a_model_on_meta(form):
    model = dense_mlp() if form == "dense" else sparse_mlp()
    if form == "continued":
        lo.lori.train_only(model, lo.lori.extract_masks(model, 0.9))
    empty = copy.deepcopy(model).to("meta")
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(points()), model(points()))


def state_bytes(layer, optimizer) -> int:
    """Bytes of B, of its mask, of its gradient and of the optimizer's state; A is alike for both."""
    own = [*layer.adapter.parameters(), *(b for n, b in layer.adapter.named_buffers() if n != "a")]
    moments = [t for state in optimizer.state.values() for t in state.values()]
    return sum(t.nbytes for t in own + [p.grad for p in layer.adapter.parameters()] + moments)


def test_a_sparse_layer_trains_in_at_most_13_percent_of_the_memory():
    sizes = []
    for sparsity in (0.0, 0.9):
        model = lo.inject(nn.Sequential(nn.Linear(64, 512)), lo.LoRIConfig(r=32))
        if sparsity:
            stir(model)
            lo.lori.sparsify(model, lo.lori.extract_masks(model, sparsity))
        optimizer = torch.optim.AdamW(model[0].adapter.parameters(), foreach=False)
        model(torch.randn(3, 64)).sum().backward()
        optimizer.step()
        sizes.append(state_bytes(model[0], optimizer))
    assert sizes[1] <= 0.13 * sizes[0]


@pytest.mark.parametrize("make", [dense_mlp, sparse_mlp], ids=["dense", "sparse"])
def test_a_layer_keeps_m_times_r_numbers_and_not_its_input(make):
    layer = make()[0]
    x = points().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    own = [layer.weight, *layer.adapter.parameters(), *layer.adapter.buffers()]
    own = {t.untyped_storage().data_ptr() for t in own}
    activations = [t for t in kept if t.numel() and t.untyped_storage().data_ptr() not in own]
    assert sum(t.numel() for t in activations) == len(x) * 3
    assert all(t.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() for t in kept)


def test_a_is_a_function_of_seed_and_name_alone():
    torch.manual_seed(7)
    one = dense_mlp()
    torch.manual_seed(8)
    state = torch.get_rng_state()
    two, other = dense_mlp(torch.float64), lo.inject(tiny_mlp(), lo.LoRIConfig(r=3, seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    for place in (0, 2):
        a = one[place].adapter.a
        assert torch.equal(a.double(), two[place].adapter.a)
        assert not torch.equal(a, other[place].adapter.a)
    assert one[0].adapter.seed != one[2].adapter.seed


def test_a_stays_the_same_in_every_release():
    assert layer_seed(0, "model.layers.0.self_attn.q_proj") == GOLDEN_SEED
    a = draw_uniform(GOLDEN_SEED, 2, 3, dtype=torch.float32, device="cpu")
    assert torch.equal(a, torch.tensor(GOLDEN_A))


def test_a_is_uniform_with_the_variance_of_kaiming():
    a = draw_uniform(5, 64, 400, dtype=torch.float64, device="cpu")
    assert a.abs().max() < 1 / 20
    assert a.var().item() == pytest.approx(1 / 1200, rel=0.02)
    assert abs(a.mean().item()) < 3 * (1 / 1200 / a.numel()) ** 0.5
    gram = (a @ a.T).fill_diagonal_(0)
    assert gram.abs().max() < 5 * (400 / 1200**2) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [0, 1, 37, 150, 161])
def test_the_largest_entries_are_those_of_a_sort(dtype, count):
    generator = torch.Generator().manual_seed(0)
    tensors = {str(n): torch.randn(n, 7, generator=generator).to(dtype) for n in (1, 5, 17)}
    # bfloat16 has ties; stable sorting takes the first of them
    order = torch.cat([t.abs().flatten() for t in tensors.values()]).sort(descending=True, stable=True)
    expected = torch.zeros(161, dtype=torch.bool)
    expected[order.indices[:count]] = True
    actual = dict(largest_entries(tensors, count))
    assert list(actual) == list(tensors)
    assert torch.equal(torch.cat([t.flatten() for t in actual.values()]), expected)


def test_ties_are_taken_in_the_order_of_layers_and_rows():
    tensors = {"a": torch.tensor([[1.0, -2.0], [2.0, 0.0]]), "b": torch.tensor([[-2.0, 2.0], [3.0, -0.0]])}
    taken = dict(largest_entries(tensors, 3))
    assert taken["a"].tolist() == [[False, True], [True, False]]
    assert taken["b"].tolist() == [[False, False], [True, False]]


def test_masks_hold_exactly_the_share_that_is_asked_for():
    model = dense_mlp()
    magnitudes = torch.cat([b.abs().flatten() for b in dense_b(model).values()])
    for sparsity in (0.0, 0.1, 0.5, 0.9, 0.99):
        masks = lo.lori.extract_masks(model, sparsity)
        count = int((1 - sparsity) * 39)
        assert sum(mask.nnz for mask in masks.values()) == count
        taken = torch.cat([mask.to_dense().flatten() for mask in masks.values()])
        assert count in (0, 39) or magnitudes[taken].min() > magnitudes[~taken].max()


def test_equal_magnitudes_do_not_enlarge_the_masks():
    model = dense_mlp()
    for layer in adapted(model).values():
        nn.init.ones_(layer.adapter.b)
    assert [mask.nnz for mask in lo.lori.extract_masks(model, 0.5).values()] == [19, 0]


def test_zeros_are_never_kept():
    model = dense_mlp()
    for layer in adapted(model).values():
        nn.init.zeros_(layer.adapter.b)
    with pytest.raises(ValueError, match="model must be calibrated"):
        lo.lori.extract_masks(model)
    with torch.no_grad():
        model[0].adapter.b[1, 2] = -1e-30
    with pytest.warns(UserWarning, match="kept 1 entries of B and not 19"):
        masks = lo.lori.extract_masks(model, 0.5)
    assert [mask.nnz for mask in masks.values()] == [1, 0]
    assert masks["0"].to_dense()[1, 2]


def test_sparsify_starts_from_zero_with_the_same_a():
    model = dense_mlp()
    before = copy.deepcopy(model)
    masks = lo.lori.extract_masks(model, 0.5)
    assert lo.lori.sparsify(model, masks) is model
    x = points()
    assert torch.equal(model(x), tiny_mlp()(x))
    assert lo.report(model).trainable == 19
    for name, layer in adapted(model).items():
        assert torch.equal(layer.adapter.a, adapted(before)[name].adapter.a)
        assert layer.adapter.b.mask == masks[name] == lo.lori.masks_of(model)[name]


def test_resampled_a_is_new_and_survives_files(tmp_path):
    model = dense_mlp()
    before = model[0].adapter.a.clone()
    lo.lori.sparsify(model, lo.lori.extract_masks(model, 0.5), resample_a=True)
    assert not torch.equal(model[0].adapter.a, before)
    assert model[0].config.seed == model[2].config.seed != 0
    stir(model)
    lo.save_adapter(model, tmp_path)
    loaded = lo.load_adapter(tiny_mlp(), tmp_path)
    assert torch.equal(loaded(points()), model(points()))


def test_a_sparse_layer_computes_what_the_dense_one_does_with_its_b():
    sparse, dense = sparse_mlp(torch.float64), dense_mlp(torch.float64)
    for name, b in dense_b(sparse).items():
        adapted(dense)[name].adapter.b.data.copy_(b)
    x = points(torch.float64)
    torch.testing.assert_close(sparse(x), dense(x))
    for model in (sparse, dense):
        model(x).square().sum().backward()
    for name, layer in adapted(sparse).items():
        expected = layer.adapter.b.mask.pack(adapted(dense)[name].adapter.b.grad)
        torch.testing.assert_close(layer.adapter.b.values.grad, expected)


def test_sparse_training_equals_dense_training_with_masked_gradients():
    sparse, dense = sparse_mlp(torch.float64), dense_mlp(torch.float64)
    masks = {name: mask.to_dense() for name, mask in lo.lori.masks_of(sparse).items()}
    for name, layer in adapted(dense).items():
        layer.adapter.b.data *= masks[name]
        layer.adapter.b.register_hook(lambda grad, mask=masks[name]: grad * mask)
    for model in (sparse, dense):
        adamw_steps(model, 100, weight_decay=0.01, lr=0.01)
    for name, b in dense_b(sparse).items():
        torch.testing.assert_close(b, dense_b(dense)[name])
        assert not b[~masks[name]].any()


@pytest.mark.parametrize("make", [dense_mlp, sparse_mlp], ids=["from dense", "from sparse"])
def test_entries_outside_the_train_mask_keep_their_bits(make):
    model, task = make(), dense_mlp(seed=9)
    masks = lo.lori.extract_masks(task, 0.7)
    before, x = dense_b(model), points()
    y, support = model(x), lo.lori.masks_of(model)
    assert lo.lori.train_only(model, masks) is model
    assert torch.equal(model(x), y)
    assert lo.report(model).trainable == sum(mask.nnz for mask in masks.values()) == 11
    adamw_steps(model, 100, weight_decay=0.1)
    for name, b in dense_b(model).items():
        mask = masks[name].to_dense()
        assert torch.equal(bits(b[~mask]), bits(before[name][~mask]))
        assert (b[mask] != before[name][mask]).all()
        assert lo.lori.masks_of(model)[name] == support[name].union(masks[name])
    # the forward pass uses all of B, not the part that trains
    assert any((b * ~masks[name].to_dense()).any() for name, b in dense_b(model).items())


def test_a_sparse_layer_merges_and_unmerges():
    model = sparse_mlp(torch.float64)
    x, original = points(torch.float64), bits(model[0].weight)
    y = model(x)
    torch.testing.assert_close(lo.merge(model)(x), y)
    assert torch.equal(bits(lo.unmerge(model)[0].weight), original)
    torch.testing.assert_close(lo.eject(lo.merge(model))(x), y)


def test_layers_without_an_entry_train_along():
    model = dense_mlp()
    nn.init.constant_(model[2].adapter.b, 1e-9)
    lo.lori.sparsify(model, lo.lori.extract_masks(model, 0.5))
    assert model[2].adapter.b.nnz == 0
    adamw_steps(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert model[0].adapter.b.values.abs().min() > 0


@pytest.mark.parametrize("own_calibration", [False, True])
def test_the_recipe_is_its_steps(own_calibration):
    seen = []

    def train(model, steps=3):
        seen.append((steps, lo.report(model).trainable))
        adamw_steps(model, steps)

    calibrate = (lambda model: train(model, 2)) if own_calibration else None
    model = lo.lori.fit(
        tiny_mlp(), train, lo.LoRIConfig(r=3, lora_alpha=6), calibrate=calibrate, sparsity=0.5
    )
    assert seen == [(2 if own_calibration else 3, 39), (3, 19)]
    steps = lo.inject(tiny_mlp(), lo.LoRIConfig(r=3, lora_alpha=6))
    (calibrate or train)(steps)
    lo.lori.sparsify(steps, lo.lori.extract_masks(steps, 0.5))
    train(steps)
    assert torch.equal(model(points()), steps(points()))


def test_a_sparse_model_compiles_into_one_graph():
    model = lo.lori.train_only(sparse_mlp(), lo.lori.extract_masks(dense_mlp(seed=9), 0.7))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = points()
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    model(x).square().sum().backward()
    torch.testing.assert_close([p.grad for p in model.parameters() if p.requires_grad], grads)


def test_copies_and_casts_go_together_with_the_mask():
    model = sparse_mlp()
    y = model(points())
    assert torch.equal(copy.deepcopy(model)(points()), y)
    assert model.double()(points(torch.float64)).dtype is torch.float64
    assert model[0].adapter.b.words.dtype is torch.int32

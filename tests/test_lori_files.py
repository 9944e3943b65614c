"""LoRI's files, state dicts and exports; and every message of its functions."""

import re

import pytest
import torch
from lori_models import adamw_steps, adapted, dense_mlp, sparse_mlp
from tiny_models import bits, points, stir, tiny_llama, tiny_mlp, tokens
from torch import nn

import lowrank_ops as lo


def test_a_continued_adapter_survives_files_and_state_dicts(tmp_path):
    model = lo.lori.train_only(sparse_mlp(), lo.lori.extract_masks(dense_mlp(seed=9), 0.7))
    adamw_steps(model)
    lo.save_adapter(model, tmp_path)
    loaded = lo.load_adapter(tiny_mlp(), tmp_path)
    twin = lo.lori.train_only(sparse_mlp(), lo.lori.extract_masks(dense_mlp(seed=9), 0.7))
    twin.load_state_dict(model.state_dict())
    for other in (loaded, twin):
        assert torch.equal(other(points()), model(points()))
        adamw_steps(other)
    adamw_steps(model)
    assert torch.equal(loaded(points()), model(points()))


@pytest.mark.parametrize("make", [dense_mlp, sparse_mlp], ids=["dense", "sparse"])
@pytest.mark.parametrize("target", ["plain", "dense", "sparse", "same"])
def test_files_bring_back_every_bit(make, target, tmp_path):
    model = make()
    lo.save_adapter(model, tmp_path)
    plain = {
        "plain": tiny_mlp,
        "dense": lambda: dense_mlp(seed=5),
        "sparse": lambda: sparse_mlp(sparsity=0.8),
    }
    loaded = {**plain, "same": make}[target]()
    kept = [p for p in loaded.parameters() if p.requires_grad]
    if target == "same":
        stir(loaded, seed=6)
    assert lo.load_adapter(loaded, tmp_path) is loaded
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(bits(t), bits(expected[name])) for name, t in loaded.state_dict().items())
    assert torch.equal(loaded(points()), model(points()))
    assert lo.report(loaded).trainable == lo.report(model).trainable
    # an optimizer of a model that was as the files are stays valid
    assert target != "same" or all(any(p is q for q in loaded.parameters()) for p in kept)


def test_a_file_in_bfloat16_loads_as_it_was_saved(tmp_path):
    model = sparse_mlp()
    lo.save_adapter(model, tmp_path, dtype=torch.bfloat16)
    loaded = lo.load_adapter(tiny_mlp(), tmp_path)
    for name, layer in adapted(loaded).items():
        values = adapted(model)[name].adapter.b.values
        assert layer.adapter.b.values.dtype is torch.float32
        assert torch.equal(layer.adapter.b.values, values.bfloat16().float())


def test_a_sparse_file_holds_values_and_bits_alone(tmp_path):
    from safetensors import safe_open

    model = sparse_mlp()
    lo.save_adapter(model, tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        found = {key: (tuple(file.get_tensor(key).shape), file.get_tensor(key).dtype) for key in file.keys()}  # noqa: SIM118
    nnz = model[0].adapter.b.nnz
    assert found["0.b_values"] == ((nnz,), torch.float32)
    assert found["0.b_mask"] == ((8, 1), torch.int32)
    assert found["0.a_seed"] == ((3,), torch.int64)
    assert len(found) == 6
    assert lo.lori.read_masks(tmp_path) == lo.lori.masks_of(model)


def test_a_state_dict_brings_its_own_a():
    model = dense_mlp()
    other = lo.inject(tiny_mlp(), lo.LoRIConfig(r=3, lora_alpha=6, seed=1))
    assert not any(key.endswith(".a") for key in model.state_dict())
    assert other.load_state_dict(model.state_dict()) == ([], [])
    assert torch.equal(other(points()), model(points()))


def test_the_whole_of_a_llama_is_adapted_and_exported_to_peft(tmp_path):
    from peft import PeftModel

    model = lo.inject(tiny_llama(), lo.LoRIConfig(r=4, lora_alpha=8))
    assert lo.report(model).layers == 14
    stir(model)
    lo.lori.sparsify(model, lo.lori.extract_masks(model, 0.9), keep_values=True)
    y = model(tokens()).logits
    lo.lori.export_peft(model, tmp_path)
    torch.testing.assert_close(lo.load_adapter(tiny_llama(), tmp_path)(tokens()).logits, y)
    torch.testing.assert_close(PeftModel.from_pretrained(tiny_llama(), tmp_path)(tokens()).logits, y)


def test_a_wrapped_model_is_taken_as_the_one_inside(tmp_path):
    model, wrapped = sparse_mlp(), nn.DataParallel(dense_mlp())
    masks = lo.lori.extract_masks(wrapped, 0.5)
    assert masks == lo.lori.masks_of(model)
    assert lo.lori.sparsify(wrapped, masks, keep_values=True) is wrapped
    assert torch.equal(wrapped(points()), model(points()))


def test_parameters_are_not_replaced_behind_a_reducer(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(dense_mlp())
        masks = lo.lori.extract_masks(model)
        for change in (lo.lori.sparsify, lo.lori.train_only):
            message = f"{change.__name__}: model must not be in DistributedDataParallel"
            with pytest.raises(ValueError, match=message):
                change(model, masks)
    finally:
        torch.distributed.destroy_process_group()


def test_a_seed_out_of_range_is_refused():
    for seed, error in ((-1, ValueError), (2**63, ValueError), (True, TypeError), (1.5, TypeError)):
        with pytest.raises(error, match="LoRIConfig: seed must be"):
            lo.LoRIConfig(seed=seed)


FULL = {
    n: lo.SparseMask.from_dense(torch.ones(s, dtype=torch.bool)) for n, s in (("0", (8, 3)), ("2", (5, 3)))
}
ERRORS = {
    "extract_masks: sparsity must be in [0, 1), got 1.0": lambda m, d: lo.lori.extract_masks(m, 1.0),
    "extract_masks: sparsity must be a number, got str": lambda m, d: lo.lori.extract_masks(m, "0.9"),
    "extract_masks: model must have LoRI layers, got a Sequential": lambda m, d: lo.lori.extract_masks(
        tiny_mlp()
    ),
    "masks_of: model must have LoRI layers, got 'lora' at '0'": lambda m, d: lo.lori.masks_of(
        lo.inject(tiny_mlp(), lo.LoRAConfig(r=3))
    ),
    "sparsify: masks must fit the layers of the model, got some that lack '2'": lambda m, d: lo.lori.sparsify(
        m, {"0": FULL["0"]}
    ),
    "sparsify: masks must fit the layers of the model, got some that add '3'": lambda m, d: lo.lori.sparsify(
        m, {**FULL, "3": FULL["2"]}
    ),
    "sparsify: mask of '2' must be (N, R) = (5, 3), got (8, 3)": lambda m, d: lo.lori.sparsify(
        m, {**FULL, "2": FULL["0"]}
    ),
    "sparsify: mask of '2' must be a SparseMask, got Tensor": lambda m, d: lo.lori.sparsify(
        m, {**FULL, "2": torch.ones(5, 3)}
    ),
    "sparsify: masks must be a dict, got list": lambda m, d: lo.lori.sparsify(m, [FULL]),
    "sparsify: layer '0' must not be merged, got merged": lambda m, d: lo.lori.sparsify(lo.merge(m), FULL),
    "train_only: masks must fit the layers of the model, got some that lack '0'": lambda m, d: (
        lo.lori.train_only(m, {})
    ),
    "fit: train must be callable, got NoneType": lambda m, d: lo.lori.fit(m, None),
    "fit: calibrate must be callable, got int": lambda m, d: lo.lori.fit(m, print, calibrate=3),
    "fit: sparsity must be in [0, 1), got -0.1": lambda m, d: lo.lori.fit(m, print, sparsity=-0.1),
    "fit: B of '0' must be dense, got a sparse one": lambda m, d: lo.lori.fit(sparse_mlp(), print),
    "read_masks: folder must hold a sparse adapter, got a dense B of '0'": lambda m, d: lo.lori.read_masks(
        lo.save_adapter(m, d) or d
    ),
    "read_masks: folder must hold a LoRI adapter, got one of 'LORA'": lambda m, d: lo.lori.read_masks(
        lo.lori.export_peft(m, d) or d
    ),
    "export_peft: dtype must be a floating torch.dtype or None, got torch.int8": lambda m, d: (
        lo.lori.export_peft(m, d, dtype=torch.int8)
    ),
    "save_adapter: dtype must be a floating torch.dtype or None, got 'bf16'": lambda m, d: lo.save_adapter(
        m, d, dtype="bf16"
    ),
}


@pytest.mark.parametrize("message", ERRORS, ids=str)
def test_errors_name_the_argument_and_change_nothing(message, tmp_path):
    model = dense_mlp()
    before = {name: bits(t) for name, t in model.state_dict().items()}
    with pytest.raises((ValueError, TypeError)) as caught:
        ERRORS[message](model, tmp_path / "adapter")
    assert message in str(caught.value)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(bits(t), before[name]) for name, t in after.items())


def test_a_b_that_is_not_finite_gives_no_masks():
    model = dense_mlp()
    with torch.no_grad():
        model[2].adapter.b[0, 0] = torch.nan
    with pytest.raises(ValueError, match="B of '2' must be finite"):
        lo.lori.extract_masks(model)


BROKEN = {
    "b_values of '0' must be (nnz,)": lambda t: {**t, "b_values": t["b_values"][:-1]},
    "b_mask of '0' must be a mask's words": lambda t: {**t, "b_mask": t["b_mask"][:, :0]},
    "b of '0' must be (N, R) = (8, 3)": lambda t: {"a_seed": t["a_seed"], "b": torch.zeros(7, 3)},
    "a_seed of '0' must be (3,) of torch.int64": lambda t: {**t, "a_seed": t["a_seed"].float()},
    "a of '0' must be (R, K) = (3, 6), got (3, 7)": lambda t: {**t, "a_seed": torch.tensor([1, 3, 7])},
    "adapter must hold a_seed and b": lambda t: {"b_values": t["b_values"]},
    "b_train_mask of '0' must lie inside b_mask": lambda t: {
        **t,
        "b_train_mask": torch.full((8, 1), 7).int(),
    },
}


@pytest.mark.parametrize("message", BROKEN, ids=str)
def test_broken_files_are_refused(message):
    model = sparse_mlp()
    adapter = model[0].adapter
    with pytest.raises(ValueError, match=re.escape(message)):
        adapter.prepare_load("load_adapter", "0", BROKEN[message](adapter.file_tensors()))

"""One flat parameter trains what the single ones would have become, bit for bit."""

import copy

import pytest
import torch
import torch.distributed as dist
from lori_models import dense_mlp, sparse_mlp
from tiny_models import assert_untouched, bits, fingerprint, injected_mlp, points, stir, tiny_mlp
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowrank_ops as lo


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def steps(model, parameters, count, *, passes=1, norm=None, set_to_none=True, optimizer=torch.optim.AdamW):
    optimizer = optimizer(parameters, lr=0.1, weight_decay=0.1)
    for step in range(count):
        for i in range(passes):
            model(points(seed=10 * step + i)).square().sum().backward()
        if norm is not None:
            nn.utils.clip_grad_norm_(parameters, norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)


def assert_same_bits(one, other):
    state, expected = one.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert torch.equal(bits(tensor), bits(expected[name])), name


def assert_same_gradients(flat, model):
    values = torch.cat([p.grad.flatten() for p in trained(model)])
    assert (values != 0).any()
    torch.testing.assert_close(flat.grad[flat.grad != 0], values[values != 0])


def denselora_mlp():
    return stir(lo.inject(tiny_mlp(), lo.DenseLoRAConfig(r=3, target_modules=["0", "2"])))


def salr_mlp():
    return stir(lo.inject(tiny_mlp(), lo.SALRConfig(r=3, residual_rank=2)))


MODELS = [injected_mlp, dense_mlp, sparse_mlp, denselora_mlp, salr_mlp]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_twenty_steps_of_adamw_give_the_bits_of_single_parameters(make, set_to_none):
    one, other = make(), make()
    steps(one, [lo.flat_parameter(one)], 20, set_to_none=set_to_none)
    steps(other, trained(other), 20, set_to_none=set_to_none)
    assert_same_bits(one, other)


def test_gradients_accumulate_over_backward_passes_and_from_before():
    one, other = sparse_mlp(), sparse_mlp()
    for model in (one, other):
        model(points(seed=99)).sum().backward()
    flat = lo.flat_parameter(one)
    assert all(p.grad is None for p in trained(one))
    steps(one, [flat], 3, passes=3, optimizer=torch.optim.SGD)
    steps(other, trained(other), 3, passes=3, optimizer=torch.optim.SGD)
    assert_same_bits(one, other)


def test_clipping_the_flat_gradient_clips_by_the_norm_of_all():
    one, other = sparse_mlp(torch.float64), sparse_mlp(torch.float64)
    flat = lo.flat_parameter(one)
    for model in (one, other):
        model(points(torch.float64)).square().sum().backward()
    norm = nn.utils.clip_grad_norm_([flat], 0.01)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(trained(other), 0.01))
    assert_same_gradients(flat, other)


def test_each_tensor_is_a_view_at_a_multiple_of_128_bytes_and_the_gaps_stay_zero():
    model = sparse_mlp()
    before = [p.detach().clone() for p in trained(model)]
    flat = lo.flat_parameter(model)
    steps(model, [flat], 3)
    parameters, inside = trained(model), torch.zeros(flat.numel(), dtype=torch.bool)
    for p, old in zip(parameters, before, strict=True):
        start = (p.data_ptr() - flat.data_ptr()) // p.element_size()
        assert (start * p.element_size()) % 128 == 0
        assert torch.equal(flat[start : start + p.numel()], p.flatten())
        assert not torch.equal(p, old)
        inside[start : start + p.numel()] = True
    assert not flat[~inside].any()
    assert flat.numel() == 32 * len(parameters)


def test_entries_that_do_not_train_keep_their_bits():
    model = sparse_mlp()
    masks = lo.lori.masks_of(model)
    lo.lori.train_only(model, {name: half(mask) for name, mask in masks.items()})
    kept = {name: bits(layer.adapter.b.kept) for name, layer in layers(model).items()}
    before = {name: layer.adapter.b.dense().detach().clone() for name, layer in layers(model).items()}
    steps(model, [lo.flat_parameter(model)], 5)
    for name, layer in layers(model).items():
        b, trains = layer.adapter.b.dense(), half(masks[name]).to_dense()
        assert torch.equal(bits(b[~trains]), bits(before[name][~trains]))
        assert (b[trains] != before[name][trains]).all()
        assert torch.equal(bits(layer.adapter.b.kept), kept[name])


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, lo.FusedMaskedLoRALinear)}


def half(mask):
    dense = mask.to_dense()
    dense[::2] = False
    return lo.SparseMask.from_dense(dense)


def test_state_dicts_and_adapter_files_are_those_of_single_parameters(tmp_path):
    one, other = sparse_mlp(), sparse_mlp()
    flat = lo.flat_parameter(one)
    assert_same_bits(one, other)
    for name, model in (("one", one), ("other", other)):
        lo.save_adapter(model, tmp_path / name)
    names = [path.name for path in (tmp_path / "other").iterdir()]
    assert all((tmp_path / "one" / n).read_bytes() == (tmp_path / "other" / n).read_bytes() for n in names)
    assert names
    steps(other, trained(other), 2)
    one.load_state_dict(other.state_dict())
    assert_same_bits(one, other)
    lo.load_adapter(one, tmp_path / "one")
    steps(one, [flat], 2)
    assert_same_bits(one, other)


def test_the_optimizers_state_resumes_a_run():
    first, second = sparse_mlp(), stir(sparse_mlp(), seed=5)
    flats = [lo.flat_parameter(first), lo.flat_parameter(second)]
    optimizers = [torch.optim.AdamW([flat]) for flat in flats]
    first(points()).sum().backward()
    optimizers[0].step()
    second.load_state_dict(first.state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for model, optimizer in zip((first, second), optimizers, strict=True):
        optimizer.zero_grad()
        model(points(seed=5)).sum().backward()
        optimizer.step()
    assert_same_bits(first, second)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_regions_give_the_same_gradients(use_reentrant):
    one, other = injected_mlp(), injected_mlp()
    flat = lo.flat_parameter(one)
    x = points().requires_grad_()
    hidden = checkpoint(one[0], x, use_reentrant=use_reentrant)[:, :6]
    checkpoint(one, hidden, use_reentrant=use_reentrant).sum().backward()
    other(other[0](x)[:, :6]).sum().backward()
    assert_same_gradients(flat, other)


def test_a_backward_pass_that_fails_leaves_no_gradient():
    model = injected_mlp()
    flat = lo.flat_parameter(model)
    x = points().requires_grad_()
    x.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x).sum().backward()
    assert flat.grad is None
    other = injected_mlp()
    for one in (model, other):
        one(points()).sum().backward()
    assert_same_gradients(flat, other)


def test_groups_with_learning_rates_of_their_own_become_a_flat_parameter_each():
    def groups(model, wrap):
        of_a = [layer.adapter.a for layer in (model[0], model[2])]
        of_b = [layer.adapter.b for layer in (model[0], model[2])]
        return [{"params": wrap(model, of_a)}, {"params": wrap(model, of_b), "lr": 0.01}]

    models = [injected_mlp(), injected_mlp()]
    wraps = [lambda model, group: [lo.flat_parameter(model, group)], lambda model, group: group]
    for model, wrap in zip(models, wraps, strict=True):
        optimizer = torch.optim.AdamW(groups(model, wrap), lr=0.1)
        for seed in range(3):
            model(points(seed=seed)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_bits(*models)


def test_a_copy_of_the_model_has_parameters_of_its_own():
    model = sparse_mlp()
    flat = lo.flat_parameter(model)
    twin = copy.deepcopy(model)
    twin(points()).sum().backward()
    assert flat.grad is None
    assert all(p.grad is not None for p in trained(twin))
    steps(twin, [lo.flat_parameter(twin)], 1)
    assert_same_bits(model, sparse_mlp())


def test_parameters_that_left_the_flat_one_are_an_error_in_backward():
    model = injected_mlp()
    flat = lo.flat_parameter(model)
    model.double()
    with pytest.raises(RuntimeError, match="flat_parameter: parameter '.*' must be the view of the flat"):
        model(points(torch.float64)).sum().backward()
    assert flat.grad is None


def mixed():
    model = injected_mlp()
    model[2].adapter.double()
    return model


def pruning():
    return lo.inject(tiny_mlp(), lo.SALORConfig(r=3))


def flattened():
    model = injected_mlp()
    lo.flat_parameter(model, [model[2].adapter.b])
    return model


def frozen(model):
    return [model[0].base.weight]


ERRORS = {
    "model must be an nn.Module, got str": (str, None),
    "parameters must be an iterable of parameters or None, got Parameter": (
        injected_mlp,
        lambda m: m[0].adapter.a,
    ),
    "parameters must be those of model, got one that it does not have": (
        injected_mlp,
        lambda m: [nn.Parameter()],
    ),
    "model must have parameters that require a gradient, got none": (
        lambda: tiny_mlp().requires_grad_(False),
        None,
    ),
    "'0.base.weight' must require a gradient, got a frozen parameter": (injected_mlp, frozen),
    "'0.adapter.a' must hold numbers, got a parameter on meta": (lambda: injected_mlp().to("meta"), None),
    "'2.adapter.b' must not be part of a flat parameter, got one that is": (flattened, None),
    "parameters must share dtype and device, got torch.float32 on cpu for '0.adapter.a', torch.float64": (
        mixed,
        None,
    ),
    "adapter of '0' must be in its compact form, got one that is still pruned": (pruning, None),
}


@pytest.mark.parametrize("message", ERRORS)
def test_what_cannot_be_flat_is_an_error_that_changes_nothing(message):
    make, pick = ERRORS[message]
    model = make()
    before = fingerprint(model) if isinstance(model, nn.Module) else None
    with pytest.raises((ValueError, TypeError)) as error:
        lo.flat_parameter(model, pick and pick(model))
    assert str(error.value).startswith(f"flat_parameter: {message}")
    if before is not None:
        assert_untouched(before, model)


def test_distributed_data_parallel_is_refused(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(injected_mlp())
        with pytest.raises(ValueError, match="flat_parameter: model must not be in DistributedDataParallel"):
            lo.flat_parameter(model)
    finally:
        dist.destroy_process_group()

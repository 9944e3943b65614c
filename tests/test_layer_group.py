"""Linked layers: computed together where that is right, alone where anything else is."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from linked_layers import alone, count_joint, linked, points
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint

import lowrank_ops as lo
from lowrank_ops.layer_group import LayerGroup


@pytest.fixture
def joint(monkeypatch) -> list[int]:
    """Collect the sizes of all joint computations."""
    return count_joint(monkeypatch)


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, nn.Module._replicate_for_data_parallel], ids=lambda f: f.__name__
)
def test_a_copy_of_one_layer_computes_alone(duplicate, joint):
    q, k, v = linked()
    x = points()
    other = duplicate(q)
    with torch.no_grad():
        assert torch.equal(other(x), alone(q, x))
        assert joint == []
        for layer in (q, k, v):
            assert torch.equal(layer(x), alone(layer, x))
    assert joint == [3]


def test_a_pickled_layer_takes_no_sibling_with_it():
    q, *_ = linked()
    assert len(pickle.dumps(q)) < 1.5 * len(pickle.dumps(linked(1)[0]))


def test_layers_die_without_the_garbage_collector():
    gc.disable()
    try:
        layers = linked()
        dead = [weakref.ref(layer) for layer in layers]
        with torch.no_grad():
            layers[0](points())
        del layers
        assert [ref() for ref in dead] == [None] * 3
    finally:
        gc.enable()


def results_of(group: LayerGroup) -> list[Tensor]:
    return [y for pending in group._pending.values() for y, *_ in pending.results.values()]


def test_results_that_nobody_takes_go_with_x_and_the_group_stops(joint):
    for grad in (False, True):
        q, k, v = linked()
        group, x = q.group, points()
        with torch.set_grad_enabled(grad):
            y = q(x)
        assert len(results_of(group)) == 2
        del x
        if grad:
            y.sum().backward()
        assert results_of(group) == []
        assert not group.active
        x = points()
        assert torch.equal(q(x), alone(q, x))
    assert joint == [3, 3]


def test_another_tensor_is_computed_alone_and_stops_the_group(joint):
    q, k, v = linked()
    x, other = points(), points() + 1
    for _ in range(2):
        ys = [q(x), k(other), v(other)]
        for layer, y, t in zip((q, k, v), ys, (x, other, other), strict=True):
            assert torch.equal(y, alone(layer, t))
        assert results_of(q.group) == []
    assert joint == [3]


def test_an_equal_tensor_is_not_the_same(joint):
    q, k, _ = linked()
    x = points()
    q(x)
    k(x.view_as(x))
    assert not q.group.active


def merge_k(q, k, v, x):
    k.merge()


def change_b(q, k, v, x):
    with torch.no_grad():
        k.adapter.b.mul_(2)


def replace_b(q, k, v, x):
    k.adapter.b = nn.Parameter(k.adapter.b.detach() * 2)


def train_w(q, k, v, x):
    k.base.weight.requires_grad_(True)


def change_bias(q, k, v, x):
    with torch.no_grad():
        k.base.bias.add_(1)


def change_x(q, k, v, x):
    x.add_(1)


def change_impl(q, k, v, x):
    k.impl = "reference"


def take_out(q, k, v, x):
    k.group = None


BETWEEN = [merge_k, change_b, replace_b, train_w, change_bias, change_x, change_impl, take_out]


@pytest.mark.parametrize("between", BETWEEN)
def test_a_result_that_has_gone_stale_is_not_taken(between, joint):
    q, k, v = linked()
    x = points()
    q(x)
    between(q, k, v, x)
    y, want = k(x), alone(k, x)
    assert torch.equal(y, want)
    if not k.merged:
        trained = [t for t in k.parameters() if t.requires_grad]
        grads = zip(*(torch.autograd.grad(t.sum(), trained) for t in (y, want)), strict=True)
        assert all(torch.equal(got, expected) for got, expected in grads)


def test_grad_mode_autocast_and_training_belong_to_the_situation():
    for context in (torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.inference_mode()):
        q, k, _ = linked()
        x = points()
        q(x)
        with context:
            y, want = k(x), alone(k, x)
        assert torch.equal(y, want)
        assert (y.dtype, y.requires_grad) == (want.dtype, want.requires_grad)
    q, k, _ = (layer.train() for layer in linked(lora_dropout=0.5))
    x = points()
    q(x)
    assert torch.equal(k.eval()(x), alone(k, x))


def test_what_inference_mode_made_is_computed_alone(joint):
    layers = linked()
    with torch.inference_mode():
        x = points()
        for layer in layers:
            assert torch.equal(layer(x), alone(layer, x))
    assert joint == []
    assert layers[0].group.active


def test_layers_called_and_differentiated_one_by_one_get_their_gradients():
    layers = linked()
    x = points()
    for layer in layers:
        layer(x).sum().backward()
    for layer in layers:
        expected = torch.autograd.grad(alone(layer, x).sum(), layer.adapter.b)[0]
        torch.testing.assert_close(layer.adapter.b.grad, expected)


def hook(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda *_: None)


def backward_hook(layer: nn.Module) -> None:
    layer.register_full_backward_hook(lambda *_: None)


def own_forward(layer: nn.Module) -> None:
    layer.forward = lambda x: 2 * lo.FusedLoRALinear.forward(layer, x)


def other_dropout(layer: lo.FusedLoRALinear) -> None:
    layer.train().dropout_p = 0.999


def other_adapter_dtype(layer: lo.FusedLoRALinear) -> None:
    layer.adapter.double()
    layer.base.double()


def mixed_adapter(layer: lo.FusedLoRALinear) -> None:
    layer.adapter.b.data = layer.adapter.b.data.double()


def flat_weight(layer: lo.FusedLoRALinear) -> None:
    layer.base.weight = nn.Parameter(layer.base.weight.detach().flatten(), requires_grad=False)


def parametrized(layer: lo.FusedLoRALinear) -> None:
    register_parametrization(layer.base, "weight", nn.Identity())


BROKEN = [other_adapter_dtype, mixed_adapter, flat_weight]
MISFITS = [lo.FusedLoRALinear.merge, hook, backward_hook, own_forward, other_dropout, parametrized, *BROKEN]


@pytest.mark.parametrize("unfit", MISFITS, ids=lambda f: f.__name__)
def test_a_layer_that_does_not_fit_is_left_out(unfit, joint):
    q, k, v = linked()
    unfit(k)
    x = points()
    for _ in range(2):
        assert torch.equal(q(x), alone(q, x))
        if unfit not in BROKEN:
            k(x)
        assert torch.equal(v(x), alone(v, x))
    assert joint in ([2, 2], [2])
    assert q.group.active == (joint == [2, 2])


def test_a_layer_that_was_deleted_or_switched_off_is_left_out(joint):
    layers = linked()
    x = points()
    layers[1].group = None
    ys = [layer(x) for layer in layers]
    assert joint == [2]
    assert all(torch.equal(y, alone(layer, x)) for layer, y in zip(layers, ys, strict=True))
    layers = linked()
    del layers[1]
    ys = [layer(x) for layer in layers]
    assert joint == [2, 2]
    assert all(torch.equal(y, alone(layer, x)) for layer, y in zip(layers, ys, strict=True))


def test_the_layers_own_error_is_raised_for_a_bad_input():
    q, *_ = linked()
    with pytest.raises(ValueError, match=r"^lora_linear: x must be \(..., K\) with K = 6"):
        q(torch.ones(2, 5))
    with pytest.raises(TypeError, match="^lora_linear: w must have the dtype of x"):
        q(torch.ones(2, 6).double())


def one_region_each(q, k, v, x):
    return [checkpoint(lambda t, f=f: torch.sigmoid(f(t)), x, use_reentrant=False) for f in (q, k, v)]


def another_tensor_for_k(q, k, v, x):
    return [
        checkpoint(lambda t: torch.sigmoid(q(t)) * torch.sigmoid(k(t + 1)) * v(t), x, use_reentrant=False)
    ]


def q_alone(q, k, v, x):
    return [checkpoint(lambda t: torch.sigmoid(q(t)), x, use_reentrant=False)]


def end_before_k(q, k, v, x):
    # saves nothing after q, so that repeating it stops there
    return [checkpoint(lambda t: torch.sigmoid(q(t)) + k(t) + v(t), x, use_reentrant=False)]


@pytest.mark.parametrize("run", [one_region_each, another_tensor_for_k, q_alone, end_before_k])
def test_checkpointed_regions_are_repeated_as_they_were(run):
    layers = linked()
    for _ in range(3):
        x = points().requires_grad_()
        results = []
        for grouped in (True, False):
            group = layers[0].group
            for layer in layers:
                layer.group = group if grouped else None
            wanted = [x, *(t for layer in layers for t in layer.parameters() if t.requires_grad)]
            ys = run(*layers, x)
            results.append(torch.autograd.grad([y.sum() for y in ys], wanted, allow_unused=True))
            for layer in layers:
                layer.group = group
        for got, want in zip(*results, strict=True):
            assert (got is None) == (want is None)
            if got is not None:
                torch.testing.assert_close(got, want)


def test_a_copy_keeps_the_order_of_its_layers(joint):
    layers = linked()
    *_, v, k, q = copy.deepcopy(nn.ModuleList(layers[::-1]))
    for i in range(2):
        x = points() + i
        for layer, other in zip((q, k, v), layers, strict=True):
            assert torch.equal(layer(x), alone(other, x))
    assert joint == [3, 3]


def test_a_checkpointed_region_of_a_compiled_graph_computes_each_alone():
    q, k, v = linked()
    region = lambda t: torch.sigmoid(q(t)) * k(t) + v(t)  # noqa: E731
    run = lambda t: checkpoint(region, t, use_reentrant=False)  # noqa: E731
    x = points()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got, want = compiled(x), run(x)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(y.sum(), [q.adapter.b, k.adapter.b, v.adapter.b]) for y in (got, want)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


class Broken(nn.Module):
    """Three layers on one tensor, with a break in the compiled graph after the first."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = linked()

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        q = self.q(x)
        torch._dynamo.graph_break()
        return q + self.k(other) + self.v(x)


def test_compiled_code_takes_results_across_a_break_and_stops_where_it_cannot():
    model, x = Broken(), points()
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x, x), model(x, x))
    assert model.q.group.active
    for _ in range(2):
        other = x + 1
        torch.testing.assert_close(
            compiled(x, other), alone(model.q, x) + alone(model.k, other) + alone(model.v, x)
        )
    assert not model.q.group.active
    assert model.q.group._traced is None


def test_layers_compiled_one_by_one_share_or_stop():
    q, k, v = layers = linked()
    x = points()
    compiled = [torch.compile(layer, fullgraph=True, backend="aot_eager") for layer in layers]
    for _ in range(2):
        for layer, function in zip(layers, compiled, strict=True):
            torch.testing.assert_close(function(x), alone(layer, x))
    assert q.group.active
    compiled[0](x)
    torch.testing.assert_close(q(x), alone(q, x))
    assert not q.group.active
    assert q.group._traced is None


def test_threads_do_not_take_each_others_results():
    layers = linked()
    wrong = []

    def work(seed: int) -> None:
        for i in range(200):
            x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1000 * seed + i))
            with torch.no_grad():
                ys = [layer(x) for layer in layers]
                wrong.extend(
                    1
                    for layer, y in zip(layers, ys, strict=True)
                    if not torch.equal(
                        y,
                        lo.lora_linear(
                            x,
                            layer.weight,
                            *layer.adapter.factors(layer.weight)[:2],
                            layer.bias,
                            scale=layer.adapter.scale,
                        ),
                    )
                )

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert layers[0].group.active

"""masked_lora_linear on the reference: against lora_linear with a dense b, and what is kept for backward."""

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lowrank_ops import SparseMask, lora_linear, masked_lora_linear

# (M, N, K, R): even, ragged in every size and more ranks than a word holds, one token, no token
SHAPES = [(64, 48, 32, 8), (33, 50, 17, 40), (1, 16, 128, 32), (0, 5, 6, 2)]


def make_mask(N: int, R: int, density: float = 0.3) -> SparseMask:
    chosen = torch.rand(N, R, generator=torch.Generator().manual_seed(N + R)) < density
    # rows of every kind
    chosen[0], chosen[-1] = False, True
    return SparseMask.from_dense(chosen)


def make_inputs(
    M: int,
    N: int,
    K: int,
    R: int,
    trains=(True,) * 5,
    dtype=torch.float64,
    mask: SparseMask | None = None,
) -> tuple[list[Tensor], SparseMask]:
    """Return x, w, a, b_values, bias, and the mask."""
    mask = make_mask(N, R) if mask is None else mask
    generator = torch.Generator().manual_seed(M + N + K + R)
    sizes = [(M, K), (N, K), (R, K), (mask.nnz,), (N,)]
    tensors = [
        torch.randn(*size, dtype=dtype, generator=generator).requires_grad_(flag)
        for size, flag in zip(sizes, trains, strict=True)
    ]
    return tensors, mask


def masked(tensors: list[Tensor], mask: SparseMask, **options) -> Tensor:
    x, w, a, values, bias = tensors
    return masked_lora_linear(x, w, a, values, mask, bias, **options)


def dense(tensors: list[Tensor], mask: SparseMask, **options) -> Tensor:
    x, w, a, values, bias = tensors
    return lora_linear(x, w, a, mask.unpack(values), bias, **options)


def gradients(y: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad((y * torch.arange(y.numel(), dtype=y.dtype).view_as(y)).sum(), tensors)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients_are_those_of_a_dense_b_to_the_bit(shape, p):
    tensors, mask = make_inputs(*shape)
    results = []
    for layer in (masked, dense):
        torch.manual_seed(3)
        y = layer(tensors, mask, scale=0.5, dropout_p=p)
        results.append([y, *gradients(y, tensors)])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


# every branch of backward: all; each alone; x, a and the values two at a time
TRAINS = ["11111", "10000", "01000", "00100", "00010", "00001", "10100", "10010", "00110"]


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("trains", TRAINS)
def test_gradients_match_finite_differences(trains, p):
    tensors, mask = make_inputs(3, 4, 5, 3, [flag == "1" for flag in trains])

    def apply(*tensors: Tensor) -> Tensor:
        torch.manual_seed(1)
        return masked(tensors, mask, scale=0.5, dropout_p=p)

    assert torch.autograd.gradcheck(apply, tensors)


def test_a_full_mask_gives_lora_linear_exactly():
    full = SparseMask.from_dense(torch.ones(10, 4, dtype=torch.bool))
    tensors, _ = make_inputs(6, 10, 5, 4, mask=full)
    x, w, a, values, bias = tensors
    b = values.detach().view(10, 4).requires_grad_()
    y, expected = masked(tensors, full), lora_linear(x, w, a, b, bias)
    assert torch.equal(y, expected)
    assert torch.equal(gradients(y, [values])[0].view(10, 4), gradients(expected, [b])[0])


def test_a_mask_without_entries_gives_the_base_and_gradients_of_zero():
    none = SparseMask.from_dense(torch.zeros(10, 4, dtype=torch.bool))
    tensors, _ = make_inputs(6, 10, 5, 4, mask=none)
    y = masked(tensors, none, scale=2.0)
    assert torch.equal(y, torch.nn.functional.linear(tensors[0], tensors[1], tensors[4]))
    dx, _, da, dvalues, _ = gradients(y, tensors)
    assert torch.equal(dx, torch.arange(60.0).double().view(6, 10) @ tensors[1])
    assert torch.equal(da, torch.zeros(4, 5))
    assert dvalues.shape == (0,)


def test_entries_outside_the_train_mask_have_a_gradient_of_exactly_zero():
    tensors, mask = make_inputs(6, 10, 5, 4)
    train = SparseMask.from_dense(mask.to_dense() & (torch.arange(40).view(10, 4) % 2 == 0))
    assert 0 < train.nnz < mask.nnz
    y = masked(tensors, mask, train_mask=train)
    assert torch.equal(y, masked(tensors, mask))
    got, want = gradients(y, tensors), gradients(masked(tensors, mask), tensors)
    trained = mask.index_of(train)
    assert torch.equal(got[3][trained], want[3][trained])
    got[3][trained] = 0
    assert not got[3].any()
    for i in (0, 1, 2, 4):
        assert torch.equal(got[i], want[i])
    nothing = SparseMask.from_dense(torch.zeros(10, 4, dtype=torch.bool))
    assert not gradients(masked(tensors, mask, train_mask=nothing), tensors)[3].any()


def test_entries_outside_the_train_mask_keep_their_bits_through_adamw():
    tensors, mask = make_inputs(16, 10, 5, 4, (False, False, False, True, False), torch.float32)
    train = SparseMask.from_dense(mask.to_dense() & (torch.arange(40).view(10, 4) % 2 == 0))
    values, before = tensors[3], tensors[3].detach().clone()
    optimizer = torch.optim.AdamW([values], lr=0.1, weight_decay=0.0)
    for _ in range(100):
        masked(tensors, mask, train_mask=train).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = values.detach() != before
    trained = torch.zeros(mask.nnz, dtype=torch.bool)
    trained[mask.index_of(train)] = True
    assert torch.equal(moved, trained)


@pytest.mark.parametrize("leading", [(), (7,), (2, 3), (2, 0, 3)], ids=str)
def test_any_leading_dimensions_pass_through(leading):
    tensors, mask = make_inputs(1, 4, 6, 2)
    tensors[0] = torch.randn(*leading, 6, dtype=torch.float64, requires_grad=True)
    y = masked(tensors, mask, scale=0.5)
    assert torch.equal(y, dense(tensors, mask, scale=0.5))
    y *= 3
    y.sum().backward()
    assert tensors[0].grad.shape == (*leading, 6)


def test_a_16_bit_base_takes_float32_adapters():
    tensors, mask = make_inputs(8, 4, 6, 2, dtype=torch.float32)
    x, w, a, values, bias = tensors
    half = [t.detach().bfloat16() for t in (x, w, bias)]
    y = masked_lora_linear(half[0], half[1], a, values, mask, half[2])
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert a.grad.dtype == values.grad.dtype == torch.float32


def saved_shapes(tensors: list[Tensor], mask: SparseMask) -> list[tuple[int, ...]]:
    seen = []
    pack = lambda t: seen.append(tuple(t.shape)) or t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        masked(tensors, mask)
    return seen


def test_frozen_a_keeps_no_input_and_no_dense_b():
    M, N, K, R = 7, 5, 6, 2
    assert (M, K) in saved_shapes(*make_inputs(M, N, K, R, (True, False, True, True, False)))
    lori, mask = make_inputs(M, N, K, R, (True, False, False, True, False))
    kept = saved_shapes(lori, mask)
    assert (M, K) not in kept
    assert (N, R) not in kept
    assert (M, R) in kept
    parameters = [(N, K), (R, K), (mask.nnz,), (N, 1), (N + 1,)]
    assert sorted(kept) == sorted([*parameters, (M, R)])
    assert saved_shapes(*make_inputs(M, N, K, R, (False, False, False, False, True))) == []


@pytest.mark.parametrize("constant_dy", [True, False])
def test_a_second_derivative_is_refused(constant_dy):
    tensors, mask = make_inputs(5, 4, 6, 2)
    y = masked(tensors, mask)
    (dx,) = torch.autograd.grad(y.sum() if constant_dy else (y * y).sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="^masked_lora_linear: gradients must not be differentiated again"):
        dx.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_repeats_the_mask_of_dropout(use_reentrant):
    tensors, mask = make_inputs(16, 4, 6, 2)
    layer = lambda *t: masked(t, mask, dropout_p=0.5)  # noqa: E731
    results = []
    for wrap in (lambda f, *t: f(*t), lambda f, *t: checkpoint(f, *t, use_reentrant=use_reentrant)):
        torch.manual_seed(5)
        y = wrap(layer, *tensors)
        y.sum().backward()
        results.append([y.detach(), *[t.grad for t in tensors]])
        for t in tensors:
            t.grad = None
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("train", [False, True])
def test_it_compiles_into_one_graph(train):
    tensors, mask = make_inputs(16, 4, 6, 2)
    train_mask = SparseMask.from_dense(mask.to_dense() & (torch.arange(8).view(4, 2) > 3)) if train else None
    layer = lambda *t: masked(t, mask, scale=0.5, dropout_p=0.5, train_mask=train_mask)  # noqa: E731
    results = []
    for each in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(9)
        y = each(*tensors)
        results.append([y, *gradients(y, tensors)])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def op_arguments() -> dict[str, tuple]:
    (x, w, a, values, bias), mask = make_inputs(5, 4, 6, 2, (False,) * 5)
    dy, h, seed = x.new_ones(5, 4), x.new_ones(5, 2), torch.tensor([7])
    b = (values, mask.words, mask.offsets)
    train = (mask.words.clone(), mask.offsets.clone(), mask.nnz)
    return {
        "masked_lora_forward": (x, w, a, *b, bias, 0.5, seed, 0.5),
        "masked_lora_backward": (dy, x, w, a, *b, *train, h, None, 0.5, seed, 0.5, True, True, True),
    }


@pytest.mark.parametrize("name", ["masked_lora_forward", "masked_lora_backward"])
def test_every_op_passes_opcheck(name):
    op = getattr(torch.ops.lowrank_ops, name).default
    assert set(torch.library.opcheck(op, (*op_arguments()[name], "reference")).values()) == {"SUCCESS"}


def test_autocast_casts_x_and_w_and_leaves_float32_values():
    tensors, mask = make_inputs(8, 4, 6, 2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = masked(tensors, mask), dense(tensors, mask)
    assert torch.equal(y, expected)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors)


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_shapes_can_be_planned_on_a_meta_device(impl):
    if impl == "triton":
        pytest.importorskip("triton")
    mask = SparseMask.meta((4, 2), 3)
    tensors, _ = make_inputs(8, 4, 6, 2, dtype=torch.float32, mask=mask)
    tensors = [t.detach().to("meta").requires_grad_() for t in tensors]
    y = masked(tensors, mask, dropout_p=0.5, impl=impl)
    assert (y.shape, y.device.type) == ((8, 4), "meta")
    assert [g.shape for g in torch.autograd.grad(y.sum(), tensors)] == [t.shape for t in tensors]


def errors() -> dict[str, tuple[type, dict]]:
    other, meta = SparseMask.from_dense(torch.ones(4, 3, dtype=torch.bool)), SparseMask.meta((4, 2), 3)
    return {
        "x must be a Tensor, got int": (TypeError, {"x": 3}),
        "x must be (..., K) with K = 6 as in w, got (5, 7)": (ValueError, {"x": torch.ones(5, 7)}),
        "w must be (N, K), got (4,)": (ValueError, {"w": torch.ones(4)}),
        "w must have the dtype of x": (TypeError, {"w": torch.ones(4, 6).half()}),
        "a must be (R, K) = (2, 6), got (2, 5)": (ValueError, {"a": torch.ones(2, 5)}),
        "b_values must be (nnz,), got (3, 1)": (ValueError, {"b_values": torch.ones(3, 1)}),
        "b_values must be (nnz,) = (": (ValueError, {"b_values": torch.ones(1)}),
        "b_values must have the dtype of a": (TypeError, {"b_values": "double"}),
        "b_mask must be a SparseMask, got Tensor": (TypeError, {"b_mask": torch.ones(4, 2)}),
        "b_mask must be of shape (N, R) = (4, 2), got (4, 3)": (ValueError, {"b_mask": other}),
        "train_mask must be of shape (N, R) = (4, 2), got (4, 3)": (ValueError, {"train_mask": other}),
        "b_mask must be on the device of x, cpu, got meta": (
            ValueError,
            {"b_mask": meta},
        ),
        "bias must be (N,) = (4,), got (3,)": (ValueError, {"bias": torch.ones(3)}),
        "dropout_p must be in [0, 1), got 1.0": (ValueError, {"dropout_p": 1.0}),
        'impl must be "auto", "triton" or "reference"': (ValueError, {"impl": "cuda"}),
    }


@pytest.mark.parametrize("message", errors())
def test_an_argument_that_does_not_fit_is_named(message):
    kind, changes = errors()[message]
    (x, w, a, values, bias), mask = make_inputs(5, 4, 6, 2, (False,) * 5, torch.float32)
    given = {"x": x, "w": w, "a": a, "b_values": values, "b_mask": mask, "bias": bias}
    changes = {name: values.double() if change == "double" else change for name, change in changes.items()}
    with pytest.raises(kind) as caught:
        masked_lora_linear(**given | changes)
    assert str(caught.value).startswith(f"masked_lora_linear: {message}")

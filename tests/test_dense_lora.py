"""dense_lora_linear on the reference: gradients, compilation, randomness, and what is kept for backward."""

import copy
import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lowrank_ops import dense_lora_linear, reference

# (M, N, K, R): even, ragged in every size, one token, no token
SHAPES = [(64, 48, 32, 8), (33, 50, 17, 4), (1, 16, 128, 16), (0, 5, 6, 2)]
NAMES = ("x", "w", "encoder", "core", "decoder", "bias")


def make_inputs(M: int, N: int, K: int, R: int, trains=(True,) * 6, dtype=torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(M + N + K + R)
    sizes = [(M, K), (N, K), (R, K), (R, R), (N, R), (N,)]
    return [
        torch.randn(*size, dtype=dtype, generator=generator).requires_grad_(flag)
        for size, flag in zip(sizes, trains, strict=True)
    ]


def unfused(*tensors: Tensor, scale: float, gelu: bool = True) -> Tensor:
    x, w, encoder, core, decoder, bias = tensors
    g = F.gelu if gelu else lambda t: t
    v = F.linear(g(F.linear(x, encoder)), core)
    return F.linear(x, w, bias) + scale * g(F.linear(v, decoder))


def gradients(y: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad((y * torch.arange(y.numel(), dtype=y.dtype).view_as(y)).sum(), tensors)


@pytest.mark.parametrize("activation", ["gelu", None])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients_are_those_of_unfused_pytorch(shape, activation):
    inputs = make_inputs(*shape)
    y = dense_lora_linear(*inputs, scale=0.5, activation=activation)
    expected = unfused(*inputs, scale=0.5, gelu=activation is not None)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for got, want in zip(gradients(y, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def applied(p: float, activation: str | None = "gelu"):
    def apply(*tensors: Tensor) -> Tensor:
        torch.manual_seed(1)
        return dense_lora_linear(*tensors, scale=0.5, dropout_p=p, activation=activation)

    return apply


# everything, and each tensor alone, and what trains in practice
TRAINS = ["111111", "100000", "010000", "001000", "000100", "000010", "000001", "101110", "001110"]


@pytest.mark.parametrize(("p", "activation"), [(0.0, "gelu"), (0.25, "gelu"), (0.25, None)])
@pytest.mark.parametrize("trains", TRAINS)
def test_gradients_match_finite_differences(trains, p, activation):
    inputs = make_inputs(5, 4, 6, 2, [flag == "1" for flag in trains])
    assert torch.autograd.gradcheck(applied(p, activation), inputs)


def test_every_combination_of_gradients_gives_what_was_asked():
    full = make_inputs(5, 4, 6, 2)
    want = gradients(applied(0.25)(*full), full)
    for trains in list(itertools.product([False, True], repeat=6))[1:]:
        inputs = make_inputs(5, 4, 6, 2, trains)
        got = gradients(applied(0.25)(*inputs), [t for t in inputs if t.requires_grad])
        for grad, other in zip(got, itertools.compress(want, trains), strict=True):
            torch.testing.assert_close(grad, other, rtol=1e-12, atol=1e-12)


def test_a_zero_decoder_gives_the_frozen_layer_bit_for_bit():
    x, w, encoder, core, decoder, bias = make_inputs(33, 50, 17, 4, dtype=torch.float32)
    inputs = [x, w, encoder, core, torch.zeros_like(decoder).requires_grad_(), bias]
    for p in (0.0, 0.3):
        y = dense_lora_linear(*inputs, scale=2.0, dropout_p=p)
        assert torch.equal(y, F.linear(x, w, bias))
        dx, d_encoder, d_core, d_decoder = gradients(y, [x, encoder, core, inputs[4]])
        assert d_encoder.count_nonzero() == d_core.count_nonzero() == 0
        assert d_decoder.count_nonzero() == d_decoder.numel()
        assert torch.equal(dx, gradients(F.linear(x, w, bias), [x])[0])


def test_the_update_is_bounded_below():
    inputs = make_inputs(64, 48, 32, 8)
    update = dense_lora_linear(*inputs, scale=3.0) - F.linear(inputs[0], inputs[1], inputs[5])
    assert -3 * 0.169972 < update.min() < -3 * 0.1


@pytest.mark.parametrize("leading", [(), (7,), (2, 0, 3), (1, 2, 2, 2)], ids=str)
def test_any_leading_dimensions_pass_through(leading):
    inputs = make_inputs(1, 4, 6, 2)
    inputs[0] = torch.randn(*leading, 6, dtype=torch.float64, requires_grad=True)
    y = dense_lora_linear(*inputs, scale=0.5)
    torch.testing.assert_close(y, unfused(*inputs, scale=0.5))
    assert torch.autograd.grad(y.sum(), inputs[0])[0].shape == (*leading, 6)
    y *= 3


def test_inputs_of_any_strides_are_taken():
    inputs = make_inputs(6, 4, 6, 2)
    strided = [t.T.contiguous().T if t.dim() == 2 else t for t in inputs]
    torch.testing.assert_close(dense_lora_linear(*strided), dense_lora_linear(*inputs))


def test_each_of_the_three_masks_is_its_own_and_keeps_the_expectation():
    seed, p = torch.tensor([5, 6, 7]), 0.25
    M, R = 4096, 32
    ones, eye = torch.ones(M, R, dtype=torch.float64), torch.eye(R, dtype=torch.float64)
    zero = torch.zeros(R, R, dtype=torch.float64)
    y, u, h, _ = reference.dense_lora_forward(ones, zero, eye, eye, eye, None, 1.0, False, seed, p)
    keeps = [reference.dropout_keep(one, M, R, p) for one in seed.split(1)]
    assert torch.equal(u != 0, keeps[0])
    assert torch.equal(h != 0, keeps[0] & keeps[1])
    assert torch.equal(y != 0, keeps[0] & keeps[1] & keeps[2])
    assert abs(y.mean() - 1) < 5 * y.std() / y.numel() ** 0.5


def test_dropout_is_drawn_from_torchs_generator():
    inputs = make_inputs(16, 4, 6, 2, (False,) * 6)
    torch.manual_seed(3)
    first, second = (dense_lora_linear(*inputs, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(dense_lora_linear(*inputs, dropout_p=0.5), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    dense_lora_linear(*inputs)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_repeats_the_masks(use_reentrant):
    inputs, results = make_inputs(16, 4, 6, 2), []
    for wrap in (lambda f, *t: f(*t), lambda f, *t: checkpoint(f, *t, use_reentrant=use_reentrant)):
        torch.manual_seed(5)
        y = wrap(lambda *t: dense_lora_linear(*t, dropout_p=0.5), *inputs)
        y.sum().backward()
        results.append([y.detach(), *(t.grad for t in inputs)])
        for t in inputs:
            t.grad = None
    assert all(torch.equal(plain, again) for plain, again in zip(*results, strict=True))


def saved_shapes(trains: str, **kwargs) -> list[tuple[int, ...]]:
    inputs, seen = make_inputs(7, 5, 6, 2, [flag == "1" for flag in trains]), []
    pack = lambda t: seen.append(tuple(t.shape)) or t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        dense_lora_linear(*inputs, **kwargs)
    return seen


def test_it_keeps_x_and_two_thin_tensors_and_less_for_frozen_parts():
    M, N, K, R = 7, 5, 6, 2
    parameters = [(N, K), (R, K), (R, R), (N, R)]
    assert sorted(saved_shapes("101110")) == sorted([(M, K), (M, R), (M, R), *parameters])
    assert sorted(saved_shapes("101110", dropout_p=0.5)) == sorted(
        [(M, K), (M, R), (M, R), (3,), *parameters]
    )
    # a frozen encoder keeps no input, a frozen decoder's input one thin tensor
    assert sorted(saved_shapes("100110")) == sorted([(M, R), (M, R), *parameters])
    assert sorted(saved_shapes("000010")) == sorted([(M, R), (R, R), (N, R)])
    assert saved_shapes("000001") == []


def test_saved_tensors_may_be_moved_by_hooks():
    inputs = make_inputs(7, 5, 6, 2)
    expected = gradients(dense_lora_linear(*inputs), inputs)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        y = dense_lora_linear(*inputs)
    assert all(torch.equal(got, want) for got, want in zip(gradients(y, inputs), expected, strict=True))


def test_a_second_derivative_is_refused():
    inputs = make_inputs(5, 4, 6, 2)
    y = dense_lora_linear(*inputs)
    (dx,) = torch.autograd.grad((y * y).sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="^dense_lora_linear: gradients must not be differentiated again"):
        dx.sum().backward()


def test_backward_writes_into_no_argument():
    inputs = make_inputs(5, 4, 6, 2)
    y = dense_lora_linear(*inputs, dropout_p=0.5)
    dy = torch.randn_like(y)
    before = copy.deepcopy([t.detach() for t in (*inputs, dy)])
    torch.autograd.grad(y, inputs, dy)
    assert all(torch.equal(t, old) for t, old in zip((*inputs, dy), before, strict=True))


def test_it_compiles_into_one_graph():
    inputs = make_inputs(16, 4, 6, 2)
    layer = lambda *t: dense_lora_linear(*t, scale=0.5, dropout_p=0.5)  # noqa: E731
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.manual_seed(9)
    expected = layer(*inputs)
    torch.manual_seed(9)
    y = compiled(*inputs)
    assert torch.equal(y, expected)
    for got, want in zip(gradients(y, inputs), gradients(expected, inputs), strict=True):
        assert torch.equal(got, want)


def test_both_ops_pass_opcheck():
    x, w, encoder, core, decoder, bias = make_inputs(5, 4, 6, 2, (False,) * 6)
    seed = torch.tensor([7, 8, 9])
    options = (0.5, True, seed, 0.5)
    arguments = {
        "dense_lora_forward": (x, w, encoder, core, decoder, bias, *options),
        "dense_lora_backward": (
            x.new_ones(5, 4), x, w, encoder, core, decoder, x.new_ones(5, 2), x.new_ones(5, 2), None,
            *options, True, True, True, True,
        ),
    }  # fmt: skip
    for name, values in arguments.items():
        op = getattr(torch.ops.lowrank_ops, name).default
        assert set(torch.library.opcheck(op, (*values, "reference")).values()) == {"SUCCESS"}


def test_autocast_casts_x_and_w_and_leaves_float32_adapters():
    inputs = make_inputs(8, 4, 6, 2, dtype=torch.float32)
    expected = gradients(dense_lora_linear(*inputs), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        y = dense_lora_linear(*inputs, scale=0.5)
        plain = unfused(*inputs, scale=0.5)
    assert y.dtype == plain.dtype == torch.bfloat16
    y.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in inputs)
    exact = unfused(*(t.double() for t in inputs), scale=0.5)
    assert (y.double() - exact).abs().max() <= 1.5 * (plain.double() - exact).abs().max()
    # around backward alone it changes nothing
    y = dense_lora_linear(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(*pair) for pair in zip(gradients(y, inputs), expected, strict=True))


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_shapes_can_be_planned_on_a_meta_device(impl):
    if impl == "triton":
        pytest.importorskip("triton")
    inputs = [t.detach().float().to("meta").requires_grad_() for t in make_inputs(8, 4, 6, 2)]
    y = dense_lora_linear(*inputs, dropout_p=0.5, impl=impl)
    assert (y.shape, y.device.type) == ((8, 4), "meta")
    assert [g.shape for g in torch.autograd.grad(y.sum(), inputs)] == [t.shape for t in inputs]


ONE = torch.ones
BAD = [
    ({"x": ONE(3, 7)}, ValueError, "x must be (..., K) with K = 8 as in w, got (3, 7)"),
    ({"w": ONE(4, 8, 1)}, ValueError, "w must be (N, K), got (4, 8, 1)"),
    ({"encoder": [1.0]}, TypeError, "encoder must be a Tensor, got list"),
    ({"encoder": ONE(8)}, ValueError, "encoder must be (R, K), got (8,)"),
    (
        {"encoder": ONE(513, 8), "decoder": ONE(4, 513)},
        ValueError,
        "encoder must be (R, K) with 1 <= R <= 512, got (513, 8)",
    ),
    ({"encoder": ONE(2, 7)}, ValueError, "encoder must be (R, K) = (2, 8), got (2, 7)"),
    ({"core": ONE(2, 3)}, ValueError, "core must be (R, R) = (2, 2), got (2, 3)"),
    ({"core": None}, TypeError, "core must be a Tensor, got NoneType"),
    ({"core": ONE(2, 2, device="meta")}, ValueError, "core must be on the device of x, cpu, got meta"),
    ({"decoder": ONE(2, 4)}, ValueError, "decoder must be (N, R) = (4, 2), got (2, 4)"),
    ({"bias": ONE(5)}, ValueError, "bias must be (N,) = (4,), got (5,)"),
    ({"x": ONE(3, 8).long()}, TypeError, "x must be float16, bfloat16, float32 or float64, got torch.int64"),
    ({"w": ONE(4, 8).half()}, TypeError, "w must have the dtype of x, torch.float32, got torch.float16; "),
    ({"bias": ONE(4).half()}, TypeError, "bias must have the dtype of x, torch.float32, got torch.float16"),
    (
        {"encoder": ONE(2, 8).half()},
        TypeError,
        "encoder must have the dtype of x, torch.float32, or float32, got torch.float16",
    ),
    ({"core": ONE(2, 2).half()}, TypeError, "core must have the dtype of encoder, torch.float32, got"),
    ({"scale": float("nan")}, ValueError, "scale must be finite in float32, got nan"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p must be in [0, 1), got 1.0"),
    ({"activation": "relu"}, ValueError, "activation must be \"gelu\" or None, got 'relu'"),
    ({"impl": "cuda"}, ValueError, 'impl must be "auto", "triton" or "reference", got \'cuda\''),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_a_bad_argument_is_named(changed, error, message):
    good = dict(zip(NAMES, (ONE(3, 8), ONE(4, 8), ONE(2, 8), ONE(2, 2), ONE(4, 2), ONE(4)), strict=True))
    with pytest.raises(error, match="^dense_lora_linear: " + re.escape(message)):
        dense_lora_linear(**(good | changed))

"""pruned_linear on the reference: gradients, compilation, and what is kept for backward."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lowrank_ops import BitmapWeight, pruned_linear

# (M, N, K, R): even, ragged in every size, one token, no token
SHAPES = [(64, 48, 32, 8), (33, 50, 17, 4), (1, 16, 128, 16), (0, 5, 6, 2)]
STRUCTURES = ["unstructured", "2:4"]


def make_weight(N: int, K: int, structure: str = "unstructured", dtype=torch.float64) -> BitmapWeight:
    generator = torch.Generator().manual_seed(N + K)
    w = torch.randn(N, K, dtype=torch.float64, generator=generator).to(dtype)
    if structure == "2:4":
        return BitmapWeight.from_dense(w * (torch.arange(K) % 4 % 3 == 0), structure)
    return BitmapWeight.from_dense(w * (torch.rand(N, K, generator=generator) < 0.5))


def make_inputs(M: int, N: int, K: int, R: int, trains=(True,) * 4, dtype=torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(M + N + K + R)
    return [
        torch.randn(*size, dtype=dtype, generator=generator).requires_grad_(flag)
        for size, flag in zip([(M, K), (R, K), (N, R), (N,)], trains, strict=True)
    ]


def unfused(
    x: Tensor, w: BitmapWeight, a: Tensor | None, b: Tensor | None, bias: Tensor | None, scale: float
) -> Tensor:
    y = F.linear(x, w.to_dense(), bias)
    return y if a is None else y + scale * F.linear(F.linear(x, a), b)


def gradients(y: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad((y * torch.arange(y.numel(), dtype=y.dtype).view_as(y)).sum(), tensors)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients_are_those_of_unfused_pytorch(shape, structure):
    x, a, b, bias = inputs = make_inputs(*shape)
    w = make_weight(*shape[1:3], structure)
    y, expected = pruned_linear(x, w, a, b, bias, scale=0.5), unfused(x, w, a, b, bias, 0.5)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for got, want in zip(gradients(y, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("trains", list(itertools.product([False, True], repeat=4))[1:], ids=str)
def test_gradients_match_finite_differences(trains):
    w, (x, *rest) = make_weight(4, 6), make_inputs(5, 4, 6, 2, trains)
    assert torch.autograd.gradcheck(lambda x, *rest: pruned_linear(x, w, *rest, scale=0.5), (x, *rest))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_gradients_match_finite_differences_without_an_adapter(structure, with_bias):
    w, (x, _, _, bias) = make_weight(4, 6, structure), make_inputs(5, 4, 6, 2)
    bias = bias if with_bias else None
    assert torch.autograd.gradcheck(lambda x, bias: pruned_linear(x, w, bias=bias), (x, bias))
    torch.testing.assert_close(pruned_linear(x, w, bias=bias), unfused(x, w, None, None, bias, 1.0))


@pytest.mark.parametrize("leading", [(), (7,), (2, 3), (2, 0, 3), (1, 2, 2, 2)], ids=str)
def test_any_leading_dimensions_pass_through(leading):
    w, (_, a, b, bias) = make_weight(4, 6), make_inputs(1, 4, 6, 2)
    x = torch.randn(*leading, 6, dtype=torch.float64, requires_grad=True)
    y = pruned_linear(x, w, a, b, bias, scale=0.5)
    torch.testing.assert_close(y, unfused(x, w, a, b, bias, 0.5))
    assert gradients(y, [x])[0].shape == x.shape


def test_the_result_may_be_changed_in_place():
    w, (x, a, b, bias) = make_weight(4, 6), make_inputs(6, 4, 6, 2)
    rows = x.detach().view(2, 3, 6).requires_grad_()
    y = pruned_linear(rows, w, a, b, bias)
    y *= 3
    y.sum().backward()
    torch.testing.assert_close(rows.grad, 3 * (w.to_dense() + b @ a).sum(0).expand(2, 3, 6))


def test_two_adapters_side_by_side_are_their_sum():
    w, (x, a, b, bias) = make_weight(4, 6), make_inputs(5, 4, 6, 4)
    y = pruned_linear(x, w, a, torch.cat([0.5 * b[:, :3], b[:, 3:]], 1), bias)
    apart = unfused(x, w, a[:3], b[:, :3], bias, 0.5) + F.linear(F.linear(x, a[3:]), b[:, 3:])
    torch.testing.assert_close(y, apart)


def test_a_16_bit_base_takes_float32_adapters():
    x, a, b, bias = make_inputs(8, 4, 6, 2, dtype=torch.float32)
    w = make_weight(4, 6, dtype=torch.bfloat16)
    y = pruned_linear(x.detach().bfloat16(), w, a, b, bias.detach().bfloat16())
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert a.grad.dtype == b.grad.dtype == torch.float32


def saved_shapes(w: BitmapWeight, inputs: list[Tensor | None]) -> list[tuple[int, ...]]:
    seen = []
    pack = lambda t: seen.append(tuple(t.shape)) or t  # noqa: E731
    x, *rest = inputs
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        pruned_linear(x, w, *rest)
    return seen


def test_frozen_a_keeps_no_input():
    M, N, K, R = 7, 5, 6, 2
    w = make_weight(N, K)
    packed = [tuple(t.shape) for t in w.packed]
    assert (M, K) in saved_shapes(w, make_inputs(M, N, K, R, (True, True, True, False)))
    assert saved_shapes(w, make_inputs(M, N, K, R, (False, False, True, False))) == [(M, R)]
    assert saved_shapes(w, make_inputs(M, N, K, R, (False, False, False, True))) == []
    x = make_inputs(M, N, K, R)[0]
    assert saved_shapes(w, [x, None, None, None]) == packed


@pytest.mark.parametrize("constant_dy", [True, False])
def test_a_second_derivative_is_refused(constant_dy):
    w, (x, *rest) = make_weight(4, 6), make_inputs(5, 4, 6, 2)
    y = pruned_linear(x, w, *rest)
    (dx,) = torch.autograd.grad(y.sum() if constant_dy else (y * y).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="^pruned_linear: gradients must not be differentiated again"):
        dx.sum().backward()


def test_backward_writes_into_no_argument():
    w, (x, *rest) = make_weight(4, 6), make_inputs(5, 4, 6, 2)
    y = pruned_linear(x, w, *rest)
    tensors = [x.detach(), *(t.detach() for t in rest), torch.randn_like(y).detach(), *w.packed]
    before = copy.deepcopy(tensors)
    torch.autograd.grad(y, (x, *rest), tensors[4])
    assert all(torch.equal(t, old) for t, old in zip(tensors, before, strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(use_reentrant):
    w, (x, *rest) = make_weight(4, 6), make_inputs(5, 4, 6, 2)
    expected = torch.autograd.grad(pruned_linear(x, w, *rest).sum(), (x, *rest))
    checkpoint(
        lambda *t: pruned_linear(t[0], w, *t[1:]), x, *rest, use_reentrant=use_reentrant
    ).sum().backward()
    assert all(torch.equal(t.grad, want) for t, want in zip((x, *rest), expected, strict=True))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_it_compiles_into_one_graph(structure):
    w, (x, *rest) = make_weight(4, 6, structure), make_inputs(16, 4, 6, 2)
    compiled = torch.compile(
        lambda x, w, *rest: pruned_linear(x, w, *rest, scale=0.5), fullgraph=True, backend="aot_eager"
    )
    y, expected = compiled(x, w, *rest), pruned_linear(x, w, *rest, scale=0.5)
    assert torch.equal(y, expected)
    for got, want in zip(gradients(y, (x, *rest)), gradients(expected, (x, *rest)), strict=True):
        assert torch.equal(got, want)


def test_every_op_passes_opcheck():
    w, (x, a, b, bias) = make_weight(4, 6), make_inputs(5, 4, 6, 2, (False,) * 4)
    dy, h = x.new_ones(5, 4), x.new_ones(5, 2)
    calls = {
        "pruned_matmul": (x, w.packed, 4, a, b, bias, 0.5),
        "pruned_backward": (dy, x, w.packed, 6, a, b, h, 0.5, True, True, True),
    }
    for name, arguments in calls.items():
        op = getattr(torch.ops.lowrank_ops, name).default
        assert set(torch.library.opcheck(op, (*arguments, "reference")).values()) == {"SUCCESS"}


def test_autocast_casts_x_and_w_and_leaves_float32_adapters():
    inputs, w = make_inputs(8, 4, 6, 2, dtype=torch.float32), make_weight(4, 6, dtype=torch.float32)
    x, *rest = inputs
    with torch.autocast("cpu", torch.bfloat16):
        y = pruned_linear(x, w, *rest, scale=0.5)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in inputs)


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_shapes_can_be_planned_on_a_meta_device(impl):
    if impl == "triton":
        pytest.importorskip("triton")
    inputs = [t.detach().float().to("meta").requires_grad_() for t in make_inputs(8, 4, 6, 2)]
    x, *rest = inputs
    y = pruned_linear(x, make_weight(4, 6, dtype=torch.float32).to("meta"), *rest, impl=impl)
    assert y.shape == (8, 4)
    assert y.device.type == "meta"
    assert [g.shape for g in torch.autograd.grad(y.sum(), inputs)] == [t.shape for t in inputs]


def call(**changes: object) -> Tensor:
    x, a, b, bias = make_inputs(5, 4, 6, 2)
    arguments = {"x": x, "w": make_weight(4, 6), "a": a, "b": b, "bias": bias} | changes
    return pruned_linear(**arguments)


ERRORS = {
    "x": ({"x": 3}, TypeError, "x must be a Tensor, got int"),
    "K": ({"x": torch.ones(5, 7)}, ValueError, r"x must be \(..., K\) with K = 6 as in w, got \(5, 7\)"),
    "w": (
        {"w": torch.ones(4, 6)},
        TypeError,
        "w must be a BitmapWeight, got Tensor; BitmapWeight.from_dense",
    ),
    "b": ({"b": None}, ValueError, "b must be given beside a, got None"),
    "a": ({"a": None}, ValueError, "a must be given beside b, got None"),
    "R": (
        {"a": torch.ones(0, 6).double()},
        ValueError,
        r"a must be \(R, K\) with 1 <= R <= 512, got \(0, 6\)",
    ),
    "size of b": ({"b": torch.ones(4, 3)}, ValueError, r"b must be \(N, R\) = \(4, 2\), got \(4, 3\)"),
    "bias": ({"bias": torch.ones(5)}, ValueError, r"bias must be \(N,\) = \(4,\), got \(5,\)"),
    "dtype": (
        {"x": torch.ones(5, 6)},
        TypeError,
        "w must have the dtype of x, torch.float32, got torch.float64",
    ),
    "int": ({"x": torch.ones(5, 6).int()}, TypeError, "x must be float16, bfloat16, float32 or float64, got"),
    "adapters": (
        {"a": torch.ones(2, 6), "b": torch.ones(4, 2)},
        TypeError,
        "a must have the dtype of x, torch.float64, or float32, got torch.float32",
    ),
    "dtype of b": ({"b": torch.ones(4, 2)}, TypeError, "b must have the dtype of a, torch.float64, got"),
    "dtype of bias": (
        {"bias": torch.ones(4)},
        TypeError,
        "bias must have the dtype of x, torch.float64, got",
    ),
    "device": (
        {"w": make_weight(4, 6).to("meta")},
        ValueError,
        "w must be on the device of x, cpu, got meta",
    ),
    "scale": ({"scale": float("inf")}, ValueError, "scale must be finite in float32, got inf"),
    "impl": ({"impl": "cuda"}, ValueError, 'impl must be "auto", "triton" or "reference", got \'cuda\''),
}


@pytest.mark.parametrize(("changes", "kind", "message"), ERRORS.values(), ids=ERRORS)
def test_an_error_names_what_is_wrong(changes, kind, message):
    with pytest.raises(kind, match="^pruned_linear: " + message):
        call(**changes)


def test_what_sparse_tensor_cores_do_not_take_is_refused():
    with pytest.raises(ValueError, match='structure must be "2:4"'):
        make_weight(32, 64).accelerate()
    with pytest.raises(ValueError, match="device must be CUDA, got cpu"):
        make_weight(32, 64, "2:4").accelerate()
    with pytest.raises(ValueError, match="tokens must be an int of 1 or more, got 0"):
        make_weight(32, 64, "2:4").accelerate(0)

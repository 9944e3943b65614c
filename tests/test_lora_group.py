"""lora_linear_group on the reference: against one call a projection, gradients, compilation, what is kept."""

import copy
import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lowrank_ops import lora_linear, lora_linear_group

# (M, K, [(N, R), ...]): even, ragged with one rank for each, one token, no token, a group of one
SHAPES = [
    (64, 32, [(48, 8), (16, 8), (16, 8)]),
    (33, 17, [(50, 4), (7, 3)]),
    (1, 128, [(16, 16), (8, 2)]),
    (0, 6, [(5, 2), (4, 1)]),
    (9, 6, [(5, 2)]),
]
SCALES = [0.5, 2.0, -1.0]


def make_inputs(M: int, K: int, sizes: list[tuple[int, int]], dtype=torch.float64) -> dict[str, Any]:
    """Return arguments that all train; the second projection has no bias."""
    generator = torch.Generator().manual_seed(M + K)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, dtype=dtype, generator=generator).requires_grad_()

    return {
        "x": draw(M, K),
        "ws": [draw(N, K) for N, _ in sizes],
        "a_list": [draw(R, K) for _, R in sizes],
        "b_list": [draw(N, R) for N, R in sizes],
        "biases": [None if i == 1 else draw(N) for i, (N, _) in enumerate(sizes)],
        "scales": SCALES[: len(sizes)],
    }


def leaves(inputs: dict[str, Any]) -> list[Tensor]:
    lists = (inputs[name] for name in ("ws", "a_list", "b_list", "biases"))
    return [inputs["x"], *(t for t in itertools.chain(*lists) if t is not None)]


def apart(inputs: dict[str, Any], **options: Any) -> tuple[Tensor, ...]:
    x, *lists, scales = inputs.values()
    each = zip(*lists, scales, strict=True)
    return tuple(lora_linear(x, w, a, b, bias, scale=scale, **options) for w, a, b, bias, scale in each)


def gradients(ys: tuple[Tensor, ...], inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    dys = [torch.arange(y.numel(), dtype=y.dtype).view_as(y) for y in ys]
    return torch.autograd.grad(ys, leaves(inputs), dys)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients_are_those_of_one_call_a_projection(shape):
    inputs = make_inputs(*shape)
    ys, expected = lora_linear_group(**inputs), apart(inputs)
    assert isinstance(ys, tuple)
    for y, want in zip(ys, expected, strict=True):
        assert torch.equal(y, want)
    for got, want in zip(gradients(ys, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def trained(trains: str) -> dict[str, Any]:
    inputs = make_inputs(7, 6, [(3, 2), (4, 1), (2, 2)])
    for t, flag in zip(leaves(inputs), trains, strict=True):
        t.requires_grad_(flag == "1")
    return inputs


# of x, three w, three a, three b and two biases: all, x alone, each list alone, adapters, one a or b of them
TRAINS = [
    "111111111111",
    "100000000000",
    "011100000000",
    "000011100000",
    "000000011100",
    "000000000011",
    "000011111100",
    "100001001000",
    "000010001000",
    "010000000101",
]


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("trains", TRAINS)
def test_gradients_match_finite_differences(trains, p):
    inputs = trained(trains)

    def apply(*_: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        return lora_linear_group(**inputs, dropout_p=p)

    assert torch.autograd.gradcheck(apply, leaves(inputs))


@pytest.mark.parametrize("used", [[0], [1], [0, 2]], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_outputs_that_are_not_used_get_no_gradient(used, p):
    inputs = make_inputs(8, 6, [(5, 2), (4, 1), (3, 2)])
    torch.manual_seed(1)
    ys = lora_linear_group(**inputs, dropout_p=p)
    grads = torch.autograd.grad([ys[i].sum() for i in used], leaves(inputs), allow_unused=True)
    whole = {name: value if name == "x" else [value[i] for i in used] for name, value in inputs.items()}
    torch.manual_seed(1)
    part = lora_linear_group(**whole, dropout_p=p)
    expected = dict(
        zip(leaves(whole), torch.autograd.grad([y.sum() for y in part], leaves(whole)), strict=True)
    )
    for leaf, grad in zip(leaves(inputs), grads, strict=True):
        assert (grad is not None) == any(leaf is t for t in expected)
        if grad is not None:
            torch.testing.assert_close(grad, expected[leaf])


@pytest.mark.parametrize("leading", [(), (7,), (2, 3), (2, 0, 3)], ids=str)
def test_any_leading_dimensions_pass_through(leading):
    inputs = make_inputs(1, 6, [(5, 2), (4, 1)])
    inputs["x"] = torch.randn(*leading, 6, dtype=torch.float64, requires_grad=True)
    ys, expected = lora_linear_group(**inputs), apart(inputs)
    for y, want in zip(ys, expected, strict=True):
        assert torch.equal(y, want)
    for got, want in zip(gradients(ys, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(got, want)


def test_an_output_can_be_written_to():
    inputs = make_inputs(8, 6, [(5, 2), (4, 1)])
    inputs["x"] = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    first, second = lora_linear_group(**inputs)
    kept = second.detach().clone()
    first.add_(1)
    assert torch.equal(second, kept)
    first.sum().backward()


def test_one_mask_serves_all_and_is_drawn_from_torchs_generator():
    inputs = make_inputs(16, 12, [(12, 12), (12, 12)])
    with torch.no_grad():
        inputs["a_list"] = inputs["b_list"] = [torch.eye(12, dtype=torch.float64)] * 2
        inputs["biases"], inputs["scales"] = None, [1.0, 1.0]
        torch.manual_seed(3)
        first, second = (
            y - inputs["x"] @ w.T
            for y, w in zip(lora_linear_group(**inputs, dropout_p=0.5), inputs["ws"], strict=True)
        )
        torch.testing.assert_close(first, second)
        assert (first.abs() < 1e-9).any()
        torch.manual_seed(3)
        again = lora_linear_group(**inputs, dropout_p=0.5)[0] - inputs["x"] @ inputs["ws"][0].T
    assert torch.equal(again, first)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_repeats_the_mask(use_reentrant):
    inputs = make_inputs(16, 6, [(5, 2), (4, 1)])
    results = []
    for again in (False, True):
        torch.manual_seed(5)
        run = lambda x: lora_linear_group(**{**inputs, "x": x}, dropout_p=0.5)  # noqa: E731
        x = inputs["x"]
        ys = checkpoint(run, x, use_reentrant=use_reentrant) if again else run(x)
        sum(y.square().sum() for y in ys).backward()
        results.append([t.grad.clone() for t in leaves(inputs)])
        for t in leaves(inputs):
            t.grad = None
    assert all(torch.equal(plain, again) for plain, again in zip(*results, strict=True))


def saved_shapes(inputs: dict[str, Any], **options: Any) -> list[tuple[int, ...]]:
    seen = []
    pack = lambda t: seen.append(tuple(t.shape)) or t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lora_linear_group(**inputs, **options)
    return seen


def test_x_is_kept_once_and_only_if_something_needs_it():
    M, K, R = 7, 6, 5
    kept = saved_shapes(trained("100011111100"))
    assert kept.count((M, K)) == 1
    assert kept.count((M, R)) == 1
    assert (M, K) not in saved_shapes(trained("100000011100"))
    assert (M, R) not in saved_shapes(trained("100011100000"))
    assert saved_shapes(trained("000000000011")) == []


def test_dropout_keeps_one_number_for_backward():
    extra = saved_shapes(trained("100011111100"), dropout_p=0.5)
    for shape in saved_shapes(trained("100011111100")):
        extra.remove(shape)
    assert extra == [(1,)]


@pytest.mark.parametrize("constant_dy", [True, False])
def test_a_second_derivative_is_refused(constant_dy):
    inputs = make_inputs(5, 6, [(4, 2), (3, 1)])
    first, second = lora_linear_group(**inputs)
    loss = first.sum() + second.sum() if constant_dy else (first * first).sum()
    (dx,) = torch.autograd.grad(loss, inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="^lora_linear_group: gradients must not be differentiated again"):
        dx.sum().backward()


def test_backward_writes_into_no_argument():
    inputs = make_inputs(5, 6, [(4, 2), (3, 1)])
    ys = lora_linear_group(**inputs, dropout_p=0.5)
    dys = [torch.randn_like(y) for y in ys]
    before = copy.deepcopy([t.detach() for t in (*leaves(inputs), *dys)])
    torch.autograd.grad(ys, leaves(inputs), dys)
    assert all(torch.equal(t, old) for t, old in zip((*leaves(inputs), *dys), before, strict=True))


def test_a_16_bit_base_takes_float32_adapters():
    inputs = make_inputs(8, 6, [(5, 2), (4, 1)], dtype=torch.float32)
    for name in ("ws", "biases"):
        inputs[name] = [t if t is None else t.detach().bfloat16() for t in inputs[name]]
    inputs["x"] = inputs["x"].detach().bfloat16()
    ys = lora_linear_group(**inputs)
    assert {y.dtype for y in ys} == {torch.bfloat16}
    sum(y.sum() for y in ys).backward()
    assert {t.grad.dtype for t in (*inputs["a_list"], *inputs["b_list"])} == {torch.float32}


def test_autocast_casts_as_for_one_projection():
    inputs = make_inputs(8, 6, [(5, 2), (4, 1)], dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ys, expected = lora_linear_group(**inputs), apart(inputs)
    for y, want in zip(ys, expected, strict=True):
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, want)
    with torch.autocast("cpu", torch.bfloat16):
        grads = torch.autograd.grad(sum(y.sum() for y in ys), leaves(inputs))
    assert {grad.dtype for grad in grads} == {torch.float32}


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_it_compiles_into_one_graph(p):
    inputs = make_inputs(16, 6, [(5, 2), (4, 1)])
    run = lambda: lora_linear_group(**inputs, dropout_p=p)  # noqa: E731
    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(9)
        ys = function()
        results.append([*ys, *gradients(ys, inputs)])
    assert all(torch.equal(plain, compiled) for plain, compiled in zip(*results, strict=True))


def test_every_op_passes_opcheck():
    inputs = {
        name: [t if t is None or name == "scales" else t.detach() for t in value]
        if name != "x"
        else value.detach()
        for name, value in make_inputs(5, 6, [(4, 2), (3, 1)]).items()
    }
    x, ws, a_list, b_list, biases, scales = inputs.values()
    seed, h, dy = torch.tensor([7]), x.new_ones(5, 3), x.new_ones(5, 3)
    needs = (True, [False, True], [False, True])
    arguments = {
        "lora_group_forward": (x, ws, a_list, b_list, biases, scales, seed, 0.5),
        "lora_group_backward": ([None, dy], x, ws, a_list, b_list, h, None, scales, seed, 0.5, *needs),
    }
    for name, args in arguments.items():
        op = getattr(torch.ops.lowrank_ops, name).default
        assert set(torch.library.opcheck(op, (*args, "reference")).values()) == {"SUCCESS"}


def test_shapes_can_be_planned_on_a_meta_device():
    inputs = {
        name: [t if t is None or name == "scales" else t.detach().to("meta").requires_grad_() for t in value]
        for name, value in make_inputs(8, 6, [(5, 2), (4, 1)]).items()
        if name != "x"
    }
    inputs["x"] = torch.empty(2, 8, 6, dtype=torch.float64, device="meta", requires_grad=True)
    ys = lora_linear_group(**inputs, dropout_p=0.5)
    assert [y.shape for y in ys] == [(2, 8, 5), (2, 8, 4)]
    order = [inputs["x"], *inputs["a_list"], *inputs["b_list"]]
    grads = torch.autograd.grad(sum(y.sum() for y in ys), order)
    assert [grad.shape for grad in grads] == [t.shape for t in order]


ONE = torch.ones
GOOD = {
    "x": ONE(3, 8),
    "ws": [ONE(4, 8), ONE(5, 8)],
    "a_list": [ONE(2, 8), ONE(1, 8)],
    "b_list": [ONE(4, 2), ONE(5, 1)],
    "biases": [None, ONE(5)],
    "scales": [1.0, 2.0],
}
CASES = [
    ({"ws": ONE(4, 8)}, TypeError, "ws must be a list or a tuple, got Tensor"),
    ({"scales": 1.0}, TypeError, "scales must be a list or a tuple, got float"),
    ({"ws": []}, ValueError, "ws must have at least one entry, got none"),
    ({"a_list": [ONE(2, 8)]}, ValueError, "a_list must have as many entries as ws, 2, got 1"),
    ({"biases": [None]}, ValueError, "biases must have as many entries as ws, 2, got 1"),
    ({"x": [1.0]}, TypeError, "x must be a Tensor, got list"),
    ({"x": torch.tensor(1.0)}, ValueError, "x must be (..., K), got ()"),
    ({"x": ONE(3, 7)}, ValueError, "x must be (..., K) with K = 8 as in ws[0], got (3, 7)"),
    ({"ws": [ONE(4, 8), None]}, TypeError, "ws[1] must be a Tensor, got NoneType"),
    ({"ws": [ONE(4, 8), ONE(5, 7)]}, ValueError, "x must be (..., K) with K = 7 as in ws[1], got (3, 8)"),
    ({"a_list": [ONE(2, 8), ONE(8)]}, ValueError, "a_list[1] must be (R, K), got (8,)"),
    ({"a_list": [ONE(2, 8), ONE(1, 7)]}, ValueError, "a_list[1] must be (R, K) = (1, 8), got (1, 7)"),
    (
        {"a_list": [ONE(513, 8), ONE(1, 8)]},
        ValueError,
        "a_list[0] must be (R, K) with 1 <= R <= 512, got (513, 8)",
    ),
    ({"b_list": [ONE(4, 2), ONE(5, 2)]}, ValueError, "b_list[1] must be (N, R) = (5, 1), got (5, 2)"),
    ({"biases": [ONE(5), None]}, ValueError, "biases[0] must be (N,) = (4,), got (5,)"),
    (
        {"b_list": [ONE(4, 2), ONE(5, 1, device="meta")]},
        ValueError,
        "b_list[1] must be on the device of x, cpu, got meta",
    ),
    (
        {"x": ONE(3, 8, dtype=torch.int64)},
        TypeError,
        "x must be float16, bfloat16, float32 or float64, got torch.int64",
    ),
    (
        {"ws": [ONE(4, 8), ONE(5, 8).half()]},
        TypeError,
        "ws[1] must have the dtype of x, torch.float32, got torch.float16; cast x or use autocast",
    ),
    (
        {"biases": [None, ONE(5).half()]},
        TypeError,
        "biases[1] must have the dtype of x, torch.float32, got torch.float16",
    ),
    (
        {"a_list": [ONE(2, 8).half(), ONE(1, 8)]},
        TypeError,
        "a_list[0] must have the dtype of x, torch.float32, or float32, got torch.float16",
    ),
    (
        {"a_list": [ONE(2, 8), ONE(1, 8).half()]},
        TypeError,
        "a_list[1] must have the dtype of a_list[0], torch.float32, got torch.float16",
    ),
    ({"scales": [1.0, float("nan")]}, ValueError, "scales[1] must be finite in float32, got nan"),
    ({"scales": [1.0, "2"]}, TypeError, "scales[1] must be a number, got str"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p must be in [0, 1), got 1.0"),
    ({"impl": "cuda"}, ValueError, """impl must be "auto", "triton" or "reference", got 'cuda'"""),
]


@pytest.mark.parametrize(
    ("changed", "error", "message"), CASES, ids=[message[:48] for _, _, message in CASES]
)
def test_a_bad_argument_is_named(changed, error, message):
    state = torch.get_rng_state()
    with pytest.raises(error, match="^lora_linear_group: " + re.escape(message)):
        lora_linear_group(**GOOD | changed)
    assert torch.equal(torch.get_rng_state(), state)

"""dense_lora_linear on a GPU: accuracy in every dtype, determinism, graphs, compilation and memory."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lowrank_ops import dense_lora_linear, lora_linear, reference
from lowrank_ops.testing import assert_as_accurate

pytestmark = pytest.mark.gpu

NAMES = ["y", "dx", "dw", "d_encoder", "d_core", "d_decoder", "dbias"]
# (M, N, K, R): what Hopper's kernel serves, the same ragged, ragged in every size, one token, a large rank
SHAPES = [
    (2048, 2048, 4096, 16),
    (2056, 2072, 1048, 64),
    (1001, 515, 1037, 24),
    (1, 512, 2048, 16),
    (512, 640, 1024, 130),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def make_inputs(M: int, N: int, K: int, R: int, big: torch.dtype, small: torch.dtype) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(M + N + K + R)
    draw = lambda *size, std=1.0: torch.randn(*size, device="cuda", generator=generator) * std  # noqa: E731
    x, w, bias = draw(M, K).to(big), draw(N, K, std=K**-0.5).to(big), draw(N).to(big)
    factors = [draw(R, K, std=K**-0.5), draw(R, R, std=R**-0.5), draw(N, R, std=R**-0.5)]
    return [t.requires_grad_() for t in (x, w, *(t.to(small) for t in factors), bias)]


def unfused(inputs: list[Tensor], seed: Tensor | None, p: float, gelu: bool = True) -> Tensor:
    """Return the layer as one writes it, with the masks given."""
    x, w, encoder, core, decoder, bias = inputs
    g = F.gelu if gelu else lambda t: t

    def drop(t: Tensor, place: int) -> Tensor:
        if seed is None:
            return t
        keep = reference.dropout_keep(seed[place : place + 1], *t.shape, p)
        return torch.where(keep, t, 0) * (65536 / (65536 - reference.keep_threshold(p)))

    h = drop(g(F.linear(drop(x, 0), encoder)), 1)
    return F.linear(x, w, bias) + 0.5 * drop(g(F.linear(F.linear(h, core), decoder)), 2)


def value_and_gradients(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(1)
    dy = torch.randn(y.shape, device="cuda", generator=generator).bfloat16().to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def check(actual: list[Tensor], baseline: list[Tensor], truth: list[Tensor]) -> None:
    for name, *values in zip(NAMES, actual, baseline, truth, strict=True):
        try:
            assert_as_accurate(*values)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def drawn(p: float) -> Tensor | None:
    return torch.randint(2**63 - 1, (3,), dtype=torch.int64, device="cuda") if p else None


@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients_are_as_accurate_as_pytorch(shape, dtype, p, impl):
    inputs = make_inputs(*shape, dtype, dtype)
    torch.manual_seed(2)
    actual = value_and_gradients(dense_lora_linear(*inputs, scale=0.5, dropout_p=p, impl=impl), inputs)
    torch.manual_seed(2)
    seed = drawn(p)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    truth = value_and_gradients(unfused(exact, seed, p), exact)
    check(actual, value_and_gradients(unfused(inputs, seed, p), inputs), truth)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_linear_update_is_as_accurate_as_pytorch(p):
    inputs = make_inputs(*SHAPES[0], torch.bfloat16, torch.bfloat16)
    torch.manual_seed(2)
    y = dense_lora_linear(*inputs, scale=0.5, dropout_p=p, activation=None)
    actual = value_and_gradients(y, inputs)
    torch.manual_seed(2)
    seed = drawn(p)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    truth = value_and_gradients(unfused(exact, seed, p, gelu=False), exact)
    check(actual, value_and_gradients(unfused(inputs, seed, p, gelu=False), inputs), truth)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_float32_factors_get_float32_gradients_as_accurate_as_under_autocast(p):
    inputs = make_inputs(*SHAPES[0], torch.bfloat16, torch.float32)
    torch.manual_seed(2)
    actual = value_and_gradients(dense_lora_linear(*inputs, scale=0.5, dropout_p=p), inputs)
    assert [grad.dtype for grad in actual[3:6]] == [torch.float32] * 3
    torch.manual_seed(2)
    seed = drawn(p)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    truth = value_and_gradients(unfused(exact, seed, p), exact)
    rounded = [t.detach().bfloat16().requires_grad_() for t in inputs]
    check([t.bfloat16() for t in actual], value_and_gradients(unfused(rounded, seed, p), rounded), truth)


@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_two_runs_give_the_same_bits(shape, impl):
    inputs = make_inputs(*shape, torch.bfloat16, torch.bfloat16)
    runs = []
    for _ in range(2):
        torch.manual_seed(4)
        runs.append(value_and_gradients(dense_lora_linear(*inputs, dropout_p=0.1, impl=impl), inputs))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_zero_decoder_adds_exactly_zero(shape, impl):
    x, w, encoder, core, decoder, bias = (
        t.detach() for t in make_inputs(*shape, torch.bfloat16, torch.bfloat16)
    )
    layer = lambda scale, p: dense_lora_linear(  # noqa: E731
        x, w, encoder, core, torch.zeros_like(decoder), bias, scale=scale, dropout_p=p, impl=impl
    )
    plain = layer(0.0, 0.0)
    assert torch.equal(layer(2.0, 0.0), plain)
    assert_as_accurate(plain, F.linear(x, w, bias), F.linear(x.double(), w.double(), bias.double()))


def test_strides_are_free():
    inputs = make_inputs(520, 264, 136, 8, torch.bfloat16, torch.bfloat16)
    strided = [t.detach().T.contiguous().T.requires_grad_() if t.dim() == 2 else t for t in inputs]
    dy = torch.randn(264, 520, device="cuda").bfloat16().T
    got = torch.autograd.grad(dense_lora_linear(*strided), strided, dy)
    want = torch.autograd.grad(dense_lora_linear(*inputs, impl="reference"), inputs, dy.contiguous())
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02 * other.abs().max().item())


def test_every_combination_of_gradients_gives_what_was_asked():
    full = make_inputs(2048, 2048, 1024, 16, torch.bfloat16, torch.bfloat16)
    for p in (0.0, 0.1):
        torch.manual_seed(3)
        want = torch.autograd.grad(dense_lora_linear(*full, dropout_p=p).sum(), full)
        for trains in list(itertools.product([False, True], repeat=6))[1:]:
            leaves = [t.detach().requires_grad_(flag) for t, flag in zip(full, trains, strict=True)]
            torch.manual_seed(3)
            dense_lora_linear(*leaves, dropout_p=p).sum().backward()
            for leaf, flag, grad in zip(leaves, trains, want, strict=True):
                assert (leaf.grad is not None) == flag
                if flag:
                    size = 0.01 * grad.abs().max().item()
                    torch.testing.assert_close(leaf.grad, grad, rtol=0.01, atol=size)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_repeats_the_masks(use_reentrant):
    inputs = make_inputs(2048, 2048, 1024, 16, torch.bfloat16, torch.bfloat16)
    layer = lambda *t: dense_lora_linear(*t, dropout_p=0.5)  # noqa: E731
    torch.manual_seed(6)
    expected = torch.autograd.grad(layer(*inputs).float().sum(), inputs)
    torch.manual_seed(6)
    checkpoint(layer, *inputs, use_reentrant=use_reentrant).float().sum().backward()
    assert all(torch.equal(t.grad, old) for t, old in zip(inputs, expected, strict=True))


def test_a_replayed_graph_draws_fresh_masks():
    inputs = make_inputs(2048, 2048, 1024, 16, torch.bfloat16, torch.bfloat16)
    layer = lambda: dense_lora_linear(*inputs, dropout_p=0.5)  # noqa: E731
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            torch.autograd.grad(layer().sum(), inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer()
        grads = torch.autograd.grad(y.float().sum(), inputs[2:5])
    seen = []
    for _ in range(2):
        graph.replay()
        seen.append([t.clone() for t in (y, *grads)])
    assert not any(torch.equal(first, second) for first, second in zip(*seen, strict=True))


def test_inductor_compiles_it_into_one_graph():
    inputs = make_inputs(512, 256, 512, 16, torch.bfloat16, torch.float32)
    compiled = torch.compile(lambda *t: dense_lora_linear(*t, scale=0.5), fullgraph=True)
    y, expected = compiled(*inputs), dense_lora_linear(*inputs, scale=0.5)
    assert torch.equal(y, expected)
    got, want = (torch.autograd.grad(t, inputs, torch.ones_like(t)) for t in (y, expected))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0.01, atol=0.01 * other.abs().max().item())


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_the_peak_is_that_of_lora_and_one_thin_tensor(p):
    M, N, K, R = 4096, 4096, 4096, 16
    x, w, encoder, core, decoder, _ = make_inputs(M, N, K, R, torch.bfloat16, torch.bfloat16)
    w.requires_grad_(False)
    a, b = encoder, decoder
    dy = torch.randn(M, N, device="cuda").bfloat16()
    kept = []
    for layer, leaves in (
        (lambda: lora_linear(x, w, a, b, dropout_p=p), (x, a, b)),
        (lambda: dense_lora_linear(x, w, encoder, core, decoder, dropout_p=p), (x, encoder, core, decoder)),
    ):
        torch.autograd.grad(layer(), leaves, dy)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        y = layer()
        torch.cuda.synchronize()
        kept.append(torch.cuda.memory_allocated() - before)
        del y
    # the allocator rounds to 512 bytes
    assert kept[1] <= kept[0] + 2 * M * R + 2048


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_tensors_of_more_than_two_to_the_31_elements(impl):
    M, N, K, R = 600_000, 64, 4096, 16
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB of free GPU memory")
    inputs = [t.detach() for t in make_inputs(1, N, K, R, torch.bfloat16, torch.bfloat16)]
    x = torch.empty(M, K, device="cuda", dtype=torch.bfloat16).normal_().requires_grad_()
    y = dense_lora_linear(x, *inputs[1:], impl=impl)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    tail = x.detach()[-300:].clone().requires_grad_()
    expected = dense_lora_linear(tail, *inputs[1:], impl="reference")
    torch.testing.assert_close(y[-300:], expected, rtol=0.02, atol=0.05)
    (wanted,) = torch.autograd.grad(expected, tail, torch.ones_like(expected))
    torch.testing.assert_close(dx[-300:], wanted, rtol=0.02, atol=0.05)

"""lora_linear on the reference: gradients, compilation, randomness, and what is kept for backward."""

import copy
import itertools

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lowrank_ops import lora_linear, reference

# (M, N, K, R): even, ragged in every size, one token, no token
SHAPES = [(64, 48, 32, 8), (33, 50, 17, 4), (1, 16, 128, 16), (0, 5, 6, 2)]


def make_inputs(M: int, N: int, K: int, R: int, trains=(True,) * 5, dtype=torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(M + N + K + R)
    sizes = [(M, K), (N, K), (R, K), (N, R), (N,)]
    return [
        torch.randn(*size, dtype=dtype, generator=generator).requires_grad_(flag)
        for size, flag in zip(sizes, trains, strict=True)
    ]


def unfused(x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    return F.linear(x, w, bias) + scale * F.linear(F.linear(x, a), b)


def gradients(y: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad((y * torch.arange(y.numel(), dtype=y.dtype).view_as(y)).sum(), tensors)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients_are_those_of_unfused_pytorch(shape):
    inputs = make_inputs(*shape)
    y, expected = lora_linear(*inputs, scale=0.5), unfused(*inputs, 0.5)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for got, want in zip(gradients(y, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("trains", list(itertools.product([False, True], repeat=5))[1:], ids=str)
def test_gradients_match_finite_differences(trains, p):
    def apply(*tensors: Tensor) -> Tensor:
        torch.manual_seed(1)
        return lora_linear(*tensors, scale=0.5, dropout_p=p)

    assert torch.autograd.gradcheck(apply, make_inputs(5, 4, 6, 2, trains))


def test_gradients_match_finite_differences_without_a_bias():
    x, w, a, b, _ = make_inputs(5, 4, 6, 2)
    assert torch.autograd.gradcheck(lambda *t: lora_linear(*t, scale=2.0), (x, w, a, b))


@pytest.mark.parametrize("leading", [(), (7,), (2, 3), (2, 0, 3), (1, 2, 2, 2)], ids=str)
def test_any_leading_dimensions_pass_through(leading):
    x, w, a, b, bias = make_inputs(1, 4, 6, 2)
    x = torch.randn(*leading, 6, dtype=torch.float64)
    torch.testing.assert_close(lora_linear(x, w, a, b, bias, scale=0.5), unfused(x, w, a, b, bias, 0.5))


def test_the_result_may_be_changed_in_place():
    x, w, a, b, bias = make_inputs(6, 4, 6, 2)
    rows = x.detach().view(2, 3, 6).requires_grad_()
    y = lora_linear(rows, w, a, b, bias)
    y *= 3
    y.sum().backward()
    torch.testing.assert_close(rows.grad, 3 * (w + b @ a).sum(0).expand(2, 3, 6))


def test_inputs_of_any_strides_are_taken():
    x, w, a, b, bias = make_inputs(6, 4, 6, 2)
    strided = [x.T.contiguous().T, w.T.contiguous().T, a.T.contiguous().T, b.T.contiguous().T, bias]
    y = lora_linear(*strided)
    torch.testing.assert_close(y, lora_linear(x, w, a, b, bias))
    y.backward(torch.ones(4, 6, dtype=torch.float64).T)
    torch.testing.assert_close(x.grad, (w + b @ a).sum(0).expand(6, 6))


def test_a_16_bit_base_takes_float32_adapters():
    x, w, a, b, bias = make_inputs(8, 4, 6, 2, dtype=torch.float32)
    half = [t.detach().bfloat16() for t in (x, w, bias)]
    y = lora_linear(half[0], half[1], a, b, half[2])
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert a.grad.dtype == b.grad.dtype == torch.float32


def test_dropout_keeps_the_expectation_and_reaches_the_adapter_alone():
    x, w, a, b, _ = make_inputs(1, 4, 6, 2, (False,) * 5)
    rows = x.expand(4096, 6)
    torch.manual_seed(0)
    update = lora_linear(rows, w, a, b, dropout_p=0.3) - F.linear(rows, w)
    exact = x @ a.T @ b.T
    spread = update.std(0) / 4096**0.5
    assert ((update.mean(0) - exact[0]).abs() < 5 * spread).all()
    assert update.std(0).min() > 0
    no_adapter = lora_linear(rows, w, a, torch.zeros_like(b), dropout_p=0.3)
    torch.testing.assert_close(no_adapter, F.linear(rows, w), rtol=0, atol=0)


def test_dropout_is_drawn_from_torchs_generator():
    x, w, a, b, bias = make_inputs(16, 4, 6, 2, (False,) * 5)
    torch.manual_seed(3)
    first, second = (lora_linear(x, w, a, b, bias, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(lora_linear(x, w, a, b, bias, dropout_p=0.5), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    lora_linear(x, w, a, b, bias)
    assert torch.equal(torch.get_rng_state(), state)


def test_philox_gives_the_published_numbers():
    zero = torch.zeros(1, dtype=torch.int64)
    words = [word.item() for word in reference.philox(zero, zero, zero, rounds=10)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    words = [word.item() for word in reference.philox(zero, zero, zero, rounds=7)]
    assert words == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


@pytest.mark.parametrize("p", [2**-16, 0.1, 0.5, 0.9])
def test_the_mask_drops_its_share_in_every_row_and_column(p):
    keep = reference.dropout_keep(torch.tensor([11]), 2000, 1000, p).double()
    sigma = (p * (1 - p)) ** 0.5
    assert abs(keep.mean() - (1 - p)) < 5 * sigma / 2e6**0.5
    assert ((keep.mean(0) - (1 - p)).abs() < 6 * sigma / 2000**0.5 + 1e-9).all() or p == 2**-16
    assert ((keep.mean(1) - (1 - p)).abs() < 6 * sigma / 1000**0.5 + 1e-9).all() or p == 2**-16


def sixteen_bits(seed: Tensor, M: int, words: int) -> Tensor:
    """The random number of each element that decides at which thresholds it is dropped, (M, 32 words)."""
    m, j, c = torch.arange(M)[:, None], torch.arange(words)[None, :], torch.arange(32)
    phase = (seed ^ seed >> 32) % 2**32 * 0xD2511F53 % 2**32
    low = (j * 0x9E3779B9 + m * 0xBB67AE85 + phase) % 2**32 >> 24
    planes = [plane for i in (0, 1) for plane in reference.philox(seed, 2 * j + i, m)]
    high = sum((plane[:, :, None] >> c & 1) << q for q, plane in enumerate(planes))
    return (256 * high + low[:, :, None]).flatten(1)


def test_an_element_is_dropped_where_its_16_bits_are_below_the_threshold():
    for seed in (torch.tensor([11]), torch.tensor([-(2**45) - 3])):
        bits = sixteen_bits(seed, 40, 9)
        for T in (0, 1, 255, 256, 257, 6554, 32768, 65279, 65280, 65535):
            assert torch.equal(reference.dropout_keep(seed, 40, 288, T / 65536), bits >= T)


@pytest.mark.parametrize("T", [1, 384, 65535])
def test_over_seeds_an_element_is_dropped_as_often_as_the_threshold_says(T):
    share, seeds, elements = T / 65536, 256, 64 * 512
    # the low bytes of a word, which its elements share, take all values over these seeds
    step = pow(0xD2511F53, -1, 2**32) * 2**24 % 2**32
    dropped = sum(
        (~reference.dropout_keep(torch.tensor([i * step % 2**32]), 64, 512, share)).sum().item()
        for i in range(seeds)
    )
    spread = (seeds * elements * share * (1 - share)) ** 0.5
    assert abs(dropped - seeds * elements * share) < 5 * spread


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_elements_of_one_word_are_uncorrelated_but_for_the_bound(p):
    keep = reference.dropout_keep(torch.tensor([7]), 2000, 1024, p).double().view(-1, 32)
    bound, words = 2**-18 / (p * (1 - p)), len(keep)
    correlation = torch.corrcoef(keep.T)
    pairs = correlation[~torch.eye(32, dtype=torch.bool)]
    assert pairs.abs().max() < bound + 5 / words**0.5
    # every pair comes twice
    assert pairs.mean().abs() < bound + 5 / (words * len(pairs) / 2) ** 0.5


def test_the_mask_of_an_element_does_not_depend_on_the_size():
    seed = torch.tensor([2**61 + 5])
    large = reference.dropout_keep(seed, 40, 200, 0.5)
    assert torch.equal(reference.dropout_keep(seed, 7, 33, 0.5), large[:7, :33])
    assert not torch.equal(large[:, :100], large[:, 100:])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_repeats_the_mask(use_reentrant):
    inputs = make_inputs(16, 4, 6, 2)
    results = []
    for wrap in (lambda f, *t: f(*t), lambda f, *t: checkpoint(f, *t, use_reentrant=use_reentrant)):
        torch.manual_seed(5)
        y = wrap(lambda *t: lora_linear(*t, dropout_p=0.5), *inputs)
        results.append(
            [y.detach(), *torch.autograd.grad(y.sum(), inputs)] if not use_reentrant else [y.detach()]
        )
        if use_reentrant:
            y.sum().backward()
            results[-1] += [t.grad for t in inputs]
            for t in inputs:
                t.grad = None
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


def saved_shapes(inputs: list[Tensor], **kwargs) -> list[tuple[int, ...]]:
    seen = []
    pack = lambda t: seen.append(tuple(t.shape)) or t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lora_linear(*inputs, **kwargs)
    return seen


def test_frozen_a_keeps_no_input():
    M, N, K, R = 7, 5, 6, 2
    assert (M, K) in saved_shapes(make_inputs(M, N, K, R, (True, False, True, True, False)))
    kept = saved_shapes(make_inputs(M, N, K, R, (True, False, False, True, False)))
    assert (M, K) not in kept
    assert (M, R) in kept
    assert saved_shapes(make_inputs(M, N, K, R, (False, False, False, True, False))) == [(M, R)]
    assert saved_shapes(make_inputs(M, N, K, R, (False, False, False, False, True))) == []


def test_dropout_keeps_one_number_for_backward():
    inputs = make_inputs(7, 5, 6, 2, (True, False, True, True, False))
    extra = list(saved_shapes(inputs, dropout_p=0.5))
    for shape in saved_shapes(inputs):
        extra.remove(shape)
    assert extra == [(1,)]


def test_saved_tensors_may_be_moved_by_hooks():
    inputs = make_inputs(7, 5, 6, 2)
    expected = gradients(lora_linear(*inputs), inputs)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        y = lora_linear(*inputs)
    for got, want in zip(gradients(y, inputs), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("constant_dy", [True, False])
def test_a_second_derivative_is_refused(constant_dy):
    inputs = make_inputs(5, 4, 6, 2)
    y = lora_linear(*inputs)
    (dx,) = torch.autograd.grad(y.sum() if constant_dy else (y * y).sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="^lora_linear: gradients must not be differentiated again"):
        dx.sum().backward()


def test_backward_writes_into_no_argument():
    inputs = make_inputs(5, 4, 6, 2)
    y = lora_linear(*inputs, dropout_p=0.5)
    dy = torch.randn_like(y)
    before = copy.deepcopy([t.detach() for t in (*inputs, dy)])
    torch.autograd.grad(y, inputs, dy)
    assert all(torch.equal(t, old) for t, old in zip((*inputs, dy), before, strict=True))


class Watch(TorchDispatchMode):
    """Keeps the names of the operations that PyTorch is asked for."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_one_op_a_pass_and_eager_code_calls_none(monkeypatch):
    inputs = make_inputs(5, 4, 6, 2)
    with Watch() as watch:
        y = lora_linear(*inputs)
        watched = gradients(y, inputs)
    ours = ["lowrank_ops::lora_forward", "lowrank_ops::lora_backward"]
    assert [name for name in watch.names if "lowrank_ops" in name] == ours
    monkeypatch.setattr(torch.ops, "lowrank_ops", None)
    for got, want in zip(gradients(lora_linear(*inputs), inputs), watched, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_it_compiles_into_one_graph(p):
    inputs = make_inputs(16, 4, 6, 2)
    compiled = torch.compile(
        lambda *t: lora_linear(*t, scale=0.5, dropout_p=p), fullgraph=True, backend="aot_eager"
    )
    torch.manual_seed(9)
    expected = lora_linear(*inputs, scale=0.5, dropout_p=p)
    wanted = gradients(expected, inputs)
    torch.manual_seed(9)
    y = compiled(*inputs)
    assert torch.equal(y, expected)
    for got, want in zip(gradients(y, inputs), wanted, strict=True):
        assert torch.equal(got, want)


def test_one_compilation_serves_any_number_of_tokens():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *t: lora_linear(*t), fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for M in (8, 12, 31):
        inputs = make_inputs(M, 4, 6, 2)
        torch.testing.assert_close(compiled(*inputs), lora_linear(*inputs))
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] == counts[2]


def op_arguments() -> dict[str, tuple]:
    x, w, a, b, bias = make_inputs(5, 4, 6, 2, (False,) * 5)
    dy, h, seed = x.new_ones(5, 4), x.new_ones(5, 2), torch.tensor([7])
    return {
        "lora_forward": (x, w, a, b, bias, 0.5, seed, 0.5),
        "lora_backward": (dy, x, w, a, b, h, None, 0.5, seed, 0.5, True, True, True),
        "lora_backward_hidden": (dy, b, 0.5),
        "lora_backward_b": (dy, h),
        "lora_backward_hidden_b": (dy, b, h, 0.5),
        "lora_backward_a": (h, x, seed, 0.5),
        "lora_backward_input": (dy, w, h, a, seed, 0.5),
    }


@pytest.mark.parametrize("name", op_arguments())
def test_every_op_passes_opcheck(name):
    op = getattr(torch.ops.lowrank_ops, name).default
    assert set(torch.library.opcheck(op, (*op_arguments()[name], "reference")).values()) == {"SUCCESS"}


def test_autocast_casts_x_and_w_and_leaves_float32_adapters():
    inputs = make_inputs(8, 4, 6, 2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(*inputs, scale=0.5)
        expected = unfused(*inputs, 0.5)
    assert y.dtype == expected.dtype == torch.bfloat16
    y.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in inputs)
    exact = unfused(*(t.double() for t in inputs), 0.5)
    assert (y.double() - exact).abs().max() <= 1.5 * (expected.double() - exact).abs().max()


def test_autocast_around_backward_changes_nothing():
    inputs = make_inputs(8, 4, 6, 2, dtype=torch.float32)
    expected = gradients(lora_linear(*inputs), inputs)
    y = lora_linear(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        for got, want in zip(gradients(y, inputs), expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_shapes_can_be_planned_on_a_meta_device(impl):
    if impl == "triton":
        pytest.importorskip("triton")
    inputs = [t.detach().float().to("meta").requires_grad_() for t in make_inputs(8, 4, 6, 2)]
    y = lora_linear(*inputs, dropout_p=0.5, impl=impl)
    assert y.shape == (8, 4)
    assert y.device.type == "meta"
    grads = torch.autograd.grad(y.sum(), inputs)
    assert [g.shape for g in grads] == [t.shape for t in inputs]


def test_a_gpu_graph_can_be_traced_with_fake_tensors():
    pytest.importorskip("triton")
    ops = torch.ops.lowrank_ops
    with torch._subclasses.fake_tensor.FakeTensorMode():
        sizes = [(16, 64), (32, 64), (4, 64), (32, 4)]
        x, w, a, b = (torch.empty(size, device="cuda", dtype=torch.bfloat16) for size in sizes)
        seed = torch.empty(1, device="cuda", dtype=torch.int64)
        y, h, _ = ops.lora_forward(x, w, a, b, None, 0.5, seed, 0.1, "auto")
        dh, db = ops.lora_backward_hidden_b(y, b, h, 1.0, "auto")
        dx = ops.lora_backward_input(y, w, dh, a, seed, 0.1, "auto")
        da = ops.lora_backward_a(dh, x, seed, 0.1, "auto")
    assert {t.device.type for t in (y, h, dh, db, dx, da)} == {"cuda"}
    shapes = [(16, 32), (16, 4), (16, 4), (32, 4), (16, 64), (4, 64)]
    assert [tuple(t.shape) for t in (y, h, dh, db, dx, da)] == shapes


def test_an_op_gives_what_its_fake_promises_though_the_implementation_keeps_a_mask(monkeypatch):
    forward = reference.lora_forward
    mask = torch.zeros(5, 1, dtype=torch.int32)
    monkeypatch.setattr(reference, "lora_forward", lambda *args: (*forward(*args)[:2], mask))
    arguments = (*op_arguments()["lora_forward"], "reference")
    assert torch.ops.lowrank_ops.lora_forward(*arguments)[2].shape == (0,)
    inputs = make_inputs(5, 4, 6, 2)
    y = lora_linear(*inputs, dropout_p=0.5)
    assert any(saved is mask for saved in y.grad_fn.saved_tensors)

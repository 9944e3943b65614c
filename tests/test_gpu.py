"""What only a GPU can show: compiled kernels in every dtype, graphs, memory, tensors past 2**31 elements."""

import itertools
import re
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import lowrank_ops as lo
from lowrank_ops import lora_linear, reference
from lowrank_ops.testing import assert_as_accurate

pytestmark = pytest.mark.gpu

# (M, N, K, R): a training step in small, ragged in every size, one token, the largest rank
SHAPES = [(2048, 1024, 4096, 16), (1001, 515, 1037, 24), (1, 512, 2048, 64), (512, 640, 1024, 512)]
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "fp16-fp32": (torch.float16, torch.float32),
    "fp32": (torch.float32, torch.float32),
}


def make_inputs(M: int, N: int, K: int, R: int, big: torch.dtype, small: torch.dtype) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(M + N + K + R)
    draw = lambda *size, scale=1.0: torch.randn(*size, device="cuda", generator=generator) * scale  # noqa: E731
    x, w, bias = draw(M, K).to(big), draw(N, K, scale=K**-0.5).to(big), draw(N).to(big)
    a, b = draw(R, K, scale=K**-0.5).to(small), draw(N, R, scale=R**-0.5).to(small)
    return [t.requires_grad_() for t in (x, w, a, b, bias)]


def unfused(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, keep: Tensor | None, p: float
) -> Tensor:
    """Return the layer as PEFT writes it, with the mask given."""
    dropped = x.to(a.dtype)
    if keep is not None:
        dropped = torch.where(keep, dropped, 0) * (65536 / (65536 - reference.keep_threshold(p)))
    return (F.linear(x, w, bias) + 0.5 * F.linear(F.linear(dropped, a), b)).to(x.dtype)


def value_and_gradients(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(1)
    dy = torch.randn(y.shape, device="cuda", generator=generator).bfloat16().to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients_are_as_accurate_as_pytorch(shape, dtypes, p, impl):
    inputs = make_inputs(*shape, *dtypes)
    torch.manual_seed(2)
    actual = value_and_gradients(lora_linear(*inputs, scale=0.5, dropout_p=p, impl=impl), inputs)
    torch.manual_seed(2)
    keep = None
    if p:
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device="cuda")
        keep = reference.dropout_keep(seed, shape[0], shape[2], p)
    baseline = value_and_gradients(unfused(*inputs, keep, p), inputs)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    truth = value_and_gradients(unfused(*exact, keep, p), exact)
    for name, got, base, true in zip(
        ["y", "dx", "dw", "da", "db", "dbias"], actual, baseline, truth, strict=True
    ):
        try:
            assert_as_accurate(got, base, true)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_two_runs_give_the_same_bits(dtypes, p):
    inputs = make_inputs(2048, 1024, 4096, 16, *dtypes)
    runs = []
    for _ in range(2):
        torch.manual_seed(4)
        runs.append(value_and_gradients(lora_linear(*inputs, dropout_p=p), inputs))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_strides_are_free(impl):
    inputs = make_inputs(520, 264, 136, 8, torch.bfloat16, torch.bfloat16)
    strided = [t.detach().T.contiguous().T.requires_grad_() if t.dim() == 2 else t for t in inputs]
    y = lora_linear(*strided, impl=impl)
    dy = torch.randn(264, 520, device="cuda").bfloat16().T
    got = torch.autograd.grad(y, strided, dy)
    want = torch.autograd.grad(lora_linear(*inputs, impl="reference"), inputs, dy.contiguous())
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02 * other.abs().max().item())


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_rows_and_biases_may_be_expanded(impl):
    M, N, K, R = 2048, 512, 1024, 16
    x, w, a, b, bias = (t.detach() for t in make_inputs(M, N, K, R, torch.bfloat16, torch.bfloat16))
    wide_bias = torch.stack([bias, -bias], 1)[:, 0]
    assert wide_bias.stride() == (2,)
    rows, dy = x[:1].expand(M, K).requires_grad_(), torch.randn(1, N, device="cuda").bfloat16().expand(M, N)
    y = lora_linear(rows, w, a, b, wide_bias, impl=impl)
    want = lora_linear(x[:1], w, a, b, bias, impl="reference")
    torch.testing.assert_close(y, want.expand(M, N), rtol=0.02, atol=0.02)
    (dx,) = torch.autograd.grad(y, rows, dy)
    exact = dy[:1].double() @ (w.double() + b.double() @ a.double())
    torch.testing.assert_close(dx.double(), exact.expand(M, K), rtol=0.02, atol=0.05)
    one = torch.tensor(5.0, device="cuda", dtype=torch.bfloat16).expand(N)
    plain = lora_linear(x, w, a, b, impl=impl)
    torch.testing.assert_close(lora_linear(x, w, a, b, one, impl=impl), plain + 5, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("shape", [(0, 5, 6, 2), (5, 0, 6, 2), (5, 6, 0, 2)], ids=str)
def test_empty_sizes_work(shape):
    M, N, K, R = shape
    sizes = [(M, K), (N, K), (R, K), (N, R), (N,)]
    empty = [torch.zeros(s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in sizes]
    for p in (0.0, 0.1):
        y = lora_linear(*empty, dropout_p=p, impl="triton")
        assert y.shape == (M, N)
        grads = torch.autograd.grad(y.sum(), empty)
        assert all(
            grad.shape == t.shape and not grad.isnan().any() for grad, t in zip(grads, empty, strict=True)
        )


def test_forward_and_backward_use_one_mask():
    # for a fixed mask the layer is linear in x, so <y, dy> = <x, dx>
    x, w, a, b, _ = make_inputs(300, 200, 160, 8, torch.float32, torch.float32)
    y = lora_linear(x, w, a, b, scale=3.0, dropout_p=0.4)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    left, right = (y.double() * dy.double()).sum(), (x.double() * dx.double()).sum()
    assert abs(left - right) < 1e-4 * (y.double().norm() * dy.double().norm())


def test_a_replayed_graph_draws_a_fresh_mask():
    x, w, a, b, bias = make_inputs(256, 128, 512, 16, torch.bfloat16, torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            torch.autograd.grad(lora_linear(x, w, a, b, bias, dropout_p=0.5).sum(), (x, a, b))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = lora_linear(x, w, a, b, bias, dropout_p=0.5)
        dx, da, db = torch.autograd.grad(y.float().sum(), (x, a, b))
    seen = []
    for _ in range(2):
        graph.replay()
        seen.append([t.clone() for t in (y, dx, da, db)])
        left = ((y.double() - bias.double()).sum(), (x.double() * dx.double()).sum())
        assert abs(left[0] - left[1]) < 0.02 * y.double().norm() * y.numel() ** 0.5
    assert not any(torch.equal(first, second) for first, second in zip(*seen, strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_repeats_the_mask(use_reentrant):
    inputs = make_inputs(256, 128, 512, 16, torch.bfloat16, torch.float32)
    torch.manual_seed(6)
    lora_linear(*inputs, dropout_p=0.5).sum().backward()
    expected = [t.grad.clone() for t in inputs]
    for t in inputs:
        t.grad = None
    torch.manual_seed(6)
    checkpoint(
        lambda *t: lora_linear(*t, dropout_p=0.5), *inputs, use_reentrant=use_reentrant
    ).sum().backward()
    assert all(torch.equal(t.grad, old) for t, old in zip(inputs, expected, strict=True))


@pytest.mark.parametrize("dtypes", [DTYPES["bf16"], DTYPES["bf16-fp32"]], ids=["bf16", "bf16-fp32"])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_inductor_compiles_it_into_one_graph(dtypes, p):
    inputs = make_inputs(512, 256, 512, 16, *dtypes)
    compiled = torch.compile(lambda *t: lora_linear(*t, scale=0.5, dropout_p=p), fullgraph=True)
    y = compiled(*inputs)
    grads = torch.autograd.grad(y, inputs, torch.ones_like(y))
    if p == 0:
        expected = lora_linear(*inputs, scale=0.5)
        assert torch.equal(y, expected)
        wanted = torch.autograd.grad(expected, inputs, torch.ones_like(y))
        for got, want in zip(grads, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=0.01, atol=0.01 * want.abs().max().item())
    else:
        left = ((y.double() - inputs[4].double()).sum(), (inputs[0].double() * grads[0].double()).sum())
        assert abs(left[0] - left[1]) < 0.02 * y.double().norm() * y.numel() ** 0.5
        assert not torch.equal(compiled(*inputs), y)


def test_autocast_takes_a_float32_layer_to_16_bits():
    inputs = make_inputs(256, 128, 512, 16, torch.float32, torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        y = lora_linear(*inputs, scale=0.5)
    assert y.dtype == torch.bfloat16
    with torch.autocast("cuda", torch.bfloat16):
        grads = torch.autograd.grad(y, inputs, torch.ones_like(y))
    assert all(grad.dtype == torch.float32 for grad in grads)


def kept_bytes(**trains: bool) -> tuple[int, Tensor]:
    M, N, K, R = 4096, 256, 4096, 16
    x, w, a, b, _ = (t.detach() for t in make_inputs(M, N, K, R, torch.bfloat16, torch.bfloat16))
    leaf = {"x": x, "a": a, "b": b}
    for name, flag in trains.items():
        leaf[name].requires_grad_(flag)
    lora_linear(x, w, a, b, dropout_p=0.1)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = lora_linear(x * 1, w, a, b, dropout_p=0.1)
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated() - before - y.numel() * y.element_size(), y


def test_memory_kept_for_backward_is_x_and_h_and_of_a_mask_at_most_its_bits():
    x_bytes, h_bytes, bits = 4096 * 4096 * 2, 4096 * 16 * 2, 4096 * 4096 // 8
    kept, _ = kept_bytes(a=True, b=True)
    assert x_bytes + h_bytes <= kept < x_bytes + bits + 2 * h_bytes
    kept, _ = kept_bytes(b=True)
    assert h_bytes <= kept < 2 * h_bytes


def test_the_peak_holds_no_copy_of_x():
    M, N, K, R = 8192, 256, 8192, 16
    x, w, a, b, _ = make_inputs(M, N, K, R, torch.bfloat16, torch.float32)
    w.requires_grad_(False)
    dy = torch.randn(M, N, device="cuda").bfloat16()
    x.requires_grad_(False)
    torch.autograd.grad(lora_linear(x, w, a, b, dropout_p=0.1), (a, b), dy)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(lora_linear(x, w, a, b, dropout_p=0.1), (a, b), dy)
    assert torch.cuda.max_memory_allocated() - before < 0.5 * x.numel() * x.element_size()


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_tensors_of_more_than_two_to_the_31_elements(impl):
    M, N, K, R = 600_000, 64, 4096, 16
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB of free GPU memory")
    _, w, a, b, bias = (t.detach() for t in make_inputs(1, N, K, R, torch.bfloat16, torch.bfloat16))
    x = torch.empty(M, K, device="cuda", dtype=torch.bfloat16).normal_()
    x.requires_grad_()
    assert x.numel() > 2**31
    y = lora_linear(x, w, a, b, bias, impl=impl)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    tail = x.detach()[-300:].clone().requires_grad_()
    expected = lora_linear(tail, w, a, b, bias, impl="reference")
    torch.testing.assert_close(y[-300:], expected, rtol=0.02, atol=0.05)
    (wanted,) = torch.autograd.grad(expected, tail, torch.ones_like(expected))
    torch.testing.assert_close(dx[-300:], wanted, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("impl", ["auto", "triton", "reference"])
def test_a_model_trains_the_same_through_every_implementation(impl):
    def losses(chosen: str) -> list[float]:
        torch.manual_seed(0)
        layers = (torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 64))
        model = lo.inject(torch.nn.Sequential(*layers).cuda().bfloat16(), lo.LoRAConfig(r=8))
        for module in model:
            if isinstance(module, lo.FusedLoRALinear):
                module.impl = chosen
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        x, target = torch.randn(512, 256, device="cuda").bfloat16(), torch.randn(512, 64, device="cuda")
        out = []
        for _ in range(10):
            loss = F.mse_loss(model(x).float(), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            out.append(loss.item())
        return out

    got = losses(impl)
    assert got[-1] < got[0]
    torch.testing.assert_close(torch.tensor(got), torch.tensor(losses("reference")), rtol=0.01, atol=0.01)


SANITIZED = """
import itertools, torch
from lowrank_ops import lora_linear
for big, small, p in itertools.product([torch.bfloat16, torch.float32], [torch.float32, None], [0.0, 0.1]):
    sizes = [(67, 75), (45, 75), (5, 75), (45, 5), (45,)]
    types = [big, big, small or big, small or big, big]
    leaves = [torch.randn(s, device="cuda").to(t).requires_grad_() for s, t in zip(sizes, types)]
    for impl in ("triton", "auto"):
        y = lora_linear(*leaves, dropout_p=p, impl=impl)
        torch.autograd.grad(y.sum(), leaves)
        torch.autograd.grad(lora_linear(*leaves, impl=impl).sum(), leaves[2])
        torch.autograd.grad(lora_linear(*leaves, impl=impl).sum(), leaves[3])
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing_at_ragged_sizes(tool):
    program = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if program is None:
        pytest.skip("needs compute-sanitizer")
    command = [
        program,
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        "--kernel-name-exclude",
        "kernel_substring=at::",
        sys.executable,
        "-c",
        SANITIZED,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert re.search(r"SUMMARY: 0 (errors|hazards)", done.stdout), done.stdout[-2000:]


def test_every_combination_of_gradients_gives_what_was_asked():
    x, w, a, b, bias = (t.detach() for t in make_inputs(130, 72, 136, 8, torch.bfloat16, torch.bfloat16))
    full = [t.clone().requires_grad_() for t in (x, w, a, b, bias)]
    want = torch.autograd.grad(lora_linear(*full).sum(), full)
    for trains in list(itertools.product([False, True], repeat=5))[1:]:
        leaves = [t.clone().requires_grad_(flag) for t, flag in zip((x, w, a, b, bias), trains, strict=True)]
        lora_linear(*leaves).sum().backward()
        for leaf, flag, grad in zip(leaves, trains, want, strict=True):
            assert (leaf.grad is not None) == flag
            if flag:
                torch.testing.assert_close(leaf.grad, grad, rtol=0.01, atol=0.01 * grad.abs().max().item())

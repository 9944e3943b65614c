"""lora_linear_group on a GPU: accuracy in every dtype, the same bits twice, graphs, memory, a model."""

import re
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from tiny_models import stir, tiny_llama, tokens
from torch import Tensor

import lowrank_ops as lo
from lowrank_ops import lora_linear_group, reference
from lowrank_ops.testing import assert_as_accurate

pytestmark = pytest.mark.gpu

# (M, K, [(N, R), ...]): q, k, v in small, ragged in every size with one rank for each, one token, gate and up
SHAPES = [
    (2048, 4096, [(1024, 16), (256, 16), (256, 16)]),
    (1001, 1037, [(515, 24), (131, 5), (77, 70)]),
    (1, 2048, [(512, 16), (128, 16)]),
    (512, 1024, [(2048, 16), (2048, 16)]),
]
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "fp16-fp32": (torch.float16, torch.float32),
    "fp32": (torch.float32, torch.float32),
}
SCALES = [0.5, 0.5, 0.5]


def make_inputs(M: int, K: int, sizes: list[tuple[int, int]], big: torch.dtype, small: torch.dtype) -> dict:
    generator = torch.Generator("cuda").manual_seed(M + K)

    def draw(*size: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, device="cuda", generator=generator) * scale).to(dtype).requires_grad_()

    return {
        "x": draw(M, K, dtype=big),
        "ws": [draw(N, K, dtype=big, scale=K**-0.5) for N, _ in sizes],
        "a_list": [draw(R, K, dtype=small, scale=K**-0.5) for _, R in sizes],
        "b_list": [draw(N, R, dtype=small, scale=R**-0.5) for N, R in sizes],
        "biases": [None if i == 1 else draw(N, dtype=big) for i, (N, _) in enumerate(sizes)],
        "scales": SCALES[: len(sizes)],
    }


def leaves(inputs: dict) -> list[Tensor]:
    lists = (inputs[name] for name in ("ws", "a_list", "b_list", "biases"))
    return [inputs["x"], *(t for values in lists for t in values if t is not None)]


def unfused(inputs: dict, keep: Tensor | None, p: float) -> list[Tensor]:
    """Return what PEFT computes, one projection at a time, with the mask given."""
    x, *lists, scales = inputs.values()
    dropped = x.to(inputs["a_list"][0].dtype)
    if keep is not None:
        dropped = torch.where(keep, dropped, 0) * (65536 / (65536 - reference.keep_threshold(p)))
    each = zip(*lists, scales, strict=True)
    return [(F.linear(x, w, c) + s * F.linear(F.linear(dropped, a), b)).to(x.dtype) for w, a, b, c, s in each]


def values_and_gradients(ys: list[Tensor], inputs: dict) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(1)
    dys = [torch.randn(y.shape, device="cuda", generator=generator).bfloat16().to(y.dtype) for y in ys]
    return [*(y.detach() for y in ys), *torch.autograd.grad(ys, leaves(inputs), dys)]


@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_as_accurate_as_pytorch(shape, dtypes, p, impl):
    inputs = make_inputs(*shape, *dtypes)
    torch.manual_seed(2)
    actual = values_and_gradients(lora_linear_group(**inputs, dropout_p=p, impl=impl), inputs)
    torch.manual_seed(2)
    keep = None
    if p:
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device="cuda")
        keep = reference.dropout_keep(seed, shape[0], shape[1], p)
    baseline = values_and_gradients(unfused(inputs, keep, p), inputs)
    exact = {
        name: value if name == "scales" else [t if t is None else t.detach().double() for t in value]
        for name, value in (inputs | {"x": [inputs["x"]]}).items()
    }
    exact["x"] = exact["x"][0]
    for t in leaves(exact):
        t.requires_grad_()
    truth = values_and_gradients(unfused(exact, keep, p), exact)
    for i, (got, base, true) in enumerate(zip(actual, baseline, truth, strict=True)):
        try:
            assert_as_accurate(got, base, true)
        except AssertionError as error:
            raise AssertionError(f"output or gradient {i}, {tuple(got.shape)}: {error}") from None


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_two_runs_give_the_same_bits(dtypes, p):
    inputs = make_inputs(*SHAPES[0], *dtypes)
    runs = []
    for _ in range(2):
        torch.manual_seed(4)
        runs.append(values_and_gradients(lora_linear_group(**inputs, dropout_p=p), inputs))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_scales_may_differ_and_outputs_go_unused(impl, p):
    inputs = make_inputs(*SHAPES[1], torch.float32, torch.float32) | {"scales": [0.5, 2.0, -1.0]}
    results = []
    for chosen in (impl, "reference"):
        torch.manual_seed(3)
        first, _, third = lora_linear_group(**inputs, dropout_p=p, impl=chosen)
        loss = first.square().sum() + third.sum()
        results.append(torch.autograd.grad(loss, leaves(inputs), allow_unused=True))
    for got, want in zip(*results, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


def test_a_replayed_graph_draws_a_fresh_mask():
    inputs = make_inputs(*SHAPES[0], *DTYPES["bf16"])
    for t in inputs["ws"]:
        t.requires_grad_(False)
    wanted = [inputs["x"], *inputs["a_list"], *inputs["b_list"]]

    def step() -> list[Tensor]:
        ys = lora_linear_group(**inputs, dropout_p=0.5)
        return [*ys, *torch.autograd.grad([y.float().sum() for y in ys], wanted)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    seen = []
    for _ in range(2):
        graph.replay()
        seen.append([t.clone() for t in outputs])
    assert not any(torch.equal(first, second) for first, second in zip(*seen, strict=True))


def test_x_is_kept_once_and_one_dx_is_made():
    M, K = 4096, 4096
    inputs = make_inputs(M, K, [(256, 16)] * 3, *DTYPES["bf16"])
    for t in (*inputs["ws"], *(t for t in inputs["biases"] if t is not None)):
        t.requires_grad_(False)
    wanted = [inputs["x"], *inputs["a_list"], *inputs["b_list"]]

    def forward() -> tuple[Tensor, ...]:
        return lora_linear_group(**{**inputs, "x": inputs["x"] * 1})

    torch.autograd.grad([y.sum() for y in forward()], wanted)
    torch.cuda.synchronize()
    before, size = torch.cuda.memory_allocated(), M * K * 2
    ys = forward()
    kept = torch.cuda.memory_allocated() - before - sum(y.nbytes for y in ys)
    assert size + M * 48 * 2 <= kept < size + 4 * M * 48 * 2
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad([y.sum() for y in ys], wanted)
    assert torch.cuda.max_memory_allocated() - before < 3.5 * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_computes_what_it_does_without_groups(dtype):
    model = stir(lo.inject(tiny_llama(), lo.LoRAConfig(r=4))).to("cuda", dtype)
    layers = [m for m in model.modules() if isinstance(m, lo.FusedLoRALinear)]
    ids, results = tokens().cuda(), []
    for grouped in (True, False):
        if not grouped:
            for layer in layers:
                layer.group = None
        loss = model(ids, labels=ids).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
        model.zero_grad()
    tolerance = 1e-3 if dtype is torch.float32 else 0.1
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * want.abs().max().item())


def test_inductor_compiles_a_model_with_groups():
    model = stir(lo.inject(tiny_llama(), lo.LoRAConfig(r=4))).cuda()
    embedded = torch.randn(2, 7, 32, device="cuda")
    wanted = model(inputs_embeds=embedded, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True)
    got = compiled(inputs_embeds=embedded, use_cache=False).logits
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)
    trained = [p for p in model.parameters() if p.requires_grad]
    grads, expected = (torch.autograd.grad(y.square().sum(), trained) for y in (got, wanted))
    for grad, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-2, atol=1e-3 * want.abs().max().item())


SANITIZED = """
import itertools, torch
from lowrank_ops import lora_linear_group
for big, small, p in itertools.product([torch.bfloat16, torch.float32], [torch.float32, None], [0.0, 0.1]):
    draw = lambda *s, t: torch.randn(s, device="cuda").to(t).requires_grad_()
    small = small or big
    x, sizes = draw(67, 75, t=big), [(45, 5), (33, 20)]
    ws, a_list = [draw(n, 75, t=big) for n, r in sizes], [draw(r, 75, t=small) for n, r in sizes]
    b_list = [draw(n, r, t=small) for n, r in sizes]
    for impl in ("triton", "auto"):
        ys = lora_linear_group(x, ws, a_list, b_list, scales=[1.0, 2.0], dropout_p=p, impl=impl)
        torch.autograd.grad([y.sum() for y in ys], [x, *ws, *a_list, *b_list])
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing_at_ragged_sizes(tool):
    program = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if program is None:
        pytest.skip("needs compute-sanitizer")
    command = [program, "--tool", tool, "--error-exitcode", "9"]
    command += ["--kernel-name-exclude", "kernel_substring=at::", sys.executable, "-c", SANITIZED]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert re.search(r"SUMMARY: 0 (errors|hazards)", done.stdout), done.stdout[-2000:]

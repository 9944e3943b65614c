"""What only a GPU can show of the launch cache: it is used, and a launch from it does what Triton's does."""

import pytest
import torch
from torch import Tensor

from lowrank_ops import lora_linear

pytestmark = pytest.mark.gpu

# even, ragged in every size (pointers instead of descriptors), one token
SHAPES = [(2048, 4096, 4096, 16), (1001, 515, 1037, 24), (1, 512, 2048, 64)]


@pytest.fixture
def plans(monkeypatch):
    """Return the module's plans, none at the start."""
    _launch = pytest.importorskip("lowrank_ops.kernels._launch")
    monkeypatch.setattr(_launch, "_plans", {})
    return _launch._plans


def make_inputs(M: int, N: int, K: int, R: int) -> list[Tensor]:
    # every sum of these is exact, in whatever order a kernel takes it
    generator = torch.Generator("cuda").manual_seed(0)
    draw = lambda *size: torch.randint(-1, 2, size, device="cuda", generator=generator).bfloat16()  # noqa: E731
    return [t.requires_grad_() for t in (draw(M, K), draw(N, K), draw(R, K), draw(N, R))]


def run(inputs: list[Tensor], p: float) -> list[Tensor]:
    torch.manual_seed(3)
    y = lora_linear(*inputs, scale=0.5, dropout_p=p, impl="triton")
    return [y.detach(), *torch.autograd.grad(y, inputs, torch.ones_like(y))]


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_planned_launches_give_the_bits_of_ordinary_ones(plans, shape, p):
    inputs = make_inputs(*shape)
    first = run(inputs, p)
    assert plans
    assert all(plan is not None for plan in plans.values())
    count = len(plans)
    # the same numbers at other addresses; results too, since the first are still held
    copies = [t.detach().clone().requires_grad_() for t in inputs]
    for again in (run(inputs, p), run(copies, p)):
        assert all(torch.equal(got, want) for got, want in zip(again, first, strict=True))
    assert len(plans) == count


def test_an_address_that_is_no_multiple_of_16_gets_a_plan_of_its_own(plans):
    x, w, a, b = make_inputs(256, 512, 512, 16)
    expected = run([x, w, a, b], 0.0)
    memory = torch.empty(256 * 512 + 1, device="cuda", dtype=torch.bfloat16)
    shifted = memory[1:].view(256, 512).copy_(x.detach()).requires_grad_()
    count = len(plans)
    for _ in range(2):
        for got, want in zip(run([shifted, w, a, b], 0.0), expected, strict=True):
            assert torch.equal(got, want)
    assert len(plans) > count


def test_launches_go_to_the_current_stream(plans):
    inputs = make_inputs(256, 512, 512, 16)
    expected = run(inputs, 0.0)
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = run(inputs, 0.0)
    for t in captured:
        t.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(got, want) for got, want in zip(captured, expected, strict=True))


def test_a_profilers_hook_sees_every_launch(plans):
    from triton import knobs

    inputs = make_inputs(256, 512, 512, 16)
    run(inputs, 0.0)
    names = []
    hook = lambda metadata: names.append(metadata.get()["name"])  # noqa: E731
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        run(inputs, 0.0)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert {"_extended_matmul_kernel", "_project_kernel"} <= set(names)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_each_gpu_has_plans_of_its_own(plans):
    inputs = make_inputs(256, 512, 512, 16)
    expected = run(inputs, 0.0)
    others = [t.detach().to("cuda:1").requires_grad_() for t in inputs]
    # the current device is the first
    for _ in range(2):
        for got, want in zip(run(others, 0.0), expected, strict=True):
            assert got.device.index == 1
            assert torch.equal(got.cpu(), want.cpu())

"""Micro benchmarks of one LoRA linear: ``pytest benchmarks --benchmark-only``.

For watching a change on one machine. The comparison with others, on real shapes with everything that
fair timing needs, is ``python -m benchmarks.run lora_linear``.
"""

import pytest
import torch

from benchmarks.case import Cell
from benchmarks.cases.lora_linear import CASE
from benchmarks.timing import Call, synchronize

pytest.importorskip("pytest_benchmark")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (M, N, K, R): bound by the host; bound by the arithmetic
SHAPES = {
    "cuda": {"small": (64, 256, 256, 16), "large": (8192, 4096, 4096, 16)},
    "cpu": {"small": (16, 64, 64, 8), "large": (256, 512, 512, 16)},
}[DEVICE]


def bind(provider: str, shape: str, dropout_p: float) -> Call:
    M, N, K, R = SHAPES[shape]
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    cell = Cell(shape, M, N, K, R, dropout_p, dtype, dtype, DEVICE)
    tensors = CASE.make_inputs(cell, torch.Generator(DEVICE).manual_seed(0))
    return Call(CASE.provider(provider).build(cell, tensors), tensors["dy"])


@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["nodrop", "drop"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("provider", ["frozen", "unfused", "addmm", "ours"])
def test_forward_and_backward(benchmark, provider, shape, dropout_p):
    call = bind(provider, shape, dropout_p)

    def step():
        call.backward(call.forward())
        synchronize(DEVICE)

    benchmark.group = f"forward and backward, {shape}, dropout {dropout_p}"
    benchmark(step)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("provider", ["frozen", "unfused", "addmm", "ours"])
def test_inference(benchmark, provider, shape):
    call = bind(provider, shape, 0.0)

    def step():
        with torch.no_grad():
            call.forward()
        synchronize(DEVICE)

    benchmark.group = f"inference, {shape}"
    benchmark(step)

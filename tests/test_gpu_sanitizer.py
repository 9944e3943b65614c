"""compute-sanitizer on the Hopper kernels: memory out of bounds, and races in shared memory."""

import inspect
import re
import shutil
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from lowrank_ops.kernels import INTERPRETED, _hopper_roles  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        INTERPRETED or (torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0)),
        reason="needs a Hopper GPU and compiled kernels",
    ),
]

SANITIZED = """
import torch
from lowrank_ops.kernels.dropout_mask import dropout_mask
from lowrank_ops.kernels.hopper import HopperConfig, hopper_backward_input, hopper_forward, hopper_matmul
from lowrank_ops.kernels.hopper_hidden import HiddenConfig, hopper_hidden
from lowrank_ops.kernels.lora_backward_factors import factor_counters, factor_gradients

M, N, K = 300, 136, 264
draw = lambda *size: torch.randn(size, device="cuda").bfloat16()
seed, C = torch.tensor([5], device="cuda"), HopperConfig
mask = dropout_mask(seed, M, K, 6554)
for P, R, bits in [(1, 16, None), (3, 16, mask), (1, 64, mask), (2, 24, None)]:
    x, scales = draw(M, K), (0.5,) * P
    Ns = [N, 72, 264][:P]
    ws, a_list, b_list = [draw(n, K) for n in Ns], [draw(R, K) for n in Ns], [draw(n, R) for n in Ns]
    biases, dys = [draw(n) for n in Ns], [draw(M, n) for n in Ns]
    ys, h = hopper_forward(x, ws, a_list, b_list, biases, scales, bits, config=C())
    kept, counters = h if R <= 16 else None, factor_counters(K, P * R)
    dx, dh, parts, zeros = hopper_backward_input(
        dys, ws, a_list, b_list, kept, scales, bits, counters, config=C()
    )
    db = None if parts is None else draw(*parts.shape[1:])
    results = [*ys, h, dx, factor_gradients(x, dh, bits, zeros, parts, db)]
    for shares in (1, 2):
        config = HiddenConfig(SHARES=shares)
        results += hopper_hidden(x, a_list, seed, 6554, scales, config=config)
    if P == 1:
        results += [hopper_matmul(True, x, ws[0], h, b_list[0], biases[0], None, C(SIDES=0))]
        results += [hopper_matmul(False, dys[0], ws[0], dh, a_list[0], None, bits, C(SIDES=0))]
    torch.cuda.synchronize()
    assert all(t.isfinite().all() for t in results)
"""


def sanitize(*options: str) -> str:
    name = "compute-sanitizer"
    program = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if program is None:
        pytest.skip("needs compute-sanitizer")
    command = [program, *options, "--kernel-name-exclude", "kernel_substring=at::"]
    command += [sys.executable, "-c", SANITIZED]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_memcheck_finds_nothing_at_ragged_sizes():
    assert "SUMMARY: 0 errors" in sanitize("--tool", "memcheck", "--error-exitcode", "9")


def test_racecheck_finds_no_hazard_in_what_the_kernels_share():
    # Triton hands each warp its role through a byte, between named barriers that racecheck does not see, nor
    # does it see cuBLAS's; those accesses belong to no line of a role
    found = sanitize("--tool", "racecheck", "--racecheck-report", "hazard", "--print-limit", "1000000")
    assert "RACECHECK SUMMARY" in found
    lines, first = inspect.getsourcelines(_hopper_roles.hopper_kernel.fn)
    start = next(i for i, line in enumerate(lines) if "def hopper_kernel" in line)
    call = next(i for i, line in enumerate(lines) if "gl.warp_specialize(" in line)
    expected = {f"_hopper_roles.py:{first + start}", f"_hopper_roles.py:{first + call}"}
    assert set(re.findall(r"(?:Read|Write) Thread .* in (\S+)", found)) <= expected
    assert len(re.findall("hazard detected", found)) * 2 == len(re.findall(r"(?:Read|Write) Thread ", found))

"""Any ranks in one model: how many variants of each kernel an op makes Triton compile."""

import sys

import pytest
import torch
from ahead_of_time import TARGETS, Recorder

triton = pytest.importorskip("triton")

from triton.compiler import make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from lowrank_ops import kernels  # noqa: E402
from lowrank_ops.kernels import _correlate, _matmul, _project, _ragged, _sum_parts  # noqa: E402
from lowrank_ops.kernels._config import DeviceFacts  # noqa: E402
from lowrank_ops.kernels._ragged import is_ragged, wide_rank  # noqa: E402

pytestmark = pytest.mark.skipif(kernels.INTERPRETED, reason="TRITON_INTERPRET is set: nothing is compiled")

JITS = [
    (_matmul, "_extended_matmul_kernel"),
    (_project, "_project_kernel"),
    (_correlate, "_correlate_kernel"),
    (sys.modules["lowrank_ops.kernels.lora_backward_hidden_b"], "_lora_backward_hidden_b_kernel"),
    (_sum_parts, "_sum_parts_kernel"),
    (_ragged, "_fill_kernel"),
]
FACTS = DeviceFacts(arch="sm90", processors=132)
N, K = 4096, 4096


@pytest.fixture
def record(monkeypatch):
    recorders = [Recorder(getattr(module, name)) for module, name in JITS]
    for (module, name), recorder in zip(JITS, recorders, strict=True):
        monkeypatch.setattr(module, name, recorder)
    return recorders


def launch(op: str, M: int, R: int, small: torch.dtype) -> None:
    """Launch what ``impl="auto"`` would, and nothing where that is cuBLAS."""
    big = torch.bfloat16
    ragged = is_ragged([R], M * K)
    width = wide_rank(R) if ragged else R
    empty = lambda *size, dtype=big: torch.empty(*size, dtype=dtype, device="meta")  # noqa: E731
    x, w, dy = empty(M, K), empty(N, K), empty(M, N)
    a, b, h = empty(R, K, dtype=small), empty(N, R, dtype=small), empty(M, width, dtype=small)
    wide_a = _ragged.filled_rows(a) if ragged and op == "lora_backward_input" else a
    wide_b = _ragged.filled_columns(b) if ragged and op in ("lora_forward", "lora_backward_hidden") else b
    more = {"lora_hidden": {"width": width}, "lora_backward_b": {"rank": R}, "lora_backward_a": {"rank": R}}
    # what pick calls the op, its N and K, and the launch with a config
    ops = {
        "lora_hidden": ("lora_hidden", 0, K, kernels.lora_hidden, (x, a, 0.5, None, 0.0)),
        "lora_forward": (
            "lora_forward", N, K, _matmul.extended_matmul, (x, w, h, wide_b, None, None, 0, empty(M, N)),
        ),
        "lora_backward_hidden": ("lora_hidden", 0, N, kernels.lora_backward_hidden, (dy, wide_b, 0.5)),
        "lora_backward_b": ("lora_backward_a", 0, N, kernels.lora_backward_b, (dy, h)),
        "lora_backward_hidden_b": (
            "lora_backward_hidden_b", N, 0, kernels.lora_backward_hidden_b, (dy, b, h, 0.5),
        ),
        "lora_backward_a": ("lora_backward_a", 0, K, kernels.lora_backward_a, (h, x, None, 0.0)),
        "lora_backward_input": (
            "lora_backward_input", N, K, kernels.lora_backward_input, (dy, w, h, wide_a, None, 0.0),
        ),
    }  # fmt: skip
    name, n, k, run, arguments = ops[op]
    config = kernels.pick(name, M, n, k, width, big, FACTS, wide=big != small)
    is_gemm_or_pair = op in ("lora_forward", "lora_backward_input", "lora_backward_hidden_b")
    if not (config.CUBLAS and (is_gemm_or_pair or big == small)):
        run(*arguments, config=config, **more.get(op, {}))


def variants(recorder: Recorder) -> int:
    backend, kernel = make_backend(TARGETS["sm90"]), recorder.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    keys = set()
    for args, kwargs in recorder.launches:
        _, specialization, options = bind(*args, debug=False, **kwargs)
        keys.add(f"{specialization} {options}")
    return len(keys)


OPS = [
    "lora_hidden",
    "lora_forward",
    "lora_backward_hidden",
    "lora_backward_b",
    "lora_backward_hidden_b",
    "lora_backward_a",
    "lora_backward_input",
]


@pytest.mark.parametrize("small", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("M", [8192, 1001])
@pytest.mark.parametrize("op", OPS)
def test_all_ranks_together_need_at_most_five_variants_of_a_kernel(record, op, M, small):
    for R in range(1, 513):
        launch(op, M, R, small)
    found = {r.kernel.__name__: variants(r) for r in record if r.launches}
    assert not {name: count for name, count in found.items() if count > 5}

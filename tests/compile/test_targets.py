"""Every kernel builds for every supported GPU without one, and spills no register on any of them."""

import sys

import pytest
import torch
from ahead_of_time import TARGETS, Recorder, compile_launch, resources

triton = pytest.importorskip("triton")

from lowrank_ops import kernels  # noqa: E402
from lowrank_ops.kernels import _correlate, _matmul, _project, _sum_parts  # noqa: E402
from lowrank_ops.kernels._config import DeviceFacts  # noqa: E402

pytestmark = pytest.mark.skipif(kernels.INTERPRETED, reason="TRITON_INTERPRET is set: nothing is compiled")

JITS = [
    (_matmul, "_extended_matmul_kernel"),
    (_project, "_project_kernel"),
    (_correlate, "_correlate_kernel"),
    (sys.modules["lowrank_ops.kernels.lora_backward_hidden_b"], "_lora_backward_hidden_b_kernel"),
    (_sum_parts, "_sum_parts_kernel"),
]
PROCESSORS = {"sm80": 108, "sm90": 132, "sm100": 148, "gfx942": 304}
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "fp16-fp32": (torch.float16, torch.float32),
    "fp32": (torch.float32, torch.float32),
}
# (M, N, K, R): a training step at a common rank and at the largest, ragged everywhere, one token, and the
# largest rank whose tiles with float32 adapters are not those of all above
SHAPES = {
    "train": (8192, 4096, 4096, 16),
    "rank512": (4096, 4096, 4096, 512),
    "ragged": (1001, 515, 1037, 40),
    "token": (1, 4096, 4096, 16),
    "rank32": (8192, 4096, 4096, 32),
}
# the widest tiles and ranks, and the most masks, of each kind of product
EVERYWHERE = [
    ("train", "bf16"),
    ("rank512", "bf16"),
    ("token", "bf16"),
    ("train", "bf16-fp32"),
    ("ragged", "bf16-fp32"),
    ("train", "fp32"),
]
# where the tables were measured, every combination of dtypes once or twice
MEASURED = [
    ("ragged", "bf16"),
    ("train", "fp16"),
    ("rank512", "fp16-fp32"),
    ("ragged", "fp32"),
    ("rank32", "bf16-fp32"),
    ("rank512", "bf16-fp32"),
]
CASES = [*((target, *case) for target in TARGETS for case in EVERYWHERE), *(("sm90", *c) for c in MEASURED)]
SHARED_MEMORY = {"sm80": 166912, "sm90": 232448, "sm100": 232448, "gfx942": 65536}  # bytes a program may have


@pytest.fixture
def record(monkeypatch):
    recorders = [Recorder(getattr(module, name)) for module, name in JITS]
    for (module, name), recorder in zip(JITS, recorders, strict=True):
        monkeypatch.setattr(module, name, recorder)
    return recorders


def launch_everything(shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype], target: str) -> None:
    (M, N, K, R), (big, small) = shape, dtypes
    empty = lambda *size, dtype=big: torch.empty(*size, dtype=dtype, device="meta")  # noqa: E731
    x, w, dy, bias = empty(M, K), empty(N, K), empty(M, N), empty(N)
    a, b, h = empty(R, K, dtype=small), empty(N, R, dtype=small), empty(M, R, dtype=small)
    facts = DeviceFacts(arch=target, processors=PROCESSORS[target])

    def pick(op: str, n: int, k: int, dropout: bool = False) -> kernels.TileConfig:
        return kernels.pick(op, M, n, k, R, big, facts, wide=big != small, dropout=dropout)

    _matmul.extended_matmul(x, w, h, b, bias, None, 0, empty(M, N), pick("lora_forward", N, K))
    # a later link of the dx of a group
    link = pick("lora_backward_input", N, K)
    _matmul.extended_matmul(dy, w.T, None, None, None, None, 0, empty(M, K), link)
    for seed, p in ((None, 0.0), (empty(1, dtype=torch.int64), 0.1)):
        drops = seed is not None
        kernels.lora_hidden(x, a, 0.5, seed, p, config=pick("lora_hidden", 0, K, drops))
        kernels.lora_backward_a(h, x, seed, p, config=pick("lora_backward_a", 0, K, drops))
        kernels.lora_backward_input(dy, w, h, a, seed, p, config=pick("lora_backward_input", N, K, drops))
        update = kernels.dispatch.ADD_UPDATE
        _matmul.extended_matmul(None, None, h, b, None, seed, 6554 if drops else 0, empty(M, N), update)
    kernels.lora_backward_hidden(dy, b, 0.5, config=pick("lora_hidden", 0, N))
    kernels.lora_backward_b(dy, h, config=pick("lora_backward_a", 0, N))
    kernels.lora_backward_hidden_b(dy, b, h, 0.5, config=pick("lora_backward_hidden_b", N, 0))


@pytest.mark.parametrize(("target", "shape", "dtypes"), CASES, ids=str)
def test_every_launch_compiles_fits_and_spills_nothing(record, target, shape, dtypes):
    launch_everything(SHAPES[shape], DTYPES[dtypes], target)
    assert all(recorder.launches for recorder in record)
    bad = {}
    for recorder in record:
        for args, kwargs in recorder.launches:
            found = resources(compile_launch(recorder.kernel, args, kwargs, TARGETS[target]))
            if found["spilled"] or found["shared"] > SHARED_MEMORY[target]:
                bad[f"{recorder.kernel.__name__} {kwargs}"] = found
    assert not bad


def test_the_gemm_uses_hopper_matrix_instructions_and_copy_engine(record):
    launch_everything(SHAPES["train"], DTYPES["bf16"], "sm90")
    args, kwargs = record[0].launches[0]
    ptx = compile_launch(record[0].kernel, args, kwargs, TARGETS["sm90"]).asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "cp.async.bulk.tensor" in ptx

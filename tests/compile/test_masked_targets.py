"""The kernels of a masked b build for every target, and on Hopper its sums beside the GEMM spill nothing."""

import pytest
import torch
from ahead_of_time import TARGETS, Recorder, compile_launch, resources
from torch import Tensor

triton = pytest.importorskip("triton")

from lowrank_ops import kernels  # noqa: E402
from lowrank_ops.kernels import _masked_matmul, hopper, masked_values  # noqa: E402
from lowrank_ops.kernels._config import DeviceFacts  # noqa: E402

pytestmark = pytest.mark.skipif(kernels.INTERPRETED, reason="TRITON_INTERPRET is set: nothing is compiled")

PROCESSORS = {"sm80": 108, "sm90": 132, "sm100": 148, "gfx942": 304}
SHARED_MEMORY = {"sm80": 166912, "sm90": 232448, "sm100": 232448, "gfx942": 65536}  # bytes a program may have


def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*size, dtype=dtype, device="meta")


@pytest.mark.parametrize("target", TARGETS)
def test_packing_and_unpacking_build_for_every_target(monkeypatch, target):
    recorders = [Recorder(getattr(masked_values, name)) for name in ("_unpack_kernel", "_pack_sum_kernel")]
    for recorder in recorders:
        monkeypatch.setattr(masked_values, recorder.kernel.__name__, recorder)
    N, R, count = 515, 40, 5000
    words, offsets = empty(N, 2, dtype=torch.int32), empty(N + 1, dtype=torch.int32)
    values, parts = empty(count), empty(4, N, R, dtype=torch.float32)
    kernels.unpack_values(values, words, offsets, R)
    kernels.pack_sum(parts, words, offsets, empty(N, 2, dtype=torch.int32), values)
    for recorder in recorders:
        ((args, kwargs),) = recorder.launches
        assert resources(compile_launch(recorder.kernel, args, kwargs, TARGETS[target]))["spilled"] == 0


# (M, N, K, R), dtype: the most tokens, ragged everywhere, one token
EXPANDED = [
    ((64, 4096, 4096, 32), torch.bfloat16),
    ((33, 515, 1037, 40), torch.float16),
    ((1, 4096, 4096, 32), torch.bfloat16),
]


@pytest.mark.parametrize("target", TARGETS)
def test_the_product_that_expands_entries_builds_for_every_target(monkeypatch, target):
    recorder = Recorder(_masked_matmul._masked_matmul_kernel)
    monkeypatch.setattr(_masked_matmul, "_masked_matmul_kernel", recorder)
    facts = DeviceFacts(arch=target, processors=PROCESSORS[target])
    for (M, N, K, R), dtype in EXPANDED if target == "sm90" else EXPANDED[:1]:
        words, offsets = empty(N, -(-R // 32), dtype=torch.int32), empty(N + 1, dtype=torch.int32)
        x, w, h, values, bias = (empty(*s, dtype=dtype) for s in ((M, K), (N, K), (M, R), (3 * N,), (N,)))
        config = kernels.pick("lora_forward", M, N, K, R, dtype, facts)
        _masked_matmul.masked_matmul(x, w, h, values, words, offsets, bias, config)
    for args, kwargs in recorder.launches:
        found = resources(compile_launch(recorder.kernel, args, kwargs, TARGETS[target]))
        assert found["spilled"] == 0, kwargs
        assert found["shared"] <= SHARED_MEMORY[target]


# (M, N, K, R), dropout: the largest rank; one that fills no box, with a mask of dropout too
HOPPER = [((4096, 4096, 4096, 32), False), ((2056, 1112, 4104, 24), True)]


@pytest.mark.parametrize(("shape", "drop"), HOPPER, ids=str)
def test_the_hopper_kernel_sums_masked_entries_without_spilling(monkeypatch, shape, drop):
    (M, N, K, R), dtype = shape, torch.float16 if drop else torch.bfloat16
    recorder = Recorder(hopper.hopper_kernel)
    monkeypatch.setattr(hopper, "hopper_kernel", recorder)
    monkeypatch.setattr(hopper, "device_facts", lambda device: DeviceFacts(arch="sm90", processors=132))
    mask = empty(M, triton.cdiv(K, 32), dtype=torch.int32) if drop else None
    entries = (empty(N, 1, dtype=torch.int32), empty(N + 1, dtype=torch.int32), 3 * N)
    dy, w, a, b, h = (empty(*size, dtype=dtype) for size in ((M, N), (N, K), (R, K), (N, R), (M, R)))
    done = hopper.hopper_backward_input(
        [dy], [w], [a], [b], h, (0.5,), mask, 0, entries, config=hopper.HopperConfig()
    )
    assert done[2].shape == (4, 3 * N)
    ((args, kwargs),) = recorder.launches
    compiled = compile_launch(recorder.kernel, args, kwargs, TARGETS["sm90"])
    found = resources(compiled)
    assert found["spilled"] == 0
    assert found["shared"] <= SHARED_MEMORY["sm90"]
    assert "popc.b32" in compiled.asm["ptx"]

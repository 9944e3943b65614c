"""DenseLoRA's kernels build for every supported GPU without one, and spill no register on any of them."""

import pytest
import torch
from ahead_of_time import TARGETS, Recorder, compile_launch, resources
from torch import Tensor

triton = pytest.importorskip("triton")

from lowrank_ops import kernels  # noqa: E402
from lowrank_ops.kernels import (  # noqa: E402
    dense_lora_backward_update,
    dense_lora_hidden,
    dense_lora_output,
    hopper,
    hopper_dense,
)
from lowrank_ops.kernels._config import DeviceFacts  # noqa: E402
from lowrank_ops.kernels.dense_dispatch import ADD_UPDATE  # noqa: E402

pytestmark = pytest.mark.skipif(kernels.INTERPRETED, reason="TRITON_INTERPRET is set: nothing is compiled")

PROCESSORS = {"sm80": 108, "sm90": 132, "sm100": 148, "gfx942": 304}
SHARED_MEMORY = {"sm80": 166912, "sm90": 232448, "sm100": 232448, "gfx942": 65536}  # bytes a program may have
JITS = [
    (dense_lora_output, "_dense_output_kernel"),
    (dense_lora_hidden, "_activate_kernel"),
    (dense_lora_hidden, "_hidden_gradients_kernel"),
    (dense_lora_backward_update, "_dense_backward_kernel"),
]
# (M, N, K, R), dtype: a training step at a common rank with dropout, a large rank, ragged everywhere
TRAIN = ((8192, 4096, 4096, 16), torch.bfloat16)
WIDE = ((2056, 1112, 1024, 64), torch.float16)
RAGGED = ((1001, 515, 1037, 40), torch.float32)
CASES = [("sm90", *TRAIN), ("gfx942", *WIDE), ("sm80", *RAGGED)]


def empty(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*size, dtype=dtype, device="meta")


@pytest.fixture
def record(monkeypatch):
    recorders = [Recorder(getattr(module, name)) for module, name in JITS]
    for (module, name), recorder in zip(JITS, recorders, strict=True):
        monkeypatch.setattr(module, name, recorder)
    return recorders


def launch_everything(
    shape: tuple[int, ...], dtype: torch.dtype, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (M, N, K, R), facts = shape, DeviceFacts(arch=target, processors=PROCESSORS[target])
    for module in (dense_lora_output, dense_lora_backward_update):
        monkeypatch.setattr(module, "device_facts", lambda device: facts)
    draw = lambda *size: empty(*size, dtype=dtype)  # noqa: E731
    x, w, bias, h, b, dy = draw(M, K), draw(N, K), draw(N), draw(M, R), draw(N, R), draw(M, N)
    # dropout where the rank is common: what asks for most registers
    drops = R == 16
    seed = empty(3, dtype=torch.int64) if drops else None
    config = kernels.pick("lora_forward", M, N, K, R, dtype, facts, dropout=drops)
    config = dense_lora_output.narrowed(config, target)
    threshold = 3277 if drops else 0
    dense_lora_output.dense_output(x, w, h, b, bias, 2.0, True, seed, threshold, draw(M, N), config)
    dense_lora_output.dense_output(None, None, h, b, None, 2.0, True, seed, threshold, dy, ADD_UPDATE)
    dense_lora_hidden.activate(h, True, seed, threshold)
    dense_lora_backward_update.dense_backward_update(dy, b, h, h, 2.0, True, seed, threshold, dtype, True)


@pytest.mark.parametrize(("target", "shape", "dtype"), CASES, ids=str)
def test_every_launch_compiles_fits_and_spills_nothing(record, monkeypatch, target, shape, dtype):
    launch_everything(shape, dtype, target, monkeypatch)
    assert [len(recorder.launches) for recorder in record] == [2, 1, 1, 1]
    bad = {}
    for recorder in record:
        for args, kwargs in recorder.launches:
            found = resources(compile_launch(recorder.kernel, args, kwargs, TARGETS[target]))
            if found["spilled"] or found["shared"] > SHARED_MEMORY[target]:
                bad[f"{recorder.kernel.__name__} {kwargs}"] = found
    assert not bad


# (R, gelu, drop, bias, sides): every value of every constant, the widest rank with all of them
HOPPER = [(64, True, True, True, 4), (16, False, False, False, 0)]


@pytest.mark.parametrize("case", HOPPER, ids=str)
def test_the_hopper_kernel_fits_and_spills_nothing(monkeypatch, case):
    (R, gelu, drop, bias, sides), (M, N, K) = case, (2056, 1112, 4104)
    recorder = Recorder(hopper_dense.hopper_dense_kernel)
    monkeypatch.setattr(hopper_dense, "hopper_dense_kernel", recorder)
    facts = DeviceFacts(arch="sm90", processors=132)
    monkeypatch.setattr(hopper_dense, "device_facts", lambda device: facts)
    draw = lambda *size: empty(*size, dtype=torch.bfloat16)  # noqa: E731
    seed = empty(3, dtype=torch.int64) if drop else None
    mask = empty(M, triton.cdiv(K, 32), dtype=torch.int32) if drop and sides else None
    done = hopper_dense.hopper_dense_forward(
        draw(M, K), draw(N, K), draw(R, K), draw(N, R), draw(N) if bias else None, 2.0, gelu, seed, mask,
        3277 if drop else 0, None if sides else draw(M, R), config=hopper.HopperConfig(SIDES=sides),
    )  # fmt: skip
    assert done is not None
    ((args, kwargs),) = recorder.launches
    compiled = compile_launch(recorder.kernel, args, kwargs, TARGETS["sm90"])
    found = resources(compiled)
    assert found["spilled"] == 0
    assert found["shared"] <= SHARED_MEMORY["sm90"]
    assert "wgmma.mma_async" in compiled.asm["ptx"]

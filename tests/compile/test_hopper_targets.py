"""The Hopper kernels build without such a GPU and spill nothing; what runs beside them builds everywhere."""

from dataclasses import dataclass, replace

import pytest
import torch
from ahead_of_time import TARGETS, Recorder, compile_launch, resources
from torch import Tensor

triton = pytest.importorskip("triton")

from lowrank_ops import kernels  # noqa: E402
from lowrank_ops.kernels import (  # noqa: E402
    _cast,
    dropout_mask,
    hopper,
    hopper_hidden,
    lora_backward_factors,
)
from lowrank_ops.kernels._config import DeviceFacts  # noqa: E402

pytestmark = pytest.mark.skipif(kernels.INTERPRETED, reason="TRITON_INTERPRET is set: nothing is compiled")

PROCESSORS = {"sm80": 108, "sm90": 132, "sm100": 148, "gfx942": 304}
SHARED_MEMORY = {"sm80": 166912, "sm90": 232448, "sm100": 232448, "gfx942": 65536}  # bytes a program may have
BF16, FP16 = torch.bfloat16, torch.float16
EVEN, RAGGED = (4096, 4096, 4096), (2056, 1112, 4104)  # (M, N, K)


@dataclass(frozen=True)
class Case:
    """One launch. P: projections; 0: the factor exists already, and no side program makes it."""

    forward: bool
    P: int
    R: int
    drop: bool = False
    bias: bool = False
    db: bool = False
    dtype: torch.dtype = BF16
    sizes: tuple[int, int, int] = EVEN

    def __str__(self) -> str:
        flags = [name for name in ("drop", "bias", "db") if getattr(self, name)]
        way = "forward" if self.forward else "backward"
        return "-".join([way, f"P{self.P}", f"R{self.R}", *flags, str(self.dtype).removeprefix("torch.")])


# every branch of the kernel, and of each what asks for most registers: all ranks in the widest tile, masks,
# three projections
CASES = [
    Case(True, 1, 16),
    Case(True, 1, 8, drop=True, bias=True, sizes=RAGGED),
    Case(True, 1, 64, drop=True, dtype=FP16),
    Case(True, 1, 128),
    Case(True, 2, 64, bias=True, dtype=FP16, sizes=RAGGED),
    Case(True, 3, 16, drop=True, bias=True),
    Case(False, 1, 16, drop=True, db=True),
    Case(False, 1, 128, drop=True, dtype=FP16, sizes=RAGGED),
    Case(False, 2, 32),
    Case(False, 3, 8, drop=True, db=True, dtype=FP16, sizes=RAGGED),
    Case(False, 3, 64, drop=True),
    Case(True, 0, 512, bias=True, dtype=FP16, sizes=RAGGED),
    Case(True, 0, 16),
    Case(False, 0, 16, drop=True, sizes=RAGGED),
    Case(False, 0, 128, dtype=FP16),
]


def empty(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*size, dtype=dtype, device="meta")


@pytest.fixture
def record(monkeypatch):
    """Return what is recorded of a kernel after it is put in its place in a module, for one target."""

    def replace(module: object, name: str, target: str) -> Recorder:
        recorder = Recorder(getattr(module, name))
        monkeypatch.setattr(module, name, recorder)
        if hasattr(module, "device_facts"):
            facts = DeviceFacts(arch=target, processors=PROCESSORS[target])
            monkeypatch.setattr(module, "device_facts", lambda device: facts)
        return recorder

    return replace


def launch(case: Case) -> object:
    (M, N, K), R, P = case.sizes, case.R, max(case.P, 1)
    draw = lambda *size: empty(*size, dtype=case.dtype)  # noqa: E731
    x, ws = draw(M, K), [draw(N, K) for _ in range(P)]
    a_list, b_list, dys = ([draw(*size) for _ in range(P)] for size in ((R, K), (N, R), (M, N)))
    mask = empty(M, triton.cdiv(K, 32), dtype=torch.int32) if case.drop else None
    biases = [draw(N) for _ in range(P)] if case.bias else []
    config = hopper.HopperConfig(SIDES=4 if case.P else 0, GROUP_M=16 if case.bias else 8)
    if case.P == 0:
        left, factor = (x, b_list[0]) if case.forward else (dys[0], a_list[0])
        bias = biases[0] if biases else None
        return hopper.hopper_matmul(case.forward, left, ws[0], draw(M, R), factor, bias, mask, config)
    scales = (0.5,) * P
    if case.forward:
        return hopper.hopper_forward(x, ws, a_list, b_list, biases, scales, mask, config=config)
    h = draw(M, P * R) if case.db else None
    return hopper.hopper_backward_input(dys, ws, a_list, b_list, h, scales, mask, 64, config=config)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_branch_of_the_hopper_kernel_fits_and_spills_nothing(record, case):
    recorder = record(hopper, "hopper_kernel", "sm90")
    assert launch(case) is not None
    ((args, kwargs),) = recorder.launches
    compiled = compile_launch(recorder.kernel, args, kwargs, TARGETS["sm90"])
    found = resources(compiled)
    assert found["spilled"] == 0
    assert found["shared"] <= SHARED_MEMORY["sm90"]
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert "cp.async.bulk.tensor" in compiled.asm["ptx"]


# projections, ranks, shares of K: one factor, the widest, several, one share
HIDDEN = [(1, 16, 2), (1, 128, 2), (3, 32, 4), (2, 8, 1)]


@pytest.mark.parametrize(("P", "R", "shares"), HIDDEN, ids=str)
def test_the_kernel_for_h_and_its_mask_fits_and_spills_nothing(record, P, R, shares):
    recorder = record(hopper_hidden, "hopper_hidden_kernel", "sm90")
    (M, _, K), dtype = (EVEN, BF16) if R % 16 == 0 else (RAGGED, FP16)
    seed = empty(1, dtype=torch.int64)
    config = replace(hopper_hidden.hidden_config(M), SHARES=shares)
    x, a_list = empty(M, K, dtype=dtype), [empty(R, K, dtype=dtype) for _ in range(P)]
    assert hopper_hidden.hopper_hidden(x, a_list, seed, 6554, (0.5,) * P, config=config) is not None
    ((args, kwargs),) = recorder.launches
    found = resources(compile_launch(recorder.kernel, args, kwargs, TARGETS["sm90"]))
    assert found["spilled"] == 0
    # two programs a multiprocessor
    assert found["shared"] <= SHARED_MEMORY["sm90"] // 2


def test_cases_have_every_value_of_every_constant():
    values = {name: {getattr(case, name) for case in CASES} for name in ("P", "drop", "bias", "db", "dtype")}
    assert values == {
        "P": {0, 1, 2, 3}, "drop": {False, True}, "bias": {False, True}, "db": {False, True},
        "dtype": {BF16, FP16},
    }  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_the_mask_kernel_builds_for_every_target(record, target):
    recorder = record(dropout_mask, "_mask_kernel", target)
    seed = empty(1, dtype=torch.int64)
    for M, K in ((4096, 4096), (1001, 1037)):
        dropout_mask.dropout_mask(seed, M, K, 6554)
    for args, kwargs in recorder.launches:
        found = resources(compile_launch(recorder.kernel, args, kwargs, TARGETS[target]))
        assert found["spilled"] == 0
    assert len(recorder.launches) == 2


@pytest.mark.parametrize("target", TARGETS)
def test_the_copy_with_zeros_builds_for_every_target(record, target):
    recorder = record(dropout_mask, "_drop_kernel", target)
    dropout_mask.drop_some(empty(1001, 1037, dtype=BF16), empty(1, dtype=torch.int64), 6554)
    ((args, kwargs),) = recorder.launches
    assert resources(compile_launch(recorder.kernel, args, kwargs, TARGETS[target]))["spilled"] == 0


# (M, K, R): every size of a block, ragged in all, one share
FACTORS = [(8192, 14336, 16), (8192, 14336, 128), (8192, 4096, 128), (2056, 1112, 40), (64, 4096, 8)]


# without dropout the kernel has nothing that it lacks with it: once is enough, where it matters most
@pytest.mark.parametrize(("target", "drop"), [*((target, True) for target in TARGETS), ("sm90", False)])
def test_the_kernel_for_both_factors_builds_for_every_target(record, target, drop):
    recorder = record(lora_backward_factors, "_factors_kernel", target)
    # only Hopper's passes launch it
    cases = FACTORS if target == "sm90" else FACTORS[3:]
    for i, (M, K, R) in enumerate(cases):
        dtype = (BF16, FP16)[i % 2]
        mask = empty(M, triton.cdiv(K, 32), dtype=torch.int32) if drop else None
        counters = empty(lora_backward_factors.factor_counters(K, R), dtype=torch.int32)
        parts = empty(4, K, R, dtype=torch.float32) if R <= 16 else None
        db = None if parts is None else empty(K, R, dtype=dtype)
        x, dh = empty(M, K, dtype=dtype), empty(M, R, dtype=dtype)
        lora_backward_factors.factor_gradients(x, dh, mask, counters, parts, db)
    assert len(recorder.launches) == len(cases)
    assert {kwargs["SHARES"] > 1 for _, kwargs in recorder.launches} == {True, False}
    for args, kwargs in recorder.launches:
        found = resources(compile_launch(recorder.kernel, args, kwargs, TARGETS[target]))
        assert found["shared"] <= SHARED_MEMORY[target]
        # sm80, which has other kernels for this, keeps one address on the stack
        assert found["spilled"] <= (8 if target == "sm80" else 0), kwargs


def test_what_casts_and_joins_factors_builds(record):
    casts, joins = (record(_cast, name, "sm90") for name in ("_cast_kernel", "_beside_kernel"))
    tensors = [empty(128, R, dtype=torch.float32) for R in (16, 8, 16)]
    _cast.cast_pair(*tensors[:2], BF16, 1.5)
    _cast.beside(tensors, 1)
    for recorder in (casts, joins):
        ((args, kwargs),) = recorder.launches
        assert resources(compile_launch(recorder.kernel, args, kwargs, TARGETS["sm90"]))["spilled"] == 0


def test_a_joint_gradient_of_x_with_factors_that_exist_fits_and_spills_nothing(record):
    recorder = record(hopper, "hopper_kernel", "sm90")
    (M, N, K), R, config = EVEN, 16, hopper.HopperConfig(SIDES=0)
    dys, ws, a_list = ([empty(*size, dtype=BF16)] * 3 for size in ((M, N), (N, K), (R, K)))
    mask = empty(M, K // 32, dtype=torch.int32)
    assert hopper.hopper_input(dys, ws, empty(M, 3 * R, dtype=BF16), a_list, mask, config=config) is not None
    ((args, kwargs),) = recorder.launches
    found = resources(compile_launch(recorder.kernel, args, kwargs, TARGETS["sm90"]))
    assert (found["spilled"], found["shared"] <= SHARED_MEMORY["sm90"]) == (0, True)

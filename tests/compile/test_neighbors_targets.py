"""The neighbour kernels build for every supported GPU without one, and spill no register on any of them."""

import pytest
import torch
from ahead_of_time import TARGETS, Recorder, compile_launch, resources

triton = pytest.importorskip("triton")

from lowrank_ops import kernels  # noqa: E402
from lowrank_ops.kernels import _exact_neighbors, _screen_neighbors  # noqa: E402
from lowrank_ops.kernels._config import DeviceFacts  # noqa: E402

pytestmark = pytest.mark.skipif(kernels.INTERPRETED, reason="TRITON_INTERPRET is set: nothing is compiled")

JITS = [
    (_screen_neighbors, "_round_points_kernel"),
    (_screen_neighbors, "_screen_kernel"),
    (_exact_neighbors, "_measure_kernel"),
    (_exact_neighbors, "_search_kernel"),
]
PROCESSORS = {"sm80": 108, "sm90": 132, "sm100": 148, "gfx942": 304}
SHARED_MEMORY = {"sm80": 166912, "sm90": 232448, "sm100": 232448, "gfx942": 65536}  # bytes a program may have
SHAPES = [(20000, 4096), (5000, 577)]


@pytest.fixture
def record(monkeypatch):
    recorders = [Recorder(getattr(module, name)) for module, name in JITS]
    for (module, name), recorder in zip(JITS, recorders, strict=True):
        monkeypatch.setattr(module, name, recorder)
    return recorders


def launch_everything(M: int, K: int, dtype: torch.dtype, target: str) -> None:
    facts = DeviceFacts(arch=target, processors=PROCESSORS[target])
    config = _screen_neighbors.pick_screen(target)
    points = torch.empty(M, K, dtype=dtype, device="meta")
    centre = torch.empty(K, device="meta")
    rounded, square, error = _screen_neighbors.round_points(points, centre, 0.5, config)
    keys = _screen_neighbors.screen(rounded, square, M, config, facts)
    _exact_neighbors.measure_candidates(points, keys, square, error, rounded.shape[1], config, 0.5)
    rows = torch.empty(100, dtype=torch.int64, device="meta")
    _exact_neighbors.search_all(points, rows, 0.5, facts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_every_launch_compiles_fits_and_spills_nothing(record, target, dtype):
    for shape in SHAPES:
        launch_everything(*shape, dtype, target)
    bad = {}
    for recorder in record:
        assert len(recorder.launches) == len(SHAPES)
        for args, kwargs in recorder.launches:
            found = resources(compile_launch(recorder.kernel, args, kwargs, TARGETS[target]))
            if found["spilled"] or found["shared"] > SHARED_MEMORY[target]:
                bad[f"{recorder.kernel.__name__} {kwargs}"] = found
    assert not bad


def test_screening_uses_hopper_matrix_instructions_and_copy_engine(record):
    launch_everything(*SHAPES[0], torch.float32, "sm90")
    args, kwargs = record[1].launches[0]
    ptx = compile_launch(record[1].kernel, args, kwargs, TARGETS["sm90"]).asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "cp.async.bulk.tensor" in ptx

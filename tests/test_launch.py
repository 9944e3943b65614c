"""The launch cache: its keys tell apart what Triton tells apart, its calls are those that Triton makes."""

import importlib
import itertools
import sys
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.driver import CudaLauncher, wrap_handle_tensordesc  # noqa: E402
from triton.compiler import CompiledKernel, make_backend  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from lowrank_ops import kernels  # noqa: E402
from lowrank_ops.kernels import _correlate, _launch, _matmul, _project, _sum_parts, _triton_api  # noqa: E402

pytestmark = pytest.mark.skipif(kernels.INTERPRETED, reason="TRITON_INTERPRET is set: nothing is compiled")

_hidden_b = sys.modules["lowrank_ops.kernels.lora_backward_hidden_b"]
_factors = importlib.import_module("lowrank_ops.kernels.lora_backward_factors")
CONFIG = kernels.TileConfig(BLOCK_ROWS=16, BLOCK_COLS=32, BLOCK_DEPTH=32, SPLIT=2)
DESCRIPTORS = kernels.TileConfig(BLOCK_ROWS=32, BLOCK_COLS=32, BLOCK_DEPTH=32, DESCRIPTORS=True)
KERNELS = {
    "_project_kernel": _project,
    "_correlate_kernel": _correlate,
    "_sum_parts_kernel": _sum_parts,
    "_extended_matmul_kernel": _matmul,
    "_lora_backward_hidden_b_kernel": _hidden_b,
    "_factors_kernel": _factors,
}


def tensor(*size: int, dtype: torch.dtype = torch.float16, shift: int = 0, pitch: int = 0) -> torch.Tensor:
    """Return a tensor at a multiple of 16 bytes plus ``shift`` elements, whose rows lie ``pitch`` apart."""
    memory = torch.zeros(16 + shift + sum(size) + size[0] * (size[-1] + pitch), dtype=dtype)
    first = -memory.data_ptr() // dtype.itemsize % (16 // dtype.itemsize) + shift
    return memory[first : first + size[0] * (size[-1] + pitch)].view(size[0], -1)[:, : size[-1]]


def passes(M: int, N: int, K: int, R: int, small: torch.dtype, shift: int, pitch: int, seed: object):
    """Yield a call of every launcher: prepare, tensors, numbers."""
    x, w, dy = tensor(M, K, shift=shift, pitch=pitch), tensor(N, K, pitch=pitch), tensor(M, N, shift=shift)
    a, b, h = (tensor(*size, dtype=small) for size in ((R, K), (N, R), (M, R)))
    threshold = 0 if seed is None else 6554
    yield _project._prepare, (x, a, seed, tensor(M, R, dtype=small)), (0.5, threshold, CONFIG)
    yield _project._prepare, (dy, b.T, None, tensor(M, R, dtype=small)), (0.5, 0, CONFIG)
    yield _correlate._prepare, (x, h, seed, tensor(R, K, dtype=small)), (1, K, R, threshold, CONFIG)
    yield _sum_parts._prepare, (torch.zeros(3, M, R), tensor(M, R, dtype=small), None, None), ()
    for config in (CONFIG, DESCRIPTORS):
        y, dx = tensor(M, N), tensor(M, K, shift=shift)
        yield _matmul._prepare, (x, w, h, b, None, None, y), (0, config)
        yield _matmul._prepare, (dy, w.T, h, a.T, None, seed, dx), (threshold, config)
        yield _matmul._prepare, (None, None, h, b, None, seed, y), (threshold, config)
    parts = torch.zeros(2, M, R), torch.zeros(2, N, R)
    yield _hidden_b._prepare, (dy, b, h, *parts), (0.5, CONFIG)


def many_calls():
    sizes = [
        (64, 48, 32, 16),
        (32, 48, 32, 16),
        (64, 40, 33, 16),
        (1, 48, 32, 16),
        (64, 48, 32, 1),
        (17, 9, 5, 3),
    ]
    smalls, shifts = (torch.float16, torch.float32), (0, 1)
    seeds = (None, torch.tensor([3]))
    for size, small, shift, pitch, seed in itertools.product(sizes, smalls, shifts, (0, 8), seeds):
        yield from passes(*size, small, shift, pitch, seed)


def triton_key(what: _launch.Launch) -> tuple:
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(what.kernel.signature, what.kernel.params, backend)
    _, specialization, options = bind(*what.args, debug=False, **what.constants)
    return what.kernel.__name__, str(specialization), str(options)


def test_launches_of_one_plan_are_one_kernel_to_triton_with_the_same_numbers():
    seen = {}
    count = 0
    for prepare, tensors, numbers in many_calls():
        key, _ = _launch.plan_key(prepare, tensors, numbers)
        what = prepare(*tensors, *numbers)
        scalars = [value for value in what.args if isinstance(value, (int, float))]
        found = (triton_key(what), what.grid, scalars)
        count += 1
        assert seen.setdefault(key, found) == found
    # the cases repeat keys, or nothing was tested, and differ
    assert len({found[0] for found in seen.values()}) > 40
    assert 100 < len(seen) < count


@pytest.mark.parametrize(
    "other",
    [
        (tensor(8, 32, shift=1), None),
        (tensor(8, 32, dtype=torch.bfloat16), None),
        (tensor(8, 32, pitch=8), None),
        (tensor(9, 32), None),
        (tensor(8, 32), tensor(8, 32)),
    ],
    ids=["address", "dtype", "stride", "shape", "presence"],
)
def test_a_key_sees_each_property_of_a_tensor(other):
    key = lambda tensors, numbers=(1, 2.0): _launch.plan_key(passes, tensors, numbers)[0]  # noqa: E731
    plain = (tensor(8, 32), None)
    assert key(plain) == key((tensor(8, 32), None))
    assert key(plain) != key(other)
    assert key(plain) != key(plain, (1, 3.0))


def factor_calls(*sizes: tuple[int, int, int, int]):
    """Yield what the launcher for both factors gives to ``launch``, for sizes (M, N, K, R)."""
    found = []
    keep = lambda *call, fresh: found.append((*call[:2], fresh, call[2:]))  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_factors, "launch", keep)
        for (M, N, K, R), flags, mask, HAS_DB in itertools.product(sizes, (1, 4), *[(False, True)] * 2):
            zeros = torch.zeros(flags + 400 + 4 * N * R)
            counters = _launch.Part(zeros, flags, (_factors.factor_counters(K, R),), torch.int32)
            parts = _launch.Part(zeros, flags // 4 * 4 + 400, (4, N, R), torch.float32) if HAS_DB else None
            words = torch.zeros(M, -(-K // 32), dtype=torch.int32) if mask else None
            db = tensor(N, R) if HAS_DB else None
            _factors.factor_gradients(tensor(M, K), tensor(M, R), words, counters, parts, db)
    return found


def test_fresh_tensors_of_one_plan_are_one_kernel_to_triton_with_the_same_numbers():
    sizes = [(64, 48, 32, 16), (640, 48, 32, 16), (640, 40, 32, 16), (17, 48, 33, 1)]
    seen, count = {}, 0
    for prepare, tensors, fresh, numbers in factor_calls(*sizes) + factor_calls(*sizes):
        key, addresses = _launch.plan_key(prepare, tensors, numbers, fresh)
        everything = (*tensors, *(t.tensor() if isinstance(t, _launch.Part) else t for t in fresh))
        assert addresses == [None if t is None else t.data_ptr() for t in everything]
        what = prepare(*everything, *numbers)
        scalars = [value for value in what.args if isinstance(value, (int, float))]
        found = (triton_key(what), what.grid, scalars)
        count += 1
        assert seen.setdefault(key, found) == found
    assert 20 < len(seen) <= count // 2


def test_a_key_sees_presence_and_alignment_of_what_is_fresh_and_no_more():
    x, base = tensor(8, 32), tensor(1, 64, dtype=torch.float32)[0]
    key = lambda *fresh: _launch.plan_key(passes, (x,), (1,), fresh)[0]  # noqa: E731
    part = lambda start: _launch.Part(base, start, (4,), torch.int32)  # noqa: E731
    assert key(tensor(8, 32)) == key(tensor(8, 32)) == key(tensor(4, 4)) == key(part(0)) == key(part(4))
    assert len({key(tensor(8, 32)), key(tensor(8, 32, shift=1)), key(None), key(part(1)), key()}) == 5


def test_a_part_is_a_view_of_its_base():
    base = torch.arange(24.0)
    part = _launch.Part(base, 4, (2, 3, 2), torch.float32)
    assert torch.equal(part.tensor(), base[4:16].view(2, 3, 2))
    assert part.data_ptr() == part.tensor().data_ptr()
    counters = _launch.Part(torch.zeros(8), 3, (5,), torch.int32)
    assert counters.tensor().dtype is torch.int32
    assert counters.data_ptr() == counters.tensor().data_ptr()


def test_a_plan_launches_at_the_addresses_of_what_is_fresh(planned):
    kept = [factor_calls((640, 48, 32, 16)) for _ in range(2)]
    for prepare, tensors, fresh, numbers in itertools.chain(*kept):
        _launch.launch(prepare, tensors, *numbers, fresh=fresh)
    assert len(planned.calls) == len(kept[1]) == 8
    for (prepare, tensors, fresh, numbers), (grid, _, values) in zip(kept[1], planned.calls, strict=True):
        everything = (*tensors, *(t.tensor() if isinstance(t, _launch.Part) else t for t in fresh))
        what = prepare(*everything, *numbers)
        assert (grid, values) == (what.grid, expanded(what))


class FakeKernel:
    """Stands in for a jit function: knows its arguments, and keeps those of its launches."""

    def __init__(self, kernel: object) -> None:
        self.arg_names, self.launches = kernel.arg_names, []

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *args, **constants: self.launches.append((grid, args, constants))


@pytest.fixture
def planned(monkeypatch):
    """Pretend that there is a GPU and a compiled kernel; return the calls that plans make."""
    calls, encoded = [], []

    class Maker:
        def __init__(self, descriptor):
            self.meta = {"block": descriptor.block_shape}
            self.fields = {"shape": tuple(descriptor.shape), "strides": tuple(descriptor.strides)}

        def __call__(self, address):
            encoded.append(address)
            return [f"map of {address}", *self.fields["shape"], *self.fields["strides"]]

    for name, module in KERNELS.items():
        monkeypatch.setattr(module, name, FakeKernel(getattr(module, name)))
    fakes = {
        "bind": lambda compiled, grid: lambda stream, values: calls.append((grid, stream, values)),
        "descriptor_makers": lambda compiled, descriptors: [Maker(d) for d in descriptors],
        "may_bypass": lambda kernel: True,
        "on_gpu": lambda tensors: True,
        "current_stream": lambda: lambda device: 700 + device,
        "_plans": {},
    }
    for name, value in fakes.items():
        monkeypatch.setattr(_launch, name, value)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return SimpleNamespace(calls=calls, encoded=encoded, plans=fakes["_plans"])


def expanded(what: _launch.Launch) -> list[object]:
    """Return the arguments of a launch as the compiled kernel takes them, addresses for tensors."""
    values = []
    for value in (*what.args, *(what.constants[name] for name in what.kernel.arg_names[len(what.args) :])):
        if _triton_api.is_descriptor(value):
            values += [f"map of {value.base.data_ptr()}", *value.shape, *value.strides]
        else:
            values.append(value.data_ptr() if isinstance(value, torch.Tensor) else value)
    return values


def test_a_plan_launches_what_the_first_launch_would_with_new_addresses(planned):
    call = lambda: list(passes(64, 48, 32, 16, torch.float16, 0, 0, torch.tensor([3])))  # noqa: E731
    kept = [call(), call(), call()]
    for prepare, tensors, numbers in itertools.chain(*kept):
        _launch.launch(prepare, tensors, *numbers)
    for (prepare, tensors, numbers), (grid, stream, values) in zip(
        [*kept[1], *kept[2]], planned.calls, strict=True
    ):
        what = prepare(*tensors, *numbers)
        assert (grid, stream, values) == (what.grid, 700, expanded(what))
    assert any("map of" in str(value) for _, _, values in planned.calls for value in values)


def test_a_descriptor_is_encoded_once_for_an_address(planned):
    x, w, h, b = tensor(64, 32), tensor(48, 32), tensor(64, 16), tensor(48, 16)
    outs = [tensor(64, 48) for _ in range(3)]
    for out in (*outs, *outs):
        _launch.launch(_matmul._prepare, (x, w, h, b, None, None, out), 0, DESCRIPTORS)
    assert sorted(planned.encoded) == sorted(t.data_ptr() for t in (x, w, *outs))
    assert _launch._encoded.cache_info().maxsize == _launch._MOST_DESCRIPTORS


def test_old_plans_make_room_for_new_ones(planned, monkeypatch):
    monkeypatch.setattr(_launch, "_MOST_PLANS", 3)
    for rows in range(1, 9):
        parts, out = torch.zeros(2, rows, 4), torch.zeros(rows, 4)
        _launch.launch(_sum_parts._prepare, (parts, out, None, None))
    assert len(planned.plans) == 3
    _launch.launch(_sum_parts._prepare, (torch.zeros(2, 8, 4), torch.zeros(8, 4), None, None))
    assert len(planned.calls) == 1


def test_a_plan_keeps_no_tensor(planned):
    for prepare, tensors, numbers in passes(64, 48, 32, 16, torch.float16, 0, 0, None):
        _launch.launch(prepare, tensors, *numbers)
    for key, plan in planned.plans.items():
        assert not any(isinstance(value, torch.Tensor) for value in (*key, *plan.values))


def test_a_launch_that_is_watched_goes_through_triton(planned, monkeypatch):
    def sum_up():
        _launch.launch(_sum_parts._prepare, (torch.zeros(2, 8, 4), torch.zeros(8, 4), None, None))

    with monkeypatch.context() as watched:
        watched.setattr(_launch, "may_bypass", lambda kernel: False)
        sum_up()
    assert planned.plans == {}
    sum_up()
    monkeypatch.setattr(_launch, "may_bypass", lambda kernel: False)
    sum_up()
    assert planned.calls == []
    assert len(_sum_parts._sum_parts_kernel.launches) == 3


def test_a_tensor_passed_twice_is_left_to_triton(planned):
    x, h = tensor(32, 32), tensor(32, 16)
    for _ in range(3):
        _launch.launch(_matmul._prepare, (x, x, h, h, None, None, tensor(32, 32)), 0, DESCRIPTORS)
    assert planned.calls == []
    assert len(_matmul._extended_matmul_kernel.launches) == 3
    for _ in range(2):
        w, b = tensor(32, 32), tensor(32, 16)
        _launch.launch(_matmul._prepare, (x, w, h, b, None, None, tensor(32, 32)), 0, DESCRIPTORS)
    assert len(planned.calls) == 1


def test_a_hook_or_an_option_leaves_launches_to_triton(monkeypatch):
    kernel, hook = _project._project_kernel, lambda *args: None
    assert _triton_api.may_bypass(kernel)
    assert not _triton_api.may_bypass(FakeKernel(kernel))
    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        chain.add(hook)
        assert not _triton_api.may_bypass(kernel)
        chain.remove(hook)
    settings = [
        (knobs.runtime, "launch_enter_hook", hook),
        (knobs.runtime, "debug", True),
        (knobs.runtime, "add_stages_inspection_hook", hook),
        (knobs.compilation, "instrumentation_mode", "proton"),
        (kernel, "pre_run_hooks", [hook]),
    ]
    for owner, name, value in settings:
        with monkeypatch.context() as changed:
            changed.setattr(owner, name, value)
            assert not _triton_api.may_bypass(kernel)
    assert _triton_api.may_bypass(kernel)


META = {"swizzle": 3, "elem_size": 2, "elem_type": 6, "block_size": [32, 32], "fp4_padded": False}
SIGNATURE = {"x": "*fp16", "t": "tensordesc<fp16[32,32]>", "M": "i32", "BLOCK": "constexpr"}


@pytest.fixture
def compiled(monkeypatch):
    """Return a kernel with Triton's own launcher around a function that keeps what it is called with."""
    calls = []
    utils = SimpleNamespace(launch=lambda *args: calls.append(args))
    utils.fill_tma_descriptor = utils.fill_tma_descriptor_tiled = lambda *args: args
    monkeypatch.setattr(driver, "_active", SimpleNamespace(utils=utils))
    launcher = object.__new__(CudaLauncher)
    vars(launcher).update(
        launch=wrap_handle_tensordesc(utils.launch, SIGNATURE, [META]),
        num_ctas=1, global_scratch_size=0, global_scratch_align=1, profile_scratch_size=0,
        profile_scratch_align=1, launch_cooperative_grid=True, launch_pdl=False, gsan_enabled=False,
        arg_annotations=["annotations"], kernel_signature=b"signature",
    )  # fmt: skip
    kernel = object.__new__(CompiledKernel)
    vars(kernel).update(
        module=None, function=99, _run=launcher, packed_metadata=(4, 1, 1024),
        metadata=SimpleNamespace(global_scratch_size=0, profile_scratch_size=0, tensordesc_meta=[META]),
    )  # fmt: skip
    return kernel, calls


def as_lists(value: object) -> object:
    return [as_lists(v) for v in value] if isinstance(value, (list, tuple)) else value


def test_a_bound_kernel_is_called_as_tritons_launcher_calls_it(compiled):
    kernel, calls = compiled
    base = tensor(64, 32)
    descriptor = _matmul.TensorDescriptor.from_tensor(base, [32, 32])
    kernel.run(5, 1, 1, 7, 99, kernel.packed_metadata, None, None, None, 1234, descriptor, 64, 32)
    (maker,) = _triton_api.descriptor_makers(kernel, [descriptor])
    encoded = maker(base.data_ptr())
    _triton_api.bind(kernel, (5,))(7, [1234, *encoded, 64, 32])
    assert len(calls) == 2
    assert as_lists(calls[0]) == as_lists(calls[1])


def test_what_is_not_known_is_not_bound(compiled):
    kernel, _ = compiled
    assert _triton_api.bind(kernel, (5,)) is not None
    assert _triton_api.bind(None, (5,)) is None
    kernel.metadata.global_scratch_size = 128
    assert _triton_api.bind(kernel, (5,)) is None
    kernel.metadata.global_scratch_size = 0

    class CudaLauncher:
        def __call__(self, grid, stream, *args):
            pass

    kernel._run = CudaLauncher()
    assert _triton_api.bind(kernel, (5,)) is None
    kernel.metadata.tensordesc_meta = None
    assert _triton_api.descriptor_makers(kernel, ["descriptor"]) is None

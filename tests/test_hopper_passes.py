"""Passes that the host has seen before launch what they launched then, on the tensors of now."""

import ctypes
import importlib
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from lowrank_ops import kernels  # noqa: E402
from lowrank_ops.kernels import _launch, hopper  # noqa: E402
from lowrank_ops.kernels._tape import Tape  # noqa: E402

pytestmark = pytest.mark.skipif(kernels.INTERPRETED, reason="TRITON_INTERPRET is set: nothing is compiled")

passes = importlib.import_module("lowrank_ops.kernels.hopper_passes")
lora = importlib.import_module("lowrank_ops.kernels.hopper_lora")
dispatch = importlib.import_module("lowrank_ops.kernels.dispatch")
kernels_of_passes = [
    (importlib.import_module(f"lowrank_ops.kernels.{name}"), kernel)
    for name, kernel in [
        ("hopper", "hopper_kernel"),
        ("hopper_hidden", "hopper_hidden_kernel"),
        ("lora_backward_factors", "_factors_kernel"),
        ("lora_backward_hidden_b", "_lora_backward_hidden_b_kernel"),
        ("dropout_mask", "_mask_kernel"),
        ("_project", "_project_kernel"),
        ("_correlate", "_correlate_kernel"),
        ("_sum_parts", "_sum_parts_kernel"),
        ("_cast", "_cast_kernel"),
        ("_ragged", "_fill_kernel"),
    ]
]
forward, backward = dispatch.lora_group_forward, dispatch.lora_group_backward
M, K, R = 96, 64, 16


class FakeKernel:
    """Stands in for a jit function: knows its arguments, and itself as what it was compiled to."""

    def __init__(self, kernel: object) -> None:
        self.arg_names, self.pre_run_hooks = kernel.arg_names, []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **constants: self


class Maker(SimpleNamespace):
    """Stands in for what encodes descriptors."""

    __hash__ = object.__hash__

    def __call__(self, address: int) -> list[object]:
        return [address]


def makers(compiled: FakeKernel, descriptors: list[object]) -> list[Maker]:
    fields = [{"shape": tuple(d.shape), "strides": tuple(d.strides)} for d in descriptors]
    return [Maker(fields=own, meta=d.block_shape) for own, d in zip(fields, descriptors, strict=True)]


@pytest.fixture
def calls(monkeypatch):
    """Pretend that there is an H100 and compiled kernels; return the calls that plans make."""
    calls = []

    def bind(compiled: FakeKernel, grid: tuple[int, ...]) -> Callable[[int, list[object]], None]:
        def call(stream: int, values: list[object]) -> None:
            if "flags_ptr" in compiled.arg_names:
                # each of its 17 descriptors has become five values
                place = compiled.arg_names.index("flags_ptr") + 4 * 17
                # where there are none, h stands for them
                if values[place] != values[place - 1]:
                    assert ctypes.string_at(values[place], 4) == bytes(4), "flags must be zeros"
            calls.append((compiled, grid, values))

        return call

    fakes = {
        (_launch, "bind"): bind,
        (_launch, "descriptor_makers"): makers,
        (_launch, "may_bypass"): lambda kernel: True,
        (_launch, "on_gpu"): lambda tensors: True,
        (_launch, "current_stream"): lambda: lambda device: 7,
        (_launch, "_plans"): {},
        (lora, "forward_config"): lambda *sizes: hopper.HopperConfig(SIDES=4),
        (lora, "backward_config"): lambda *sizes: hopper.HopperConfig(SIDES=4),
        (lora, "_worthwhile"): lambda *sizes: True,
        (dispatch, "_hopper"): lambda device: lora,
        (dispatch, "_is_left"): lambda *sizes: False,
        (passes, "_here"): lambda t, known: True,
        (passes, "_forward"): {},
        (passes, "_backward"): {},
        (torch.cuda, "current_device"): lambda: 0,
    }
    for (module, name), value in fakes.items():
        monkeypatch.setattr(module, name, value)
    for module, name in kernels_of_passes:
        monkeypatch.setattr(module, name, FakeKernel(getattr(module, name)))
    # so that what is allocated and not zeros is none
    torch.use_deterministic_algorithms(True)
    yield calls
    torch.use_deterministic_algorithms(False)


def draw(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(size, dtype=dtype)


def named(calls: list[tuple], tensors: dict[str, Tensor | None]) -> list[tuple]:
    """Return the launches with (name, byte) for addresses inside ``tensors``, and numbers for others."""
    spans = [(t.data_ptr(), t.nbytes, name) for name, t in tensors.items() if t is not None]
    others: dict[int, int] = {}

    def name(v: object) -> object:
        if type(v) is not int or v <= 1 << 24:
            return v
        inside = [(name, v - low) for low, size, name in spans if low <= v < low + size]
        return inside[0] if inside else others.setdefault(v, -len(others))

    return [(kernel, grid, [name(v) for v in values]) for kernel, grid, values in calls]


@pytest.mark.parametrize("p", [0.0, 0.25], ids=["all", "dropout"])
@pytest.mark.parametrize(
    ("Ns", "R", "adapters", "sides"),
    [((80,), 16, torch.bfloat16, 4), ((48, 32), 16, torch.bfloat16, 4), ((80,), 24, torch.bfloat16, 0),
     ((80,), 6, torch.bfloat16, 4), ((80,), 16, torch.float32, 4)],
    ids=str,
)  # fmt: skip
def test_a_known_pass_launches_what_an_ordinary_one_does(calls, monkeypatch, Ns, R, adapters, sides, p):
    monkeypatch.setattr(lora, "forward_config", lambda *sizes: hopper.HopperConfig(SIDES=sides))
    P, scales = len(Ns), tuple([0.5, 2.0][: len(Ns)])
    a_list, b_list = ([draw(*size, dtype=adapters) for size in sizes] for sizes in
                      ([(R, K)] * P, [(N, R) for N in Ns]))  # fmt: skip
    ws, biases = [draw(N, K) for N in Ns], [draw(N) for N in Ns]
    x, dys = draw(M, K), [draw(M, N) for N in Ns]
    given, seed = (ws, a_list, b_list, biases), torch.tensor([1]) if p else None
    flat = [t for own in given for t in own]
    inputs = {"x": x, "seed": seed, **{f"given{i}": t for i, t in enumerate((*flat, *dys))}}
    # the first launches are Triton's; the second are from plans, and recorded; the third are from the record
    for _ in range(2):
        calls.clear()
        ys, h, mask = passes.lora_group_forward(x, *given, scales, seed, p, forward)
        before = named(calls, inputs | {f"made{i}": t for i, t in enumerate((*ys, h, mask))})
        calls.clear()
        needs = True, [True] * P, [True] * P
        dx, das, dbs = passes.lora_group_backward(
            dys, x, *given[:3], h, mask, scales, seed, p, *needs, backward
        )
    grads = dx, *das, *dbs
    after = named(calls, inputs | {f"made{i}": t for i, t in enumerate((h, mask, *grads))})
    calls.clear()
    found = passes.find_forward(x.view(2, M // 2, K), *given, scales, p)
    ys, h, mask = passes.known_forward(found, x.view(2, M // 2, K), flat, seed)
    assert [tuple(y.shape) for y in ys] == [(2, M // 2, N) for N in Ns]
    assert named(calls, inputs | {f"made{i}": t for i, t in enumerate((*ys, h[:M], mask))}) == before
    calls.clear()
    own = passes.known_backward(dys, x, *given[:3], h, mask, scales, seed, p)
    assert [t.shape for t in own] == [t.shape for t in grads]
    assert named(calls, inputs | {f"made{i}": t for i, t in enumerate((h, mask, *own))}) == after
    # what differs in a layout or a number is not known
    assert passes.find_forward(x[::2], *given, scales, p) is None
    assert passes.find_forward(x, *given, (3.0, *scales[1:]), p) is None
    assert passes.find_forward(x.half(), *given, scales, p) is None
    assert passes.find_forward(x, *given, scales, 0.5) is None
    assert passes.known_backward(dys, x, *given[:3], h, mask, scales, seed, 0.5) is None


def test_a_pass_with_work_of_others_in_it_is_not_recorded(calls):
    x, w, a, b = draw(M, K), draw(80, K), draw(R, K), draw(80, R)
    with Tape() as tape:
        hopper.hopper_outputs(x, [w], torch.mm(x, a.T), [b], [], config=hopper.HopperConfig(SIDES=0))
    assert not tape.complete


def test_a_known_pass_leaves_tensors_off_16_bytes_to_others(calls):
    w, a, b = draw(80, K), draw(R, K), draw(80, R)
    x = draw(M * K + 1)
    for _ in range(2):
        passes.lora_group_forward(x[:-1].view(M, K), [w], [a], [b], [None], (0.5,), None, 0.0, forward)
    shifted = x[1:].view(M, K)
    found = passes.find_forward(shifted, (w,), (a,), (b,), (None,), (0.5,), 0.0)
    assert found is not None
    assert passes.known_forward(found, shifted, (w, a, b, None), None) is None


def test_a_record_does_not_import_the_compiler():
    # whose import holds on to the frames of all callers, and to their tensors
    code = (
        "import sys, torch\n"
        "from lowrank_ops.kernels._tape import Tape\n"
        "with Tape() as tape:\n"
        "    torch.empty(3).new_zeros(2)\n"
        "sys.exit('torch._dynamo' in sys.modules or not tape.complete)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_record_that_is_given_up_holds_no_tensors():
    with Tape() as tape:
        kept = torch.empty(3)
        assert [t.data_ptr() for t, _ in tape._made] == [kept.data_ptr()]
        torch.ones(2).add_(1)
    assert (tape._made, tape.complete) == ([], False)

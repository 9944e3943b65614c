"""When the Hopper kernels serve, with which sizes, and what they leave to others: decided without a GPU."""

import itertools
import sys

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from lowrank_ops import kernels  # noqa: E402
from lowrank_ops.kernels import (  # noqa: E402
    _launch,
    _ragged,
    _sum_parts,
    dispatch,
    hopper,
    hopper_apart,
    hopper_hidden,
    hopper_lora,
)
from lowrank_ops.kernels._config import DeviceFacts  # noqa: E402
from lowrank_ops.kernels.hopper import HopperConfig  # noqa: E402

pytestmark = pytest.mark.skipif(kernels.INTERPRETED, reason="TRITON_INTERPRET is set: nothing is compiled")

H100 = DeviceFacts(arch="sm90", processors=132)


class FakeKernel:
    """Stands in for a jit function: knows its arguments, and keeps those of its launches."""

    def __init__(self, kernel: object) -> None:
        self.kernel, self.arg_names, self.launches = kernel, kernel.arg_names, []

    def __getitem__(self, grid: tuple[int, ...]):
        def keep(*args: object, **constants: object) -> None:
            self.launches.append(dict(zip(self.arg_names, args, strict=False)) | constants | {"grid": grid})

        return keep


@pytest.fixture
def fakes(monkeypatch):
    """Pretend to be on an H100 where every size is worth a launch; return the kernels' stand-ins."""
    beside = {
        "hopper_kernel": hopper,
        "hopper_hidden_kernel": hopper_hidden,
        "_mask_kernel": sys.modules["lowrank_ops.kernels.dropout_mask"],
        "_factors_kernel": sys.modules["lowrank_ops.kernels.lora_backward_factors"],
        "_sum_parts_kernel": _sum_parts,
        "_fill_kernel": _ragged,
    }
    fakes = {name: FakeKernel(getattr(module, name)) for name, module in beside.items()}
    for name, module in beside.items():
        monkeypatch.setattr(module, name, fakes[name])
    for module in (hopper, hopper_lora, beside["_factors_kernel"]):
        monkeypatch.setattr(module, "device_facts", lambda device: H100)
    for name in ("forward_config", "backward_config"):
        monkeypatch.setattr(hopper_lora, name, lambda *sizes: HopperConfig())
    monkeypatch.setattr(hopper_lora, "_worthwhile", lambda *sizes: True)
    monkeypatch.setattr(dispatch, "_hopper", lambda device: hopper_lora)
    return fakes


M, K, N, SCALE = 40, 64, 48, 0.5
SEED = torch.tensor([3])


def draw(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(size, dtype=dtype)


def forward(x: Tensor, ws: list, a_list: list, b_list: list, biases: list, seed: Tensor | None = None):
    return hopper_lora.lora_forward(x, ws, a_list, b_list, biases, [SCALE] * len(ws), seed, 0.1)


def layers(P: int, R: int) -> tuple:
    return draw(M, K), [draw(N, K)] * P, [draw(R, K)] * P, [draw(N, R)] * P, [draw(N)] * P


def apart(t: Tensor) -> Tensor:
    """Return a copy whose columns do not lie side by side."""
    return t.T.contiguous().T


def shifted(t: Tensor) -> Tensor:
    """Return a copy at an address that is no multiple of 16."""
    return t.new_zeros(t.numel() + 1)[1:].view(t.shape)


def pitched(t: Tensor, by: int) -> Tensor:
    """Return a copy whose rows lie ``by`` elements further apart."""
    return t.new_zeros(t.shape[0], t.shape[1] + by)[:, : t.shape[1]]


UNFIT = {
    "columns-apart": apart,
    "every-other-column": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "address": shifted,
    "pitch": lambda t: pitched(t, 4),
    "overlapping-rows": lambda t: t[:1].expand(t.shape),
    "float32": Tensor.float,
    "other-16-bit": Tensor.half,
}


@pytest.mark.parametrize("unfit", UNFIT)
@pytest.mark.parametrize("which", range(4), ids=["x", "w", "a", "b"])
@pytest.mark.parametrize("seed", [None, SEED], ids=["plain", "drop"])
def test_tensors_that_the_copy_engine_cannot_take_are_refused(fakes, which, unfit, seed):
    x, ws, a_list, b_list, biases = layers(1, 16)
    assert forward(x, ws, a_list, b_list, biases, seed) is not None
    dy, h = draw(M, N), draw(M, 16)
    launched = len(fakes["hopper_kernel"].launches)
    tensors = [x, ws[0], a_list[0], b_list[0]]
    tensors[which] = UNFIT[unfit](tensors[which])
    x, w, a, b = tensors
    assert forward(x, [w], [a], [b], biases, seed) is None
    if which == 0:
        x, dy = tensors[0], UNFIT[unfit](dy)
    args = [dy], x, [w], [a], [b], h, None, [SCALE], seed, 0.1, True, True
    assert hopper_lora.lora_backward(*args) is None
    assert len(fakes["hopper_kernel"].launches) == launched
    assert not fakes["_factors_kernel"].launches


@pytest.mark.parametrize("sizes", [(M, N, 60, 16), (M, 44, K, 16), (M, 44, 60, 12)], ids=str)
def test_layers_whose_sizes_are_no_multiples_of_eight_are_refused(fakes, sizes):
    rows, n, k, R = sizes
    x, w, a, b, h = draw(rows, k), draw(n, k), draw(R, k), draw(n, R), draw(rows, R)
    assert forward(x, [w], [a], [b], [None]) is None
    for way, left, factor in ((True, x, b), (False, draw(rows, n), a)):
        assert hopper_lora.update_matmul(way, left, w, h, factor, None, None, 0.0) is None
    assert not fakes["hopper_kernel"].launches


@pytest.mark.parametrize("R", [1, 5, 12, 44])
@pytest.mark.parametrize("seed", [None, SEED], ids=["plain", "drop"])
def test_any_rank_of_one_projection_is_served(fakes, R, seed):
    x, ws, a_list, b_list, biases = layers(1, R)
    _, h, mask = forward(x, ws, a_list, b_list, biases, seed)
    assert h.shape == (M, R)
    dx, da, (db,) = hopper_lora.lora_backward(
        [draw(M, N)], x, ws, a_list, b_list, h, mask, [SCALE], seed, 0.1, True, True
    )
    assert (dx.shape, da.shape) == ((M, K), (R, K))
    assert db is None if R > 16 else db.shape == (N, R)
    for way, left, factor in ((True, x, b_list[0]), (False, draw(M, N), a_list[0])):
        assert hopper_lora.update_matmul(way, left, ws[0], h, factor, None, None, 0.0) is not None
    assert forward(*layers(2, R)) is None
    assert len(fakes["hopper_kernel"].launches) == 4


def test_rows_may_lie_apart_and_their_number_is_free(fakes):
    x, ws, a_list, b_list, biases = layers(1, 16)
    assert forward(pitched(x, 8), ws, a_list, b_list, biases) is not None
    assert forward(draw(37, K), ws, a_list, b_list, biases) is not None
    assert len(fakes["hopper_kernel"].launches) == 2


def test_a_refused_layer_goes_the_way_of_every_other_gpu(fakes, monkeypatch):
    x, w, a, b = draw(M, 60), draw(N, 60), draw(16, 60), draw(N, 16)
    h, y, dx, grad = draw(M, 16), draw(M, N), draw(M, 60), draw(16, 60)
    took = []
    say = lambda name, value: lambda *args, **kwargs: took.append(name) or value  # noqa: E731
    monkeypatch.setattr(dispatch, "_is_left", lambda *sizes: False)
    monkeypatch.setattr(dispatch, "lora_hidden", say("hidden", h))
    monkeypatch.setattr(dispatch, "extended_matmul", say("matmul", y))
    monkeypatch.setattr(dispatch, "lora_backward_hidden_b", say("hidden_b", (h, b)))
    monkeypatch.setattr(dispatch, "triton_input", say("input", dx))
    monkeypatch.setattr(dispatch, "triton_a", say("a", grad))
    found = dispatch.lora_forward(x, w, a, b, None, SCALE, SEED, 0.1)
    assert (found[0] is y, found[1] is h, found[2]) == (True, True, None)
    assert took == ["hidden", "matmul"]
    # the same sizes with a b that cannot be copied, but a w and a dy that could
    found = dispatch.lora_backward(y, x, w, a, b, h, None, SCALE, SEED, 0.1, True, True, True)
    assert (found[0] is dx, found[1] is grad, found[2] is b) == (True, True, True)
    assert took[2:] == ["hidden_b", "input", "a"]
    assert not fakes["hopper_kernel"].launches


def test_what_one_launch_cannot_express_is_refused(fakes):
    x, ws, a_list, b_list, biases = layers(2, 16)
    assert forward(*layers(4, 16)) is None
    assert forward(x, ws, [a_list[0], draw(8, K)], [b_list[0], draw(N, 8)], biases) is None
    assert forward(x, ws, a_list, b_list, [biases[0], None]) is None
    dy, h = draw(M, N), draw(M, 32)
    rest = ws, a_list, b_list, h, None, [SCALE] * 2, None, 0.0, True, True
    assert hopper_lora.lora_backward([dy, None], x, *rest) is None
    assert not fakes["hopper_kernel"].launches
    assert hopper_lora.lora_backward([dy, dy], x, *rest) is not None


def test_no_bias_is_read_as_if_its_elements_lay_side_by_side(fakes):
    x, ws, a_list, b_list, _ = layers(1, 16)
    for bias in (draw(N, 2)[:, 0], draw(1).expand(N)):
        for done in (
            forward(x, ws, a_list, b_list, [bias]),
            hopper_lora.update_matmul(True, x, ws[0], draw(M, 16), b_list[0], bias, None, 0.0),
        ):
            assert done is None or fakes["hopper_kernel"].launches[-1]["bias0"].is_contiguous()


def test_no_x_is_read_as_if_its_columns_lay_side_by_side(fakes):
    # dx needs no x, and its tensors may fit where x does not
    x, ws, a_list, b_list, _ = layers(1, 16)
    args = ws, a_list, b_list, draw(M, 16), None, [SCALE], None, 0.0, True, True
    done = hopper_lora.lora_backward([draw(M, N)], apart(x), *args)
    assert done is None or fakes["_factors_kernel"].launches[-1]["x_ptr"].stride(1) == 1


@pytest.mark.parametrize(("P", "R"), [(1, 8), (1, 24), (1, 32), (2, 32), (3, 16), (3, 64)], ids=str)
def test_the_backward_pass_gives_every_gradient_its_shape(fakes, P, R):
    x, ws, a_list, b_list, _ = layers(P, R)
    dys, h = [draw(M, N)] * P, draw(M, P * R)
    for need_a, need_b in itertools.product((False, True), repeat=2):
        kept_x, kept_h = x if need_a else None, h if need_b else None
        dx, da, dbs = hopper_lora.lora_backward(
            dys, kept_x, ws, a_list, b_list, kept_h, None, [SCALE] * P, None, 0.0, need_a, need_b
        )
        assert dx.shape == x.shape
        assert (None if da is None else da.shape) == ((P * R, K) if need_a else None)
        inside = need_b and R <= 16
        assert [None if db is None else db.shape for db in dbs] == [(N, R) if inside else None] * P
        launch = fakes["hopper_kernel"].launches[-1]
        assert launch["DB"] == inside
        # rows of dh that take few loads
        assert launch["hidden_ptr"].shape == (M, P * R if P > 1 else (R + 15) // 16 * 16)
    assert len(fakes["_factors_kernel"].launches) == 2
    # without da, the parts of db take a launch of their own
    assert len(fakes["_sum_parts_kernel"].launches) == (R <= 16)


@pytest.mark.parametrize(("P", "R"), [(1, 5), (1, 16), (3, 32)])
def test_without_side_programs_one_launch_makes_the_mask_and_h_for_the_next(fakes, monkeypatch, P, R):
    monkeypatch.setattr(hopper_lora, "forward_config", lambda *sizes: HopperConfig(SIDES=0))
    ys, h, mask = forward(*layers(P, R), seed=SEED)
    (hidden,), (gemm,) = fakes["hopper_hidden_kernel"].launches, fakes["hopper_kernel"].launches
    assert hidden["words_ptr"] is mask
    assert (mask.shape, mask.dtype) == ((M, K // 32), torch.int32)
    assert h.shape == (M, P * R)
    # rows of h start on 16 bytes, for the copies of the next launch
    assert hidden["hidden_ptr"].stride(0) % 8 == 0
    assert hidden["scale0"] == SCALE * 65536 / (65536 - 6554)
    assert (gemm["FORWARD"], gemm["DROP"], gemm["SIDES"], len(ys)) == (True, False, 0, P)
    assert not fakes["_mask_kernel"].launches
    assert forward(*layers(P, R)) is None


@pytest.mark.parametrize(("P", "R"), [(1, 16), (3, 32)])
@pytest.mark.parametrize("drawn", [False, True])
def test_without_side_programs_dx_and_da_share_the_mask_of_the_forward_pass(fakes, monkeypatch, P, R, drawn):
    monkeypatch.setattr(hopper_lora, "backward_config", lambda *sizes: HopperConfig(SIDES=0))
    x, ws, a_list, b_list, _ = layers(P, R)
    dys, mask = [torch.ones(M, N, dtype=torch.bfloat16)] * P, draw(M, K // 32, dtype=torch.int32)
    b_list = [torch.full_like(b, i + 1.0) for i, b in enumerate(b_list)]
    h, scales, needs = draw(M, P * R), [SCALE] * P, (True, True)
    dx, da, dbs = hopper_lora.lora_backward(
        dys, x, ws, a_list, b_list, h, None if drawn else mask, scales, SEED, 0.5, *needs
    )
    (gemm,), (factors,) = fakes["hopper_kernel"].launches, fakes["_factors_kernel"].launches
    assert (dx.shape, da.shape, dbs) == (x.shape, (P * R, K), [None] * P)
    assert (gemm["FORWARD"], gemm["DROP"], gemm["SIDES"]) == (False, True, 0)
    assert len(fakes["_mask_kernel"].launches) == drawn
    assert gemm["words_ptr"] is factors["words_ptr"]
    assert drawn or gemm["words_ptr"] is mask
    # dh side by side, with the mask's factor
    assert gemm["hidden_ptr"] is factors["dh_ptr"]
    assert [part.unique().tolist() for part in gemm["hidden_ptr"].split(R, 1)] == [
        [2 * SCALE * N * (i + 1)] for i in range(P)
    ]
    # without a mask all but dx is cuBLAS's
    plain = ws, a_list, b_list, h, None, scales, None, 0.0, *needs
    assert hopper_lora.lora_backward(dys, x, *plain) is None


@pytest.mark.parametrize("need_a", [False, True])
@pytest.mark.parametrize("R", [12, 24, 44])
def test_without_side_programs_any_rank_of_one_projection_has_the_mask_it_was_given(
    fakes, monkeypatch, R, need_a
):
    monkeypatch.setattr(hopper_lora, "backward_config", lambda *sizes: HopperConfig(SIDES=0))
    x, ws, a_list, b_list, _ = layers(1, R)
    mask = draw(M, K // 32, dtype=torch.int32)
    args = ws, a_list, b_list, draw(M, R), mask, [SCALE], SEED, 0.1, need_a, True
    dx, da, dbs = hopper_lora.lora_backward([draw(M, N)], x if need_a else None, *args)
    assert (dx.shape, None if da is None else da.shape, dbs) == (x.shape, (R, K) if need_a else None, [None])
    (gemm,), factors = fakes["hopper_kernel"].launches, fakes["_factors_kernel"].launches
    assert len(factors) == need_a
    assert all(launch["words_ptr"] is mask for launch in (gemm, *factors))
    # rows of dh that take few loads
    assert gemm["hidden_ptr"].shape == (M, R + -R % 16)
    assert not fakes["_mask_kernel"].launches


def test_where_another_kernel_makes_y_one_launch_makes_h_and_its_mask(fakes, monkeypatch):
    monkeypatch.setattr(hopper_lora, "forward_config", lambda *sizes: None)
    monkeypatch.setattr(hopper_apart, "_MASKED_ROWS", 1)
    monkeypatch.setattr(dispatch, "_is_left", lambda *sizes: False)
    x, w, a, b = draw(M, K), draw(N, K), draw(16, K), draw(N, 16)
    y, h, mask = dispatch.lora_forward(x, w, a, b, None, SCALE, SEED, 0.1)
    (hidden,) = fakes["hopper_hidden_kernel"].launches
    assert (hidden["words_ptr"] is mask, hidden["hidden_ptr"] is h) == (True, True)
    assert hidden["scale0"] == SCALE * 65536 / (65536 - 6554)
    assert (y.shape, len(fakes["hopper_kernel"].launches)) == ((M, N), 1)


@pytest.mark.parametrize("seed", [None, SEED], ids=["plain", "drop"])
def test_scales_hold_the_factor_of_the_mask_and_the_mask_is_made_once(fakes, seed):
    x, ws, a_list, b_list, biases = layers(2, 16)
    ys, h, mask = hopper_lora.lora_forward(x, ws, a_list, b_list, biases, [0.5, 2.0], seed, 0.1)
    args = ws, a_list, b_list, h, mask, [0.5, 2.0], seed, 0.1, True, True
    hopper_lora.lora_backward([draw(M, N)] * 2, x, *args)
    factor = 1 if seed is None else 65536 / (65536 - 6554)
    for launch in fakes["hopper_kernel"].launches:
        assert [launch[f"scale{i}"] for i in range(3)] == [0.5 * factor, 2.0 * factor, 0.0]
        assert launch["DROP"] == (seed is not None)
        assert launch["words_ptr"] is mask
    assert len(fakes["_mask_kernel"].launches) == (seed is not None)
    assert [y.shape for y in ys] == [(M, N)] * 2
    assert h.shape == (M, 32)


@pytest.mark.parametrize("rows", [1, 40, 5000, 100_000])
def test_a_launch_has_no_more_programs_than_run_at_once(fakes, rows):
    x = torch.empty(rows, K, dtype=torch.bfloat16, device="meta")
    small = [torch.empty(size, dtype=torch.bfloat16, device="meta") for size in ((N, K), (16, K), (N, 16))]
    assert forward(x, *([t] for t in small), [None]) is not None
    (launch,) = fakes["hopper_kernel"].launches
    assert launch["grid"] == (min(-(-rows // 128), 128) + 4,)
    # one flag for each 256 rows, all zero at the start
    assert launch["flags_ptr"].numel() >= -(-rows // 256)


def calls():
    """Yield what ``launch`` is given for launches of many kinds."""
    found = []
    keep = lambda *call, fresh: found.append((*call[:2], fresh, call[2:])) or True  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hopper, "launch", keep)
        for P, R, rows, bias, db, mask in itertools.product(
            (1, 3), (8, 16, 24), (40, 37), (False, True), (False, True), (None, draw(M, 2, dtype=torch.int32))
        ):
            x, ws, a_list, b_list, biases = layers(P, R)
            x, dys = pitched(x, 8 * bias)[:rows], [draw(rows, N) for _ in range(P)]
            scales, h, biases = (SCALE,) * P, draw(rows, P * R) if db else None, biases if bias else []
            config = HopperConfig()
            hopper.hopper_forward(x, ws, a_list, b_list, biases, scales, mask, config=config)
            hopper.hopper_backward_input(dys, ws, a_list, b_list, h, scales, mask, 5, config=config)
            config = HopperConfig(SIDES=0)
            one = biases[0] if bias else None
            hopper.hopper_matmul(True, x, ws[0], draw(rows, R), b_list[0], one, None, config)
            hopper.hopper_matmul(False, dys[0], ws[0], draw(rows, R), a_list[0], None, mask, config)
    return found


def test_launches_of_one_plan_are_one_kernel_to_triton_with_the_same_numbers(fakes):
    kernel = fakes["hopper_kernel"].kernel
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    seen, count = {}, 0
    for prepare, tensors, fresh, numbers in calls():
        key, _ = _launch.plan_key(prepare, tensors, numbers, fresh)
        tensors += tuple(t.tensor() if isinstance(t, _launch.Part) else t for t in fresh)
        what = prepare(*tensors, *numbers)
        _, specialization, options = bind(*what.args, debug=False, **what.constants)
        scalars = [value for value in what.args if isinstance(value, (int, float))]
        found = (str(specialization), str(options), what.grid, scalars)
        count += 1
        assert seen.setdefault(key, found) == found
        # a plan fills in the address of each tensor by which of ``tensors`` it is
        bases = [getattr(value, "base", value) for value in what.args]
        assert all(any(t is base for t in tensors) for base in bases if isinstance(base, Tensor))
    assert 40 < len(seen) < count

"""The Hopper kernels on a Hopper GPU: accuracy, the same bits always, graphs, streams, edges, memory."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from lowrank_ops import lora_linear, lora_linear_group, reference  # noqa: E402
from lowrank_ops.kernels import INTERPRETED, dispatch, hopper, hopper_lora, hopper_passes  # noqa: E402
from lowrank_ops.kernels._config import block_rank  # noqa: E402
from lowrank_ops.kernels.dropout_mask import dropout_mask  # noqa: E402
from lowrank_ops.kernels.hopper import HopperConfig  # noqa: E402
from lowrank_ops.kernels.hopper_hidden import HiddenConfig, hopper_hidden  # noqa: E402
from lowrank_ops.reference import dropout_keep, keep_threshold  # noqa: E402
from lowrank_ops.testing import assert_as_accurate  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        INTERPRETED or (torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0)),
        reason="needs a Hopper GPU and compiled kernels",
    ),
]

BF16, FP16 = torch.bfloat16, torch.float16
# (M, N, K): a training step in small; tiles cut on every side; fewer tiles than multiprocessors; one of each
EVEN, RAGGED, SMALL, TINY = (2048, 4096, 4096), (1111, 3528, 2056), (300, 136, 264), (1, 8, 8)
SCALE = 0.5


def make_inputs(shape: tuple[int, int, int], R: int, P: int, dtype: torch.dtype, bias: bool) -> dict:
    M, N, K = shape
    generator = torch.Generator("cuda").manual_seed(M + N + K + R + P)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, device="cuda", generator=generator) * scale).to(dtype)

    Ns = [N, *(max(8, N // 4 // 8 * 8), 264)][:P]
    return {
        "x": draw(M, K),
        "ws": [draw(n, K, scale=K**-0.5) for n in Ns],
        "a_list": [draw(R, K, scale=K**-0.5) for _ in Ns],
        "b_list": [draw(n, R, scale=R**-0.5) for n in Ns],
        "biases": [draw(n) if bias else None for n in Ns],
        "dys": [draw(M, n) for n in Ns],
    }


def as_double(inputs: dict) -> dict:
    return {
        name: value.double() if name == "x" else [None if t is None else t.double() for t in value]
        for name, value in inputs.items()
    }


def make_seed() -> Tensor:
    return torch.tensor([2**40 + 12345], device="cuda")


def run(module: object, inputs: dict, seed: Tensor | None = None, p: float = 0.0) -> dict[str, Tensor]:
    """Return what both passes of a layer or a group give, by name."""
    x, ws, a_list, b_list, biases, dys = inputs.values()
    P = len(ws)
    if P == 1:
        args = ws[0], a_list[0], b_list[0]
        y, h, mask = module.lora_forward(x, *args, biases[0], SCALE, seed, p)
        grads = module.lora_backward(dys[0], x, *args, h, mask, SCALE, seed, p, True, True, True)
        return dict(zip(("y0", "h", "dx", "da0", "db0"), (y, h, *grads), strict=True))
    scales, needs = [SCALE * (i + 1) for i in range(P)], [True] * P
    ys, h, mask = module.lora_group_forward(x, ws, a_list, b_list, biases, scales, seed, p)
    dx, das, dbs = module.lora_group_backward(
        dys, x, ws, a_list, b_list, h, mask, scales, seed, p, True, needs, needs
    )
    named = {"h": h, "dx": dx}
    for name, values in (("y", ys), ("da", das), ("db", dbs)):
        named |= {f"{name}{i}": value for i, value in enumerate(values)}
    return named


def assert_accurate(inputs: dict, seed: Tensor | None, p: float) -> None:
    actual = run(dispatch, inputs, seed, p)
    baseline, truth = run(reference, inputs, seed, p), run(reference, as_double(inputs), seed, p)
    for name, got in actual.items():
        try:
            assert_as_accurate(got, baseline[name], truth[name])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def assert_same_bits(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert not [name for name in want if not torch.equal(got[name], want[name])]


@pytest.fixture
def launches(monkeypatch) -> list[HopperConfig]:
    """Return the configs of the launches of the Hopper kernel from now on, none of which is known before."""
    configs, launch = [], hopper.launch

    def counted(prepare: Callable, tensors: tuple, *numbers: object, **fresh: tuple) -> bool:
        done = launch(prepare, tensors, *numbers, **fresh)
        if done:
            configs.append(numbers[-1])
        return done

    monkeypatch.setattr(hopper, "launch", counted)
    for name, value in (("_forward", {}), ("_backward", {}), ("_TRIES", 0)):
        monkeypatch.setattr(hopper_passes, name, value)
    return configs


@pytest.fixture
def forced(monkeypatch, launches) -> Callable[..., list[HopperConfig]]:
    """Have the Hopper kernels serve every size, with side programs wherever the ranks fit."""

    def force(most: int = 4) -> list[HopperConfig]:
        def sides(P: int, R: int, room: int) -> HopperConfig | None:
            wide = (1 << (P - 1).bit_length()) * block_rank(R, 128)
            return None if R > 128 or wide > 128 else HopperConfig(SIDES=most if wide <= room else 0)

        def forward(M: int, Ns: tuple, K: int, R: int, drop: bool, facts: object) -> HopperConfig | None:
            return sides(len(Ns), R, 64 if drop else 128)

        monkeypatch.setattr(hopper_lora, "forward_config", forward)
        monkeypatch.setattr(hopper_lora, "backward_config", lambda M, Ns, K, R, facts: sides(1, R, 128))
        monkeypatch.setattr(hopper_lora, "_worthwhile", lambda *sizes: True)
        monkeypatch.setattr(dispatch, "_is_left", lambda *sizes: False)
        return launches

    return force


# every rank with and without a mask, the dtypes and a bias in turns
RANKS = [8, 16, 24, 32, 64, 128]
SINGLE = [
    (EVEN, R, (BF16, FP16)[(i + j) % 2], p, (i + j) % 3 == 0)
    for (i, R), (j, p) in itertools.product(enumerate(RANKS), enumerate((0.0, 0.1)))
] + [
    (shape, R, dtype, p, True)
    for (shape, R, dtype), p in itertools.product(
        [(RAGGED, 16, BF16), (RAGGED, 24, FP16), (SMALL, 64, BF16), (SMALL, 5, FP16), (TINY, 8, BF16)],
        (0.0, 0.1),
    )
]


@pytest.mark.parametrize(("shape", "R", "dtype", "p", "bias"), SINGLE, ids=str)
def test_a_layer_is_as_accurate_as_pytorch(forced, shape, R, dtype, p, bias):
    launched, inputs = forced(), make_inputs(shape, R, 1, dtype, bias)
    assert_accurate(inputs, make_seed() if p else None, p)
    # with a mask the factor of so many ranks has a pass of its own
    assert [c.SIDES for c in launched] == [0 if p and R > 64 else 4, 4]


GROUPS = [
    (EVEN, 16, 2, BF16, 0.0),
    (EVEN, 16, 3, BF16, 0.1),
    (EVEN, 64, 2, FP16, 0.0),
    (RAGGED, 32, 3, FP16, 0.0),
    (RAGGED, 32, 2, BF16, 0.1),
    (SMALL, 16, 3, FP16, 0.1),
]


@pytest.mark.parametrize(("shape", "R", "P", "dtype", "p"), GROUPS, ids=str)
def test_a_group_is_as_accurate_as_pytorch(forced, shape, R, P, dtype, p):
    launched = forced()
    assert_accurate(make_inputs(shape, R, P, dtype, bias=p > 0), make_seed() if p else None, p)
    assert [c.SIDES for c in launched] == [4, 4]


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(("shape", "R"), [(EVEN, 16), (RAGGED, 200), (SMALL, 12)], ids=str)
def test_a_layer_without_side_programs_is_as_accurate_as_pytorch(forced, shape, R, p):
    launched = forced(0)
    assert_accurate(make_inputs(shape, R, 1, BF16, bias=True), make_seed() if p else None, p)
    assert [c.SIDES for c in launched] == [0, 0]


@pytest.mark.parametrize(("shape", "R", "P"), [(EVEN, 16, 3), (RAGGED, 64, 2), (SMALL, 32, 3)], ids=str)
def test_a_group_with_dropout_and_no_side_programs_is_as_accurate_as_pytorch(forced, shape, R, P):
    launched = forced(0)
    assert_accurate(make_inputs(shape, R, P, BF16, bias=True), make_seed(), 0.1)
    assert launched[0].SIDES == 0


@pytest.mark.parametrize("R", [5, 16, 128])
def test_h_and_mask_of_one_launch_are_those_of_their_own(R):
    x, _, (a,), *_ = make_inputs(RAGGED, R, 1, FP16, bias=False).values()
    (M, K), seed, T = x.shape, make_seed(), keep_threshold(0.1)
    for shares in (1, 2, 5):
        config = HiddenConfig(SHARES=shares)
        h, words = hopper_hidden(x, [a], seed, T, (SCALE,), config=config)
        again, _ = hopper_hidden(x, [a], seed, T, (SCALE,), config=config)
        assert torch.equal(words, dropout_mask(seed, M, K, T))
        assert torch.equal(h, again)
        assert not h[:, R:].any()
        keep = dropout_keep(seed, M, K, 0.1)
        want = [SCALE * (torch.where(keep, x, 0).to(d) @ a.to(d).T) for d in (x.dtype, torch.float64)]
        assert_as_accurate(h[:, :R], *want)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_training_sizes_are_served_without_being_forced(launches, p):
    inputs = make_inputs(EVEN, 16, 1, BF16, bias=True)
    x, (w,), (a,), (b,), (bias,), (dy,) = inputs.values()
    leaves = [t.requires_grad_() for t in (x, a, b)]
    y = lora_linear(x, w, a, b, bias, scale=SCALE, dropout_p=p)
    assert len(launches) == 1
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    assert len(launches) == 2
    second = torch.autograd.grad(y, leaves, dy)
    assert len(launches) == 3
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    launches.clear()
    x, ws, a_list, b_list, biases, dys = make_inputs(EVEN, 16, 3, BF16, bias=False).values()
    leaves = [t.requires_grad_() for t in (x, *a_list, *b_list)]
    ys = lora_linear_group(x, ws, a_list, b_list, biases, scales=[SCALE] * 3, dropout_p=p)
    torch.autograd.grad(ys, leaves, dys)
    assert len(launches) >= 2


def keep_busy(stream: torch.cuda.Stream) -> Tensor:
    """Start some milliseconds of work on every multiprocessor; return what must live until it is done."""
    with torch.cuda.stream(stream):
        t = torch.ones(8192, 8192, device="cuda", dtype=BF16)
        for _ in range(4):
            t = t @ t
    return t


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(("shape", "P"), [(EVEN, 1), (RAGGED, 3)], ids=str)
def test_every_run_gives_the_same_bits_on_an_idle_gpu_and_a_busy_one(forced, shape, P, p):
    forced()
    inputs, seed = make_inputs(shape, 16, P, BF16, bias=True), make_seed() if p else None
    want = run(dispatch, inputs, seed, p)
    other = torch.cuda.Stream()
    for i in range(10):
        busy = keep_busy(other) if i >= 5 else None
        got = run(dispatch, inputs, seed, p)
        torch.cuda.synchronize()
        del busy
        assert_same_bits(got, want)


def test_two_streams_at_once_do_not_disturb_each_other(forced):
    forced()
    kinds = [make_inputs(EVEN, 16, 1, BF16, True), make_inputs(RAGGED, 16, 3, BF16, True)]
    want = [run(dispatch, inputs, make_seed(), 0.1) for inputs in kinds]
    streams, seed, got = [torch.cuda.Stream() for _ in kinds], make_seed(), []
    torch.cuda.synchronize()
    for _ in range(10):
        for inputs, stream in zip(kinds, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append(run(dispatch, inputs, seed, 0.1))
    torch.cuda.synchronize()
    for i, results in enumerate(got):
        assert_same_bits(results, want[i % 2])


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("P", [1, 3])
def test_a_replayed_graph_gives_the_bits_of_eager_launches(forced, P, p):
    launched = forced()
    inputs, seed = make_inputs(RAGGED, 16, P, BF16, bias=True), make_seed() if p else None
    run(dispatch, inputs, seed, p)
    launched.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(dispatch, inputs, seed, p)
    assert len(launched) == 2
    for step in range(3):
        inputs["x"].copy_(torch.roll(inputs["x"], step, 0))
        if seed is not None:
            seed += 1
        for t in captured.values():
            t.fill_(torch.nan)
        graph.replay()
        assert_same_bits(captured, run(dispatch, inputs, seed, p))


def pitched(t: Tensor) -> Tensor:
    """Return a copy whose rows lie further apart, NaN between them."""
    return torch.cat([t, torch.full_like(t[:, :1], torch.nan).expand(-1, 64)], 1)[:, : t.shape[1]]


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_rows_may_lie_apart(forced, p):
    launched = forced()
    inputs, seed = make_inputs(RAGGED, 16, 1, BF16, bias=False), make_seed() if p else None
    want = run(dispatch, inputs, seed, p)
    launched.clear()
    apart = inputs | {"x": pitched(inputs["x"])}
    apart |= {name: [pitched(t) for t in inputs[name]] for name in ("ws", "a_list", "b_list", "dys")}
    assert_same_bits(run(dispatch, apart, seed, p), want)
    assert len(launched) == 2


def test_what_is_not_read_through_descriptors_may_be_strided(forced):
    forced()
    inputs = make_inputs(EVEN, 16, 1, BF16, bias=True)
    wide = torch.stack([inputs["biases"][0], torch.full_like(inputs["biases"][0], torch.nan)], 1)[:, 0]
    assert wide.stride() == (2,)
    assert_accurate(inputs | {"biases": [wide]}, None, 0.0)
    one = torch.tensor(5.0, device="cuda", dtype=BF16)
    assert_accurate(inputs | {"biases": [one.expand(4096)]}, None, 0.0)
    # x by columns: y and h come from other kernels then, dx does not
    assert_accurate(inputs | {"x": inputs["x"].T.contiguous().T}, None, 0.0)


@pytest.mark.parametrize("shape", [RAGGED, SMALL, TINY], ids=str)
@pytest.mark.parametrize("P", [1, 3])
def test_every_element_of_every_result_is_written(forced, shape, P):
    # the memory that results are made in is full of NaN
    assert torch.empty(1000, device="cuda", dtype=BF16).isnan().all()
    launched, inputs = forced(), make_inputs(shape, 16, P, BF16, bias=True)
    got = run(dispatch, inputs, make_seed(), 0.1)
    assert not [name for name, t in got.items() if t.isnan().any()]
    assert len(launched) == 2


@pytest.mark.parametrize("R", [129, 256, 512])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_ranks_above_128_are_right_too(R, p):
    # little depth: where the pass for the factor would be cheap beside the GEMM
    assert_accurate(make_inputs((512, 8192, 512), R, 1, BF16, bias=False), make_seed() if p else None, p)


def test_no_tokens_give_no_rows(launches):
    x, (w,), (a,), (b,), _, _ = make_inputs((8, 4096, 4096), 16, 1, BF16, bias=False).values()
    for p in (0.0, 0.1):
        leaves = [t.detach().requires_grad_() for t in (x[:0], a, b)]
        y = lora_linear(leaves[0], w, *leaves[1:], dropout_p=p)
        assert y.shape == (0, 4096)
        dx, da, db = torch.autograd.grad(y.sum(), leaves)
        assert dx.shape == (0, 4096)
        assert not any(t.any() for t in (da, db))


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_infinities_and_nans_are_where_pytorch_has_them(forced, p):
    launched = forced()
    inputs, seed = make_inputs(RAGGED, 16, 1, BF16, bias=True), make_seed() if p else None
    inputs["x"][3, 5], inputs["x"][700, 2055], inputs["x"][1110, 0] = torch.inf, -torch.inf, torch.nan
    inputs["dys"][0][9, 3527], inputs["dys"][0][1000, 0] = torch.inf, torch.nan
    got, want = run(dispatch, inputs, seed, p), run(reference, inputs, seed, p)
    assert len(launched) == 2
    for name, t in want.items():
        assert not t.isfinite().all()
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(got[name]), kind(t)), f"{name}: {kind.__name__}"


def test_large_numbers_overflow_where_they_must_and_no_sooner_than_in_pytorch(forced):
    launched, inputs = forced(), make_inputs(RAGGED, 16, 1, FP16, bias=False)
    # rows of growing size, the last of which overflow
    sizes = torch.logspace(0, 6, RAGGED[0], device="cuda").clamp(max=8000)[:, None].half()
    inputs |= {"x": inputs["x"] * sizes, "dys": [inputs["dys"][0] * sizes]}
    inputs |= {name: [8 * inputs[name][0]] for name in ("ws", "a_list")}
    actual, baseline, exact = run(dispatch, inputs), run(reference, inputs), run(reference, as_double(inputs))
    assert len(launched) == 2
    for name in ("y0", "h", "dx"):
        got, base, truth = actual[name], baseline[name], exact[name]
        # an element at the very edge may be rounded to either side
        inside = (truth.abs() < 65000) & base.isfinite()
        assert got[inside].isfinite().all(), name
        outside = got[truth.abs() > 66000]
        assert outside.numel(), name
        assert not outside.isfinite().any(), name


@pytest.mark.parametrize("R", [16, 32, 64])
def test_a_projection_does_not_see_what_overflows_in_another(forced, R):
    launched, inputs = forced(), make_inputs(RAGGED, R, 2, FP16, bias=False)
    want = run(dispatch, inputs)
    inputs["a_list"][1] *= 30000
    got = run(dispatch, inputs)
    assert len(launched) == 4
    assert got["h"][:, R:].isinf().any()
    assert torch.equal(got["h"][:, :R], want["h"][:, :R])
    assert torch.equal(got["y0"], want["y0"])

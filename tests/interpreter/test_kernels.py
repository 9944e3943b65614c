"""Every Triton kernel against its namesake, run by Triton's interpreter."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lowrank_ops import kernels, lora_linear, reference
from lowrank_ops.kernels import TileConfig
from lowrank_ops.kernels._matmul import extended_matmul
from lowrank_ops.testing import assert_as_accurate

# (M, N, K, R): even, ragged in every size, one token, more ranks than one block holds
SHAPES = [(64, 48, 32, 8), (33, 50, 71, 5), (1, 16, 128, 16), (40, 37, 70, 70)]
EMPTY = [(0, 5, 6, 2), (5, 0, 6, 2), (5, 6, 0, 2), (0, 0, 0, 1)]
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "fp16-fp32": (torch.float16, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
}
DROPOUT = [0.0, 0.5]


def make_inputs(
    shape: tuple[int, ...], big: torch.dtype, small: torch.dtype, draw: Callable[..., Tensor]
) -> dict[str, Tensor]:
    M, N, K, R = shape
    sizes = {"x": (M, K), "w": (N, K), "a": (R, K), "b": (N, R), "bias": (N,), "dy": (M, N)}
    return {name: draw(*size).to(small if name in "ab" else big) for name, size in sizes.items()}


def integers(*size: int) -> Tensor:
    # small enough that every sum is exact in every dtype: any difference is a bug and no rounding
    generator = torch.Generator().manual_seed(sum(size))
    return torch.randint(-1, 2, size, generator=generator)


def reals(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))


def run_all(module, t: dict[str, Tensor], seed: Tensor | None, p: float) -> dict[str, Tensor]:
    x, w, a, b, bias, dy = t.values()
    y, h, _ = module.lora_forward(x, w, a, b, bias, 0.5, seed, p)
    dh, db = module.lora_backward_hidden_b(dy, b, h, 0.5)
    return {
        "y": y,
        "h": h,
        "hidden": module.lora_hidden(x, a, 2.0, seed, p),
        "dh": dh,
        "db": db,
        "dh alone": module.lora_backward_hidden(dy, b, 0.5),
        "db alone": module.lora_backward_b(dy, h),
        "da": module.lora_backward_a(dh, x, seed, p),
        "dx": module.lora_backward_input(dy, w, dh, a, seed, p),
    }


EXACT = [(shape, "fp32") for shape in SHAPES] + [(SHAPES[1], name) for name in DTYPES if name != "fp32"]


@pytest.mark.parametrize("p", DROPOUT)
@pytest.mark.parametrize(("shape", "dtypes"), EXACT, ids=str)
def test_kernels_are_exact_on_small_integers(shape, dtypes, p):
    inputs = make_inputs(shape, *DTYPES[dtypes], integers)
    seed = torch.tensor([2**62 + 12345]) if p else None
    actual = run_all(kernels, inputs, seed, p)
    expected = run_all(reference, {name: t.double() for name, t in inputs.items()}, seed, p)
    for name, value in actual.items():
        assert value.dtype == (inputs["x"] if name in ("y", "dx") else inputs["a"]).dtype, name
        assert torch.equal(value.double(), expected[name].to(value.dtype).double()), name


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtypes", [DTYPES["fp16"], DTYPES["bf16"]], ids=["fp16", "bf16"])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_kernels_are_as_accurate_as_pytorch(shape, dtypes, p):
    inputs = make_inputs(shape, *dtypes, reals)
    seed = torch.tensor([77]) if p else None
    actual, baseline = run_all(kernels, inputs, seed, p), run_all(reference, inputs, seed, p)
    truth = run_all(reference, {name: t.double() for name, t in inputs.items()}, seed, p)
    for name, value in actual.items():
        assert_as_accurate(value, baseline[name], truth[name])


@pytest.mark.parametrize("p", DROPOUT)
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty_sizes_give_zeros_of_the_right_shape(shape, p):
    inputs = make_inputs(shape, torch.float32, torch.float32, integers)
    seed = torch.tensor([3]) if p else None
    actual, expected = run_all(kernels, inputs, seed, p), run_all(reference, inputs, seed, p)
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("dtypes", [DTYPES["fp32"], DTYPES["fp16-fp32"]], ids=["fp32", "fp16-fp32"])
def test_strides_are_free(dtypes):
    inputs = make_inputs((33, 50, 71, 5), *dtypes, integers)
    strided = {name: t.T.contiguous().T if t.dim() == 2 else t for name, t in inputs.items()}
    strided["bias"] = inputs["bias"].repeat_interleave(3)[::3]
    assert strided["bias"].stride() == (3,)
    expected = run_all(kernels, inputs, None, 0.0)
    for name, value in run_all(kernels, strided, None, 0.0).items():
        assert torch.equal(value, expected[name]), name


def test_one_bias_for_all_features_may_be_expanded():
    inputs = make_inputs(SHAPES[1], torch.float32, torch.float32, integers)
    inputs["bias"] = torch.tensor(5.0).expand(50)
    assert torch.equal(run_all(kernels, inputs, None, 0.0)["y"], run_all(reference, inputs, None, 0.0)["y"])


@pytest.mark.parametrize("right_is_transposed", [False, True])
@pytest.mark.parametrize("rows", [64, 40], ids=["even", "ragged"])
def test_tensor_descriptors_give_the_same_bits_as_pointers(rows, right_is_transposed):
    left, h, b = integers(rows, 64).half(), integers(rows, 5).half(), integers(48, 5).half()
    right = integers(64, 48).half().T if right_is_transposed else integers(48, 64).half()
    outs = [
        extended_matmul(left, right, h, b, None, None, 0, left.new_empty(rows, 48), config)
        for config in (
            TileConfig(
                BLOCK_ROWS=32, BLOCK_COLS=16, BLOCK_DEPTH=32, DESCRIPTORS=descriptors, PERSISTENT=persistent
            )
            for descriptors, persistent in itertools.product([False, True], [0, 1])
        )
    ]
    assert torch.equal(outs[0], left @ right.T + h @ b.T)
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("split", [1, 3, 64])
def test_splitting_a_sum_changes_nothing_on_integers(split):
    x, a = integers(33, 200).float(), integers(5, 200).float()
    config = TileConfig(BLOCK_ROWS=16, BLOCK_COLS=32, BLOCK_DEPTH=32, SPLIT=split)
    assert torch.equal(kernels.lora_hidden(x, a, 1.0, None, 0.0, config=config), x @ a.T)
    assert torch.equal(kernels.lora_backward_b(a.T, x.T, config=config), a @ x.T)
    dh, db = kernels.lora_backward_hidden_b(x, a.T, integers(33, 5).float(), 1.0, config=config)
    assert torch.equal(dh, x @ a.T)
    assert torch.equal(db, x.T @ integers(33, 5).float())


@pytest.mark.parametrize("p", [2**-16, 0.1, 0.5, 0.999])
def test_the_mask_is_the_one_that_the_reference_makes(p):
    seed = torch.tensor([-9152286103])
    M, K = 20, 70
    eye = torch.eye(K)
    dropped = kernels.lora_hidden(torch.ones(M, K), eye, 1.0, seed, p)
    assert torch.equal(dropped != 0, reference.dropout_keep(seed, M, K, p))
    dx = kernels.lora_backward_input(torch.zeros(M, 4), torch.zeros(4, K), torch.ones(M, K), eye, seed, p)
    assert torch.equal(dx != 0, dropped != 0)
    factor = 65536 / (65536 - reference.keep_threshold(p))
    assert torch.equal(dropped[dropped != 0], torch.full_like(dropped[dropped != 0], factor))


# every branch of backward: all, the factors and the input alone and together, the bias
TRAINS = ["11111", "10000", "00100", "00010", "00001", "10110", "00110", "10010"]


@pytest.mark.parametrize("trains", TRAINS)
def test_gradients_through_the_kernels_match_finite_differences(trains):
    sizes = [(2, 3), (3, 3), (1, 3), (3, 1), (3,)]
    inputs = [
        torch.randn(*size, dtype=torch.float64).requires_grad_(flag == "1")
        for size, flag in zip(sizes, trains, strict=True)
    ]

    def apply(*tensors: Tensor) -> Tensor:
        torch.manual_seed(5)
        return lora_linear(*tensors, scale=0.5, dropout_p=0.25, impl="triton")

    assert torch.autograd.gradcheck(apply, inputs)


def test_two_runs_give_the_same_bits():
    inputs = make_inputs(SHAPES[1], torch.float32, torch.float32, reals)
    first, second = (run_all(kernels, inputs, torch.tensor([1]), 0.1) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())

"""The launchers for projections that share x against their namesakes, run by Triton's interpreter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_ops import kernels, lora_linear_group, reference
from lowrank_ops.kernels import TileConfig
from lowrank_ops.kernels._matmul import extended_matmul
from lowrank_ops.testing import assert_as_accurate

# (M, K, [(N, R), ...]): even, ragged in every size with one rank for each, one token, a group of one
SHAPES = [
    (64, 32, [(48, 8), (32, 8)]),
    (33, 41, [(34, 5), (20, 3), (17, 34)]),
    (1, 128, [(16, 16), (24, 4)]),
    (40, 70, [(37, 5)]),
]
EMPTY = [(0, 6, [(5, 2), (3, 1)]), (5, 6, [(0, 2), (3, 1)]), (5, 0, [(4, 2), (3, 1)])]
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "fp16-fp32": (torch.float16, torch.float32),
}
MODULES = {"triton": kernels, "auto": kernels.dispatch}


def make_inputs(
    shape: tuple, big: torch.dtype, small: torch.dtype, draw: Callable[..., Tensor]
) -> dict[str, Any]:
    M, K, sizes = shape
    biases = [draw(N).to(big) for N, _ in sizes]
    return {
        "x": draw(M, K).to(big),
        "ws": [draw(N, K).to(big) for N, _ in sizes],
        "a_list": [draw(R, K).to(small) for _, R in sizes],
        "b_list": [draw(N, R).to(small) for N, R in sizes],
        "biases": [None if i == 1 else bias for i, bias in enumerate(biases)],
        "dys": [draw(M, N).to(big) for N, _ in sizes],
    }


def as_double(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: [t if t is None else t.double() for t in value] if name != "x" else value.double()
        for name, value in inputs.items()
    }


def integers(*size: int) -> Tensor:
    # small enough that every sum is exact in every dtype: any difference is a bug and no rounding
    return torch.randint(-1, 2, size, generator=torch.Generator().manual_seed(sum(size)))


def reals(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))


def run_all(
    module, t: dict[str, Any], seed: Tensor | None, p: float, scales=(0.5, 0.5, 0.5), used=(True,) * 3
) -> dict[str, Tensor]:
    P = len(t["ws"])
    scales, used = list(scales[:P]), list(used[:P])
    x, ws, a_list, b_list, biases, dys = t.values()
    ys, h, mask = module.lora_group_forward(x, ws, a_list, b_list, biases, scales, seed, p)
    dys = [dy if use else None for dy, use in zip(dys, used, strict=True)]
    dx, das, dbs = module.lora_group_backward(
        dys, x, ws, a_list, b_list, h, mask, scales, seed, p, True, used, used
    )
    named = {"h": h, "dx": dx}
    for name, values in (("y", ys), ("da", das), ("db", dbs)):
        named |= {f"{name}{i}": value for i, value in enumerate(values) if value is not None}
    return named


# every shape once; the ragged one in every dtype, with and without dropout, and as "auto" dispatches it
EXACT = [
    *((shape, "fp32", 0.5, "triton") for shape in SHAPES),
    (SHAPES[1], "fp16", 0.0, "triton"),
    (SHAPES[1], "fp16-fp32", 0.5, "triton"),
    (SHAPES[1], "fp16", 0.5, "auto"),
    (SHAPES[1], "fp16-fp32", 0.0, "auto"),
]


@pytest.mark.parametrize(("shape", "dtypes", "p", "module"), EXACT, ids=str)
def test_groups_are_exact_on_small_integers(shape, dtypes, p, module):
    inputs = make_inputs(shape, *DTYPES[dtypes], integers)
    seed = torch.tensor([2**62 + 12345]) if p else None
    actual = run_all(MODULES[module], inputs, seed, p)
    expected = run_all(reference, as_double(inputs), seed, p)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.dtype == (inputs["x"] if name[0] == "y" or name == "dx" else inputs["a_list"][0]).dtype
        assert torch.equal(value.double(), expected[name].to(value.dtype).double()), name


@pytest.mark.parametrize("used", [(True, False, True), (False, True, False)], ids=str)
def test_scales_may_differ_and_outputs_go_unused(used):
    inputs = make_inputs(SHAPES[1], torch.float32, torch.float32, integers)
    actual, expected = (
        run_all(module, inputs, None, 0.0, (0.5, 2.0, -1.0), used) for module in (kernels, reference)
    )
    assert actual.keys() == expected.keys()
    assert len(actual) == 2 + 3 + 2 * sum(used)
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(("p", "module"), [(0.1, "triton"), (0.0, "auto")])
@pytest.mark.parametrize("shape", SHAPES[1:3], ids=str)
def test_groups_are_as_accurate_as_pytorch(shape, module, p):
    inputs = make_inputs(shape, torch.float16, torch.float16, reals)
    seed = torch.tensor([77]) if p else None
    scales = (0.5, 0.3, 0.7)
    actual = run_all(MODULES[module], inputs, seed, p, scales)
    baseline = run_all(reference, inputs, seed, p, scales)
    truth = run_all(reference, as_double(inputs), seed, p, scales)
    for name, value in actual.items():
        assert_as_accurate(value, baseline[name], truth[name])


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty_sizes_give_zeros_of_the_right_shape(shape):
    inputs = make_inputs(shape, torch.float32, torch.float32, integers)
    actual, expected = run_all(kernels, inputs, None, 0.0), run_all(reference, inputs, None, 0.0)
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("rows", [64, 40], ids=["even", "ragged"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_product_can_be_added_to_what_is_there(dtype, rows, descriptors):
    left, right, out = integers(rows, 64).to(dtype), integers(48, 64).to(dtype), integers(rows, 48).to(dtype)
    config = TileConfig(BLOCK_ROWS=32, BLOCK_COLS=16, BLOCK_DEPTH=32, DESCRIPTORS=descriptors)
    expected = out + left @ right.T
    assert torch.equal(extended_matmul(left, right, None, None, None, None, 0, out, config), expected)


def test_gradients_through_the_kernels_match_finite_differences():
    sizes = [(2, 2), (3, 2), (2, 2), (1, 2), (2, 2), (3, 1), (2, 2)]
    x, *rest = (torch.randn(*size, dtype=torch.float64) for size in sizes)
    ws, leaves = rest[:2], [x, *rest[2:]]

    def apply(x: Tensor, a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        options = {"scales": [0.5, 2.0], "dropout_p": 0.25, "impl": "triton"}
        return lora_linear_group(x, ws, [a1, a2], [b1, b2], **options)

    assert torch.autograd.gradcheck(apply, [leaf.requires_grad_() for leaf in leaves])

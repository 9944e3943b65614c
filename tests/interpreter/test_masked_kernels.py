"""The kernels of a masked b against their namesakes, run by Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from lowrank_ops import SparseMask, kernels, masked_lora_linear, reference
from lowrank_ops.testing import assert_as_accurate

# (M, N, K, R): even, ragged in every size, one token and two words a row, no token
SHAPES = [(32, 48, 32, 8), (17, 34, 37, 5), (1, 37, 40, 64), (0, 5, 6, 2)]
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "fp16-fp32": (torch.float16, torch.float32),
}
# which entries exist, which of them train
KINDS = {"sparse": (0.3, None), "full": (1.0, None), "none": (0.0, None), "some train": (0.5, 0.5)}


def integers(*size: int) -> Tensor:
    # small enough that every sum is exact in every dtype: any difference is a bug and no rounding
    return torch.randint(-1, 2, size, generator=torch.Generator().manual_seed(sum(size)))


def make_masks(N: int, R: int, kind: str) -> tuple[SparseMask, SparseMask | None]:
    density, share = KINDS[kind]
    draw = torch.rand(2, N, R, generator=torch.Generator().manual_seed(N + R))
    exists = draw[0] < density
    train = None if share is None else SparseMask.from_dense(exists & (draw[1] < share))
    return SparseMask.from_dense(exists), train


def run_all(module, t: dict[str, Tensor], masks, seed: Tensor | None, p: float) -> dict[str, Tensor]:
    mask, train = masks
    x, w, a, values, bias, dy = t.values()
    b = (values, mask.words, mask.offsets)
    trains = (None, None, mask.nnz) if train is None else (train.words, train.offsets, train.nnz)
    y, h, _ = module.masked_lora_forward(x, w, a, *b, bias, 0.5, seed, p)
    rest = (h, None, 0.5, seed, p)
    dx, da, dvalues = module.masked_lora_backward(dy, x, w, a, *b, *trains, *rest, True, True, True)
    alone = module.masked_lora_backward(dy, None, None, a, *b, *trains, *rest, False, False, True)[2]
    found = {"y": y, "h": h, "dx": dx, "da": da, "dvalues": dvalues, "dvalues alone": alone}
    return found | {"b": module.unpack_values(*b, a.shape[0])}


def make_inputs(shape, dtypes, mask: SparseMask, draw=integers) -> dict[str, Tensor]:
    (M, N, K, R), (big, small) = shape, dtypes
    sizes = {"x": (M, K), "w": (N, K), "a": (R, K), "values": (mask.nnz,), "bias": (N,), "dy": (M, N)}
    return {name: draw(*size).to(small if name in ("a", "values") else big) for name, size in sizes.items()}


CASES = [
    (SHAPES[0], "fp32", "sparse", 0.5),
    (SHAPES[1], "fp32", "some train", 0.0),
    (SHAPES[2], "fp16", "some train", 0.0),
    (SHAPES[3], "fp32", "sparse", 0.0),
    (SHAPES[1], "fp32", "full", 0.0),
    (SHAPES[1], "fp32", "none", 0.0),
    (SHAPES[1], "fp16", "sparse", 0.0),
    (SHAPES[1], "fp16-fp32", "some train", 0.5),
]


@pytest.mark.parametrize(("shape", "dtypes", "kind", "p"), CASES, ids=str)
def test_kernels_are_exact_on_small_integers(shape, dtypes, kind, p):
    masks = make_masks(shape[1], shape[3], kind)
    inputs = make_inputs(shape, DTYPES[dtypes], masks[0])
    seed = torch.tensor([2**62 + 12345]) if p else None
    exact = {name: t.double() for name, t in inputs.items()}
    expected = run_all(reference, exact, masks, seed, p)
    for module in (kernels, kernels.dispatch) if shape in SHAPES[1:3] else (kernels,):
        for name, value in run_all(module, inputs, masks, seed, p).items():
            assert value.dtype == (inputs["x"] if name in ("y", "dx") else inputs["a"]).dtype, name
            assert torch.equal(value.double(), expected[name].to(value.dtype).double()), name


def test_kernels_are_as_accurate_as_pytorch():
    shape = SHAPES[1]
    masks = make_masks(shape[1], shape[3], "sparse")
    draw = lambda *size: torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))  # noqa: E731
    inputs = make_inputs(shape, DTYPES["fp16"], masks[0], draw)
    exact = {name: t.double() for name, t in inputs.items()}
    baseline, truth = (run_all(reference, t, masks, None, 0.0) for t in (inputs, exact))
    for name, value in run_all(kernels, inputs, masks, None, 0.0).items():
        assert_as_accurate(value, baseline[name], truth[name])


@pytest.mark.parametrize("trained", [None, torch.tensor([[True, False, True]] * 4)], ids=["all", "some"])
def test_a_sum_is_packed_as_the_reference_packs_it(trained):
    exists = torch.tensor([[True, True, True], [False] * 3, [True, False, True], [False, True, True]])
    mask = SparseMask.from_dense(exists)
    train = None if trained is None else SparseMask.from_dense(exists & trained).words
    parts = integers(5, 4, 3).float()
    out = parts.new_full((mask.nnz,), 7.0)
    assert kernels.pack_sum(parts, mask.words, mask.offsets, train, out) is out
    wanted = parts.sum(0) if trained is None else parts.sum(0) * trained
    assert torch.equal(out, wanted[exists])


@pytest.mark.parametrize("trains", ["10110", "00010"])
def test_gradients_through_the_kernels_match_finite_differences(trains):
    mask = SparseMask.from_dense(torch.tensor([[True, False], [False, False], [False, True]]))
    sizes = [(1, 2), (3, 2), (2, 2), (2,), (3,)]
    inputs = [
        torch.randn(*size, dtype=torch.float64).requires_grad_(flag == "1")
        for size, flag in zip(sizes, trains, strict=True)
    ]

    def apply(x: Tensor, w: Tensor, a: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        torch.manual_seed(5)
        return masked_lora_linear(x, w, a, values, mask, bias, scale=0.5, dropout_p=0.25, impl="triton")

    assert torch.autograd.gradcheck(apply, inputs)


def test_two_runs_give_the_same_bits():
    masks = make_masks(34, 5, "sparse")
    inputs = make_inputs(SHAPES[1], DTYPES["fp32"], masks[0], torch.randn)
    first, second = (run_all(kernels, inputs, masks, torch.tensor([1]), 0.1) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())

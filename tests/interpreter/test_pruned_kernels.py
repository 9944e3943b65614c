"""The kernels on a compressed weight against their namesakes, run by Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from lowrank_ops import BitmapWeight, kernels, pruned_linear, reference
from lowrank_ops.kernels.pruned_few import FewConfig, pruned_few
from lowrank_ops.testing import assert_as_accurate

# (N, K): even, ragged in both sizes, less than a tile
SIZES = [(64, 128), (66, 70), (5, 7)]
STRUCTURES = ["unstructured", "2:4"]


def make_weight(N: int, K: int, structure: str, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(N + K)
    w = torch.randn(N, K, generator=generator).to(dtype)
    if structure == "2:4":
        w *= torch.stack([torch.randperm(4, generator=generator) < 2 for _ in range(K)]).flatten()[:K]
        return w, reference.two_four_encode(w)
    w *= torch.rand(N, K, generator=generator) < 0.5
    return w, reference.bitmap_encode(w)


def make_inputs(M: int, N: int, K: int, R: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(M + N + K + R)
    sizes = {"x": (M, K), "a": (R, K), "b": (N, R), "bias": (N,)}
    return {name: torch.randn(*size, generator=generator).to(dtype) for name, size in sizes.items()}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(("size", "dtype"), [(SIZES[1], torch.float16), (SIZES[2], torch.float64)], ids=str)
def test_the_encoder_is_its_namesake(size, dtype, structure):
    w, expected = make_weight(*size, structure, dtype)
    encode = kernels.two_four_encode if structure == "2:4" else kernels.bitmap_encode
    for got, want in zip(encode(w), expected, strict=True):
        assert torch.equal(got, want)
        assert got.dtype == want.dtype


def test_entries_beyond_two_of_four_are_counted():
    w, lost = torch.ones(5, 21), torch.zeros((), dtype=torch.int64)
    w[1:, 4:8] = torch.tensor([1.0, -0.0, torch.nan, 0])
    kernels.two_four_encode(w, lost)
    expected = torch.zeros((), dtype=torch.int64)
    reference.two_four_encode(w, expected)
    assert lost == expected == 2 * (5 * 5 - 4)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(
    ("size", "dtype"), list(zip(SIZES, [torch.float32, torch.float16, torch.float32], strict=True)), ids=str
)
def test_decoding_is_exact(size, dtype, structure):
    w, packed = make_weight(*size, structure, dtype)
    assert torch.equal(kernels.pruned_decode(packed, *size), w)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_nothing_but_zeros_is_decoded(structure):
    _, packed = make_weight(66, 70, structure, torch.float32)
    packed = (
        [packed[0].zero_(), packed[1]] if structure == "2:4" else reference.bitmap_encode(torch.zeros(66, 70))
    )
    assert torch.equal(kernels.pruned_decode(packed, 66, 70), torch.zeros(66, 70))


# one token loads x at once where it is aligned: K a multiple of 4
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(
    ("size", "M", "dtype"),
    [
        ((40, 72), 1, torch.float16),
        ((18, 70), 1, torch.float32),
        ((40, 70), 17, torch.float16),
        ((5, 7), 2, torch.float32),
    ],
    ids=str,
)
def test_few_tokens_are_as_accurate_as_pytorch(size, M, dtype, structure):
    (N, K), (_, packed) = size, make_weight(*size, structure, dtype)
    inputs = make_inputs(M, N, K, 5, dtype)
    arguments = lambda t, p: (t["x"], p, N, t["a"], t["b"], t["bias"], 0.5)  # noqa: E731
    actual, h = kernels.pruned_matmul(*arguments(inputs, packed))
    baseline, _ = reference.pruned_matmul(*arguments(inputs, packed))
    exact = {name: t.double() for name, t in inputs.items()}
    truth, _ = reference.pruned_matmul(*arguments(exact, [packed[0].double(), *packed[1:]]))
    assert_as_accurate(actual, baseline, truth)
    assert torch.equal(h, kernels.lora_hidden(inputs["x"], inputs["a"], 0.5, None, 0.0))


@pytest.mark.parametrize(("M", "split"), [(1, 2), (3, 1)])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_splitting_and_strides_change_nothing_on_integers(structure, split, M):
    (N, K), (w, _) = (18, 200), make_weight(18, 200, structure, torch.float32)
    w = (w * 4).round()
    packed = reference.two_four_encode(w) if structure == "2:4" else reference.bitmap_encode(w)
    inputs = {name: (t * 3).round() for name, t in make_inputs(M, N, K, 3, torch.float32).items()}
    x, b, bias = inputs["x"], inputs["b"], inputs["bias"]
    h = inputs["a"][:, :M].T
    expected = x @ w.T + h @ b.T + bias
    config = FewConfig(BLOCK_N=16, BLOCK_K=64, SPLIT=split)
    assert torch.equal(pruned_few(x, packed, N, h, b, bias, config=config), expected)
    strided = [x.T.contiguous().T, b.T.contiguous().T, bias.repeat_interleave(2)[::2]]
    got = pruned_few(strided[0], packed, N, h, *strided[1:], config=config)
    assert torch.equal(got, expected)
    assert torch.equal(pruned_few(x, packed, N, None, None, None, config=config), x @ w.T)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("M", [2, 65])
def test_gradients_are_those_of_the_reference(M, structure):
    N, K, R = 6, 9, 2
    w = BitmapWeight.from_dense(make_weight(N, K, structure, torch.float64)[0], structure)
    inputs = make_inputs(M, N, K, R, torch.float64).values()
    for count in (4, 1):
        runs = []
        for impl in ("triton", "reference"):
            x, *rest = [t.clone().requires_grad_() for t in list(inputs)[:count]]
            y = pruned_linear(x, w, *rest, scale=0.5, impl=impl)
            runs.append([y.detach(), *torch.autograd.grad((y * y).sum(), (x, *rest))])
        for got, want in zip(*runs, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_gradients_through_the_kernels_match_finite_differences():
    w = BitmapWeight.from_dense(make_weight(3, 3, "unstructured", torch.float64)[0])
    inputs = make_inputs(2, 3, 3, 1, torch.float64).values()
    x, *rest = [t.requires_grad_() for t in inputs]
    call = lambda x, *rest: pruned_linear(x, w, *rest, scale=0.5, impl="triton")  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, *rest))

"""DenseLoRA's kernels against their namesakes, run by Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from lowrank_ops import dense_lora_linear, kernels, reference
from lowrank_ops.kernels import TileConfig
from lowrank_ops.kernels.dense_lora_hidden import activate
from lowrank_ops.kernels.dense_lora_output import dense_output
from lowrank_ops.testing import assert_as_accurate

# (M, N, K, R): ragged in every size, one token, more ranks than one block holds
SHAPES = [(33, 34, 40, 5), (1, 16, 64, 16), (17, 20, 36, 40)]
NAMES = ("y", "u", "h", "dx", "d_encoder", "d_core", "d_decoder")


def make_inputs(shape: tuple[int, ...], big: torch.dtype, small: torch.dtype) -> list[Tensor]:
    M, N, K, R = shape
    generator = torch.Generator().manual_seed(sum(shape))
    draw = lambda *size, std=1.0: torch.randn(*size, generator=generator) * std  # noqa: E731
    x, w, bias, dy = draw(M, K), draw(N, K, std=K**-0.5), draw(N), draw(M, N)
    factors = [draw(R, K, std=K**-0.5), draw(R, R, std=R**-0.5), draw(N, R, std=R**-0.5)]
    return [x.to(big), w.to(big), *(t.to(small) for t in factors), bias.to(big), dy.to(big)]


def run_all(module, inputs: list[Tensor], gelu: bool, seed: Tensor | None, p: float) -> dict[str, Tensor]:
    x, w, encoder, core, decoder, bias, dy = inputs
    y, u, h, _ = module.dense_lora_forward(x, w, encoder, core, decoder, bias, 0.5, gelu, seed, p)
    grads = module.dense_lora_backward(
        dy, x, w, encoder, core, decoder, u, h, None, 0.5, gelu, seed, p, True, True, True, True
    )
    return dict(zip(NAMES, (y, u, h, *grads), strict=True))


# what differs with the rank, the activation and the masks, each with the others
CASES = [(SHAPES[0], False, 0.3), (SHAPES[1], True, 0.0), (SHAPES[2], True, 0.3)]


@pytest.mark.parametrize(("shape", "gelu", "p"), CASES, ids=str)
def test_kernels_compute_what_the_reference_defines(shape, gelu, p):
    inputs = make_inputs(shape, torch.float64, torch.float64)
    seed = torch.tensor([77, -5, 2**62 + 3]) if p else None
    actual, expected = (run_all(module, inputs, gelu, seed, p) for module in (kernels, reference))
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12, msg=name)


def test_kernels_are_as_accurate_as_pytorch():
    inputs = make_inputs(SHAPES[0], torch.float16, torch.float16)
    seed = torch.tensor([1, 2, 3])
    actual, baseline = (run_all(module, inputs, True, seed, 0.1) for module in (kernels, reference))
    truth = run_all(reference, [t.double() for t in inputs], True, seed, 0.1)
    for name, value in actual.items():
        assert_as_accurate(value, baseline[name], truth[name])


def test_float32_factors_beside_a_16_bit_x_get_float32_gradients():
    inputs = make_inputs(SHAPES[0], torch.float16, torch.float32)
    rounded = [t.half() for t in inputs]
    actual, baseline = run_all(kernels, inputs, True, None, 0.0), run_all(reference, rounded, True, None, 0.0)
    truth = run_all(reference, [t.double() for t in inputs], True, None, 0.0)
    for name in NAMES[4:]:
        assert actual[name].dtype == torch.float32
        # no further from the truth than 16-bit PyTorch, as under autocast
        assert_as_accurate(actual[name].half(), baseline[name], truth[name])


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_u_of_a_few_float32_tokens_is_rounded_once(p):
    *inputs, _ = make_inputs((3, 16, 200, 5), torch.float32, torch.float32)
    rest = 0.5, True, torch.tensor([77, -5, 3]) if p else None, p
    _, u, *_ = kernels.dense_lora_forward(*inputs, *rest)
    _, exact, *_ = reference.dense_lora_forward(*[t.double() for t in inputs], *rest)
    assert torch.equal(u, exact.float())


@pytest.mark.parametrize("shape", [(0, 5, 6, 2), (5, 0, 6, 2), (5, 6, 0, 2)], ids=str)
def test_empty_sizes_give_zeros_of_the_right_shape(shape):
    inputs = make_inputs((*shape[:2], max(shape[2], 1), shape[3]), torch.float32, torch.float32)
    inputs[:3] = [t[..., : shape[2]] for t in inputs[:3]]
    seed = torch.tensor([3, 4, 5])
    actual, expected = (run_all(module, inputs, True, seed, 0.5) for module in (kernels, reference))
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_a_zero_factor_adds_exactly_zero():
    x, w, *_ = make_inputs(SHAPES[0], torch.float32, torch.float32)
    M, N, R = x.shape[0], w.shape[0], 5
    config = TileConfig(BLOCK_ROWS=32, BLOCK_COLS=32, BLOCK_DEPTH=32)
    h, seed, nothing = torch.randn(M, R), torch.tensor([1, 2, 3]), torch.zeros(N, R)
    with_update, without = (
        dense_output(x, w, h, nothing, None, scale, True, seed, 3277, x.new_empty(M, N), config)
        for scale in (7.0, 0.0)
    )
    assert torch.equal(with_update, without)
    y = torch.randn(M, N)
    before = y.clone()
    dense_output(None, None, h, nothing, None, 7.0, True, None, 0, y, config)
    assert torch.equal(y, before)


@pytest.mark.parametrize("p", [2**-16, 0.1])
def test_masks_of_thin_tensors_are_those_of_the_reference(p):
    seed, ones = torch.tensor([1, -(2**40) - 3, 2]), torch.ones(53, 37)
    h = activate(ones, False, seed, reference.keep_threshold(p))
    assert torch.equal(h != 0, reference.dropout_keep(seed[1:2], 53, 37, p))


def test_strides_are_free():
    inputs = make_inputs((17, 20, 36, 3), torch.float32, torch.float32)
    strided = [t.T.contiguous().T if t.dim() == 2 else t for t in inputs]
    seed = torch.tensor([1, 2, 3])
    expected = run_all(reference, inputs, True, seed, 0.1)
    for name, value in run_all(kernels, strided, True, seed, 0.1).items():
        torch.testing.assert_close(value, expected[name], msg=name)


# every branch of backward: all, each alone, what trains in practice
@pytest.mark.parametrize("trains", ["100000", "001000", "000100", "000010"])
def test_gradients_through_the_kernels_are_those_of_the_reference(trains):
    *tensors, dy = make_inputs((17, 20, 36, 3), torch.float64, torch.float64)
    leaves = [t.requires_grad_(flag == "1") for t, flag in zip(tensors, trains, strict=True)]
    wanted = [t for t in leaves if t.requires_grad]
    grads = []
    for impl in ("triton", "reference"):
        torch.manual_seed(5)
        y = dense_lora_linear(*leaves, scale=0.5, dropout_p=0.25, impl=impl)
        grads.append(torch.autograd.grad(y, wanted, dy))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)

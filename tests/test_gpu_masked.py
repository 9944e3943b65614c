"""A masked b on a GPU: accuracy in every dtype, bits from run to run, memory, graphs, and the Hopper sums."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lowrank_ops as lo
from lowrank_ops import SparseMask, masked_lora_linear
from lowrank_ops.testing import assert_as_accurate

pytestmark = pytest.mark.gpu

# (M, N, K, R): one that fills the multiprocessors, ragged there, two words a row, small and ragged, one token
SHAPES = [
    (4096, 4096, 4096, 32),
    (4100, 4104, 4104, 24),
    (4096, 4096, 4096, 64),
    (1001, 515, 1037, 40),
    (1, 512, 2048, 32),
]
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "fp32": (torch.float32, torch.float32),
}
TRAINS = {"lori": (True, False, False, True, False), "all": (True,) * 5}


def make_mask(N: int, R: int, density: float) -> SparseMask:
    generator = torch.Generator("cuda").manual_seed(N + R)
    chosen = torch.rand(N, R, device="cuda", generator=generator) < density
    chosen[1], chosen[2] = False, True
    return SparseMask.from_dense(chosen)


def make_inputs(shape, dtypes, mask: SparseMask, trains=TRAINS["lori"]) -> list[Tensor]:
    """Return x, w, a, b_values, bias."""
    (M, N, K, R), (big, small) = shape, dtypes
    generator = torch.Generator("cuda").manual_seed(M + N + K + R)
    draw = lambda *size, scale=1.0: torch.randn(*size, device="cuda", generator=generator) * scale  # noqa: E731
    tensors = [draw(M, K).to(big), draw(N, K, scale=K**-0.5).to(big), draw(R, K, scale=K**-0.5).to(small)]
    tensors += [draw(mask.nnz, scale=R**-0.5).to(small), draw(N).to(big)]
    return [t.requires_grad_(flag) for t, flag in zip(tensors, trains, strict=True)]


def unfused(x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    return (F.linear(x, w, bias) + 0.5 * F.linear(F.linear(x.to(a.dtype), a), b)).to(x.dtype)


def value_and_gradients(y: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    dy = torch.randn(y.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    leaves = [t for t in tensors if t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.bfloat16().to(y.dtype))]


def layer(t: list[Tensor], mask: SparseMask, **options) -> Tensor:
    return masked_lora_linear(t[0], t[1], t[2], t[3], mask, t[4], scale=0.5, **options)


@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("trains", TRAINS.values(), ids=TRAINS)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients_are_as_accurate_as_pytorch(shape, dtypes, trains, impl):
    mask = make_mask(shape[1], shape[3], 0.1)
    tensors = make_inputs(shape, dtypes, mask, trains)
    actual = value_and_gradients(layer(tensors, mask, impl=impl), tensors)
    results = []
    for dtype in (None, torch.float64):
        exact = [t.detach().to(dtype or t.dtype).requires_grad_(t.requires_grad) for t in tensors]
        x, w, a, values, bias = exact
        results.append(value_and_gradients(unfused(x, w, a, mask.unpack(values), bias), exact))
    for i, (got, base, true) in enumerate(zip(actual, *results, strict=True)):
        try:
            assert_as_accurate(got, base, true)
        except AssertionError as error:
            raise AssertionError(f"result {i}: {error}") from None


@pytest.mark.parametrize("R", [16, 32])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_the_packed_gradient_is_that_of_a_dense_b(R, density):
    shape = (4096, 4096, 4096, R)
    generator = torch.Generator("cuda").manual_seed(R)
    mask = SparseMask.from_dense(torch.rand(4096, R, device="cuda", generator=generator) < density)
    tensors = make_inputs(shape, DTYPES["bf16"], mask)
    b = mask.unpack(tensors[3].detach()).requires_grad_()
    y, expected = layer(tensors, mask), lo.lora_linear(*tensors[:3], b, tensors[4], scale=0.5)
    # another GEMM where there are no entries
    torch.testing.assert_close(y, expected, rtol=0 if mask.nnz else 0.02, atol=0 if mask.nnz else 0.02)
    (_, _, dvalues), (_, _, db) = (
        value_and_gradients(y, tensors),
        value_and_gradients(expected, [tensors[0], b]),
    )
    torch.testing.assert_close(dvalues, mask.pack(db), rtol=0.01, atol=0.01 * float(db.abs().max()))


def test_a_train_mask_changes_no_bit_of_what_it_trains():
    shape = (4096, 4096, 4096, 32)
    mask = make_mask(4096, 32, 0.15)
    keep = torch.rand(4096, 32, device="cuda", generator=torch.Generator("cuda").manual_seed(9)) < 0.5
    train = SparseMask.from_dense(mask.to_dense() & keep)
    tensors = make_inputs(shape, DTYPES["bf16"], mask)
    some = value_and_gradients(layer(tensors, mask, train_mask=train), tensors)
    everything = value_and_gradients(layer(tensors, mask), tensors)
    trained = mask.index_of(train)
    assert torch.equal(some[2][trained], everything[2][trained])
    some[2][trained] = 0
    assert not some[2].any()
    assert torch.equal(some[1], everything[1])


@pytest.mark.parametrize("trains", TRAINS.values(), ids=TRAINS)
def test_two_runs_give_the_same_bits(trains):
    shape = (4096, 4096, 4096, 32)
    mask = make_mask(4096, 32, 0.1)
    tensors = make_inputs(shape, DTYPES["bf16"], mask, trains)
    runs = []
    for _ in range(2):
        torch.manual_seed(4)
        runs.append(value_and_gradients(layer(tensors, mask, dropout_p=0.1), tensors))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_a_frozen_a_keeps_m_times_r_numbers():
    shape = M, N, K, R = 4096, 4096, 4096, 32
    mask = make_mask(N, R, 0.1)
    tensors = make_inputs(shape, DTYPES["bf16"], mask)
    layer(tensors, mask)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = layer(tensors, mask)
    assert torch.cuda.memory_allocated() - before == 2 * M * N + 2 * M * R
    del y


def test_packing_and_unpacking_wait_for_nothing():
    mask = make_mask(512, 32, 0.1)
    values = torch.randn(mask.nnz, device="cuda", requires_grad=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        dense = mask.unpack(values)
        dense.sum().backward()
        packed = mask.pack(dense)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(packed, values)
    assert torch.equal(values.grad, torch.ones_like(values))


def test_a_step_can_be_captured_in_a_graph():
    mask = make_mask(1024, 32, 0.1)
    tensors = make_inputs((2048, 1024, 1024, 32), DTYPES["bf16"], mask)
    expected = value_and_gradients(layer(tensors, mask), tensors)
    dy = torch.randn(2048, 1024, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).bfloat16()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.autograd.grad(layer(tensors, mask), [tensors[0], tensors[3]], dy)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads = torch.autograd.grad(layer(tensors, mask), [tensors[0], tensors[3]], dy)
    graph.replay()
    assert torch.equal(grads[0], expected[1])
    assert torch.equal(grads[1], expected[2])

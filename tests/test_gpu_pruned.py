"""pruned_linear and its encoder where they are compiled: accuracy, exactness, graphs, memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_ops import BitmapWeight, kernels, pruned_linear, reference
from lowrank_ops.testing import assert_as_accurate

pytestmark = pytest.mark.gpu

# (M, N, K, R): one token, some, the most that stream, a training step in small, ragged in every size
SHAPES = [
    (1, 1024, 2048, 128),
    (16, 512, 1024, 16),
    (64, 515, 1037, 24),
    (2048, 1024, 512, 64),
    (3, 70, 130, 5),
]
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "fp32": (torch.float32, torch.float32),
}
STRUCTURES = ["unstructured", "2:4"]


def make_weight(N: int, K: int, structure: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(N + K)
    w = torch.randn(N, -(-K // 4) * 4, device="cuda", generator=generator) * max(K, 1) ** -0.5
    if structure == "2:4":
        groups = w.view(N, w.shape[1] // 4, 4)
        w = (groups * (groups.abs().argsort(-1).argsort(-1) >= 2)).view(w.shape)
    else:
        w = w * (torch.rand(w.shape, device="cuda", generator=generator) < 0.5)
    return w[:, :K].to(dtype).contiguous()


def make_inputs(M: int, N: int, K: int, R: int, big: torch.dtype, small: torch.dtype) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(M + N + K + R)
    draw = lambda *size, scale=1.0: torch.randn(*size, device="cuda", generator=generator) * scale  # noqa: E731
    x, bias = draw(M, K).to(big), draw(N).to(big)
    a, b = draw(R, K, scale=K**-0.5).to(small), draw(N, R, scale=R**-0.5).to(small)
    return [t.requires_grad_() for t in (x, a, b, bias)]


def unfused(x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    return (F.linear(x, w, bias) + 0.5 * F.linear(F.linear(x.to(a.dtype), a), b)).to(x.dtype)


def value_and_gradients(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(1)
    dy = torch.randn(y.shape, device="cuda", generator=generator).bfloat16().to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients_are_as_accurate_as_pytorch(shape, dtypes, structure, impl):
    inputs = make_inputs(*shape, *dtypes)
    dense = make_weight(*shape[1:3], structure, dtypes[0])
    w = BitmapWeight.from_dense(dense, structure)
    x, *rest = inputs
    actual = value_and_gradients(pruned_linear(x, w, *rest, scale=0.5, impl=impl), inputs)
    baseline = value_and_gradients(unfused(x, dense, *rest), inputs)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    truth = value_and_gradients(unfused(exact[0], dense.double(), *exact[1:]), exact)
    for name, got, base, true in zip(["y", "dx", "da", "db", "dbias"], actual, baseline, truth, strict=True):
        try:
            assert_as_accurate(got, base, true)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("M", [1, 16, 300])
def test_without_an_adapter_it_is_the_linear_layer(M, structure, impl):
    dense = make_weight(515, 1037, structure, torch.bfloat16)
    x = torch.randn(M, 1037, device="cuda", dtype=torch.bfloat16).requires_grad_()
    actual = pruned_linear(x, BitmapWeight.from_dense(dense, structure), impl=impl)
    assert_as_accurate(actual, F.linear(x, dense), F.linear(x.double(), dense.double()))
    dy = torch.randn_like(actual)
    (dx,) = torch.autograd.grad(actual, x, dy)
    assert_as_accurate(dx, dy @ dense, dy.double() @ dense.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [(1024, 2048), (515, 1037), (5, 7), (0, 5), (5, 0)], ids=str)
def test_encoders_agree_and_decoders_are_exact(size, dtype):
    w = make_weight(*size, "unstructured", dtype)
    packed = kernels.bitmap_encode(w)
    for got, want in zip(packed, reference.bitmap_encode(w), strict=True):
        assert torch.equal(got, want)
    assert torch.equal(kernels.pruned_decode(packed, *size), w)
    w = make_weight(*size, "2:4", dtype)
    packed = kernels.two_four_encode(w)
    for got, want in zip(packed, reference.two_four_encode(w), strict=True):
        assert torch.equal(got, want)
    assert torch.equal(kernels.pruned_decode(packed, *size), w)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.9, 1.0])
def test_encoders_take_any_share_of_zeros(share):
    w = torch.randn(256, 192, device="cuda", dtype=torch.bfloat16)
    w *= torch.rand(256, 192, device="cuda") >= share
    packed = kernels.bitmap_encode(w)
    for got, want in zip(packed, reference.bitmap_encode(w), strict=True):
        assert torch.equal(got, want)
    assert torch.equal(kernels.pruned_decode(packed, *w.shape), w)


def test_a_strided_weight_is_encoded_as_it_reads():
    w = make_weight(300, 200, "unstructured", torch.bfloat16).T
    assert torch.equal(BitmapWeight.from_dense(w).to_dense(), w)


def test_a_part_of_a_weight_is_encoded_as_it_reads():
    # rows that start at odd addresses
    w = make_weight(200, 301, "2:4", torch.bfloat16)[:, 4:298]
    for structure in STRUCTURES:
        assert torch.equal(BitmapWeight.from_dense(w, structure).to_dense(), w)


def test_a_third_entry_of_four_is_refused():
    w = make_weight(515, 1037, "2:4", torch.bfloat16)
    w[514, 1032:1036] = torch.tensor([1, 1, 0, 1])
    with pytest.raises(ValueError, match="in any 4 columns of a row, got 3"):
        BitmapWeight.from_dense(w, "2:4")


def test_infinities_are_kept():
    w = make_weight(64, 128, "unstructured", torch.bfloat16)
    w[3, 5], w[60, 127] = float("inf"), float("nan")
    torch.testing.assert_close(BitmapWeight.from_dense(w).to_dense(), w, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("M", [1, 16])
def test_two_runs_and_a_graph_give_the_same_bits(M, structure):
    x, a, b, bias = (t.detach() for t in make_inputs(M, 256, 8192, 16, torch.bfloat16, torch.bfloat16))
    w = BitmapWeight.from_dense(make_weight(256, 8192, structure, torch.bfloat16), structure)
    first = pruned_linear(x, w, a, b, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = pruned_linear(x, w, a, b, bias)
    for _ in range(3):
        graph.replay()
        assert torch.equal(y, first)


def test_many_tokens_give_the_dense_copy_back():
    w = BitmapWeight.from_dense(make_weight(4096, 4096, "unstructured", torch.bfloat16))
    x = torch.randn(256, 4096, device="cuda", dtype=torch.bfloat16)
    pruned_linear(x, w)  # cuBLAS keeps what it works in
    before = torch.cuda.memory_allocated()
    y = pruned_linear(x, w)
    assert torch.cuda.memory_allocated() - before == y.nbytes
    few = x[:64]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    pruned_linear(few, w)
    assert torch.cuda.max_memory_allocated() - before < w.nbytes // 2


def test_it_compiles_into_one_graph():
    w = BitmapWeight.from_dense(make_weight(256, 512, "unstructured", torch.bfloat16))
    x, a, b, bias = make_inputs(16, 256, 512, 8, torch.bfloat16, torch.bfloat16)
    compiled = torch.compile(lambda x, w, *rest: pruned_linear(x, w, *rest), fullgraph=True)
    assert torch.equal(compiled(x, w, a, b, bias), pruned_linear(x, w, a, b, bias))


@pytest.mark.skipif(not torch.backends.cusparselt.is_available(), reason="PyTorch has no cuSPARSELt here")
@pytest.mark.parametrize(("M", "adapters"), [(4096, torch.bfloat16), (4099, torch.float32)])
def test_accelerated_it_is_as_accurate_and_keeps_its_gradients(M, adapters):
    inputs = make_inputs(M, 512, 256, 16, torch.bfloat16, adapters)
    dense = make_weight(512, 256, "2:4", torch.bfloat16)
    w = BitmapWeight.from_dense(dense, "2:4")
    plain = w.nbytes
    assert w.accelerate(4096) is w
    assert plain < w.nbytes < 2.5 * plain
    assert BitmapWeight(w.tensors, tuple(w.shape), "2:4").accelerated is None
    x, *rest = inputs
    y = pruned_linear(x, w, *rest, scale=0.5)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    truth = value_and_gradients(unfused(exact[0], dense.double(), *exact[1:]), exact)
    baseline = value_and_gradients(unfused(x, dense, *rest), inputs)
    for got, base, true in zip(value_and_gradients(y, inputs), baseline, truth, strict=True):
        assert_as_accurate(got, base, true)

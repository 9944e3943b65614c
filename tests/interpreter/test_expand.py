"""The wide factor of a compact SALOR layer, expanded by the kernels: the same bits as stock PyTorch's."""

import pytest
import torch
from torch import nn

import lowrank_ops as lo
from lowrank_ops.expand import expand, word_offsets


@pytest.mark.parametrize(
    ("shape", "density"), [((4, 64), 0.5), ((3, 45), 0.3), ((2, 7), 0.0), ((2, 33), 1.0)]
)
def test_expanding_and_its_gradient_have_the_bits_of_the_reference(shape, density):
    generator = torch.Generator().manual_seed(0)
    mask = lo.SparseMask.from_dense(torch.rand(shape, generator=generator) < density)
    values = torch.randn(mask.nnz, generator=generator, requires_grad=True)
    weights = torch.randn(shape, generator=generator)
    found = [expand(values, mask, word_offsets(mask), impl=impl) for impl in ("triton", "reference")]
    grads = [torch.autograd.grad((dense * weights).sum(), values)[0] for dense in found]
    assert torch.equal(*found)
    assert torch.equal(*grads)


def test_a_compact_layer_runs_on_the_kernels():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 24))
    lo.inject(model, lo.SALORConfig(r=4))
    adapter = model[0].adapter
    for factor, pruned in adapter.pairs():
        factor.data.copy_(torch.randint(-2, 3, factor.shape))
        pruned.copy_(torch.rand(factor.shape) < 0.6)
        factor.data[pruned] = 0
    dense = model[0]
    lo.salor.compact(model)
    # integers: every sum is exact
    for parameter in dense.base.parameters():
        parameter.data.copy_(torch.randint(-2, 3, parameter.shape))
    x = torch.randint(-2, 3, (5, 40)).float()
    model[0].impl, dense.impl = "triton", "reference"
    y, expected = model(x), dense(x)
    assert torch.equal(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for sparse, old in ((model[0].adapter.a, adapter.a), (model[0].adapter.b, adapter.b)):
        assert torch.equal(sparse.values.grad, sparse.mask.pack(old.grad))

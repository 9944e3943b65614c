"""Small factors cast or put beside each other are what torch makes of them."""

import pytest
import torch

from lowrank_ops.kernels._cast import beside, cast_pair


@pytest.mark.parametrize("both", [True, False])
def test_a_pair_is_cast_and_the_first_scaled(both):
    h, b = torch.randn(130, 16), torch.randn(33, 16)
    given = b if both else b.half()
    first, second = cast_pair(h, given, torch.float16, 1.25)
    assert torch.equal(first, (h * 1.25).half())
    assert torch.equal(second, b.half())
    assert both or second is given


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("sizes", [(16, 8), (16, 8, 24)], ids=str)
def test_factors_come_to_lie_beside_each_other(dim, sizes):
    tensors = [torch.randn((n, 70) if dim == 0 else (70, n)) for n in sizes]
    assert torch.equal(beside(tensors, dim), torch.cat(tensors, dim))
    assert torch.equal(beside(tensors, dim, torch.float16), torch.cat(tensors, dim).half())

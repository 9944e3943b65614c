"""The mask as bits, and the kernel for both factors' gradients, run by Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from lowrank_ops import reference
from lowrank_ops.kernels import lora_backward_factors
from lowrank_ops.kernels.dropout_mask import drop_some, dropout_mask
from lowrank_ops.kernels.lora_backward_factors import factor_counters, factor_gradients
from lowrank_ops.testing import assert_as_accurate

# (M, K, R): one block, blocks of columns and shares of rows, two blocks of ranks, ragged everywhere, one row
SHAPES = [(64, 64, 16), (300, 200, 16), (260, 72, 80), (131, 77, 5), (1, 40, 8)]
SEED = torch.tensor([123456789012345])


def draw(*size: int, integers: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(sum(size))
    if integers:
        return torch.randint(-1, 2, size, generator=generator).half()
    return torch.randn(size, generator=generator).half()


def bits(mask: Tensor, K: int) -> Tensor:
    """Return words of a mask as booleans."""
    return ((mask[:, :, None] >> torch.arange(32)) & 1).flatten(1)[:, :K].bool()


def run(M: int, K: int, R: int, p: float, integers: bool, db_size: tuple[int, ...] = ()) -> tuple:
    """Return x, dh, mask as booleans, da; parts and db, if wanted."""
    x, dh = draw(M, K, integers=integers), draw(M, R, integers=integers)
    mask = dropout_mask(SEED, M, K, reference.keep_threshold(p)) if p else None
    keep = reference.dropout_keep(SEED, M, K, p) if p else torch.ones(M, K, dtype=torch.bool)
    parts = torch.randn(4, *db_size, generator=torch.Generator().manual_seed(0)) if db_size else None
    db = torch.empty(db_size, dtype=torch.float16) if db_size else None
    counters = torch.zeros(factor_counters(K, R), dtype=torch.int32)
    da = factor_gradients(x, dh, mask, counters, parts, db)
    return x, dh, keep, da, parts, db


@pytest.mark.parametrize("p", [2**-16, 0.1, 0.5, 0.99999])
@pytest.mark.parametrize("size", [(1, 1), (17, 31), (40, 33), (16, 64), (19, 2100)], ids=str)
def test_each_bit_of_a_mask_says_whether_the_reference_keeps_the_element(size, p):
    mask = dropout_mask(SEED, *size, reference.keep_threshold(p))
    assert mask.shape == (size[0], -(-size[1] // 32))
    assert torch.equal(bits(mask, size[1]), reference.dropout_keep(SEED, *size, p))


def test_a_copy_of_x_has_zeros_where_its_mask_says_so():
    for x in (draw(17, 333), draw(70, 9).T):
        dropped, mask = drop_some(x, SEED, reference.keep_threshold(0.3))
        keep = reference.dropout_keep(SEED, *x.shape, 0.3)
        assert torch.equal(bits(mask, x.shape[1]), keep)
        assert torch.equal(dropped, torch.where(keep, x, 0))


def test_masks_differ_with_either_half_of_the_seed():
    threshold = reference.keep_threshold(0.5)
    seeds = [torch.tensor([s]) for s in (5, 6, 5 + 2**40, 2**63 - 1)]
    masks = [dropout_mask(seed, 8, 64, threshold) for seed in seeds]
    for seed, mask in zip(seeds, masks, strict=True):
        assert torch.equal(bits(mask, 64), reference.dropout_keep(seed, 8, 64, 0.5))
    assert len({str(mask.tolist()) for mask in masks}) == len(seeds)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_small_integers_give_exactly_the_product(shape, p):
    x, dh, keep, da, _, _ = run(*shape, p, integers=True)
    assert torch.equal(da, (dh.float().T @ (x * keep).float()).half())


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_product_is_as_accurate_as_pytorch(shape, p):
    x, dh, keep, da, _, _ = run(*shape, p, integers=False)
    dropped = x * keep
    assert_as_accurate(da, dh.T @ dropped, dh.double().T @ dropped.double())


# fewer elements than one program adds up, many more than all do at once, and two dimensions
@pytest.mark.parametrize("db_size", [(3, 5), (700, 16), (9000,)], ids=str)
@pytest.mark.parametrize("shape", [(64, 64, 16), (300, 200, 16)], ids=str)
def test_parts_of_db_are_summed_beside_it(shape, db_size):
    x, dh, keep, da, parts, db = run(*shape, 0.3, True, db_size)
    assert torch.equal(da, (dh.float().T @ (x * keep).float()).half())
    # the sum is rounded once, from more than float32
    assert torch.equal(db, parts.double().sum(0).half())


def test_one_share_and_many_give_one_result(monkeypatch):
    M, K, R = 520, 70, 24
    results, counts = [], []
    for each in (64, 128, 192, 576):
        monkeypatch.setattr(lora_backward_factors, "_shares", lambda *a, e=each: (e, -(-M // e)))
        counts.append(-(-M // each))
        results.append(run(M, K, R, 0.3, integers=True)[3])
    assert counts == [9, 5, 3, 1]
    assert all(torch.equal(result, results[0]) for result in results)


def test_shares_are_whole_blocks_that_cover_every_row_once():
    facts = lora_backward_factors.DeviceFacts(arch="sm90", processors=132)
    for M in (1, 64, 65, 127, 1000, 2049, 8192, 100_003):
        for K, R in ((8, 8), (4096, 16), (14336, 128), (70, 300)):
            for drop in (False, True):
                each, count = lora_backward_factors._shares(
                    M, K, R, lora_backward_factors.factor_config(M, K, R, drop), facts
                )
                assert each % 64 == 0
                assert (count - 1) * each < M <= count * each
                assert count <= 32


def test_counters_of_a_larger_buffer_are_left_as_they_were():
    x, dh = draw(300, 200), draw(300, 16)
    count = factor_counters(200, 16)
    counters = torch.zeros(count + 3, dtype=torch.int32)
    counters[count:] = 7
    da = factor_gradients(x, dh, None, counters)
    assert torch.equal(counters[count:], torch.full((3,), 7, dtype=torch.int32))
    assert torch.equal(da, run(300, 200, 16, 0.0, integers=False)[3])


def test_rows_may_lie_apart():
    x, dh = draw(300, 208), draw(300, 24)
    counters = lambda: torch.zeros(factor_counters(200, 16), dtype=torch.int32)  # noqa: E731
    want = factor_gradients(x[:, :200].contiguous(), dh[:, 8:].contiguous(), None, counters())
    assert torch.equal(factor_gradients(x[:, :200], dh[:, 8:], None, counters()), want)


def test_infinite_parts_add_up_as_they_do_in_pytorch():
    inf = torch.inf
    parts = torch.tensor([[1.0, 1.0, inf, 2.0], [inf, -inf, -inf, 3.0], [2.0, 5.0, 1.0, 4.0]])[:, :, None]
    x, dh = torch.ones(20, 32, dtype=torch.float16), torch.ones(20, 1, dtype=torch.float16)
    db = torch.empty(4, 1, dtype=torch.float16)
    counters = torch.zeros(factor_counters(32, 1), dtype=torch.int32)
    factor_gradients(x, dh, None, counters, parts, db)
    torch.testing.assert_close(db, parts.sum(0).half(), rtol=0, atol=0, equal_nan=True)

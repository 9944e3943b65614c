"""SparseMask: packing and unpacking, what it takes, and what it refuses."""

import copy

import pytest
import torch

from lowrank_ops import SparseMask

# one column, less than a word, a whole word, more than one, the largest rank, nothing at all
SHAPES = [(5, 1), (6, 20), (4, 32), (7, 33), (3, 512), (0, 8), (3, 0)]


def draw(shape: tuple[int, int], density: float) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) < density


@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_go_through_the_entries_row_by_row(shape, density):
    exists = draw(shape, density)
    mask = SparseMask.from_dense(exists)
    dense = torch.arange(exists.numel(), dtype=torch.float32).view(shape) + 1
    assert (mask.shape, mask.nnz) == (shape, int(exists.sum()))
    assert torch.equal(mask.to_dense(), exists)
    assert torch.equal(mask.pack(dense), dense[exists])
    assert torch.equal(mask.unpack(dense[exists]), dense * exists)
    assert torch.equal(mask.offsets.diff(), exists.sum(1))


def test_bits_run_from_the_least_significant_and_rows_begin_at_their_offsets():
    exists = torch.zeros(3, 40, dtype=torch.bool)
    exists[0, [0, 2, 31]] = exists[2, [33]] = True
    mask = SparseMask.from_dense(exists)
    assert mask.words.tolist() == [[5 - 2**31, 0], [0, 0], [0, 2]]
    assert mask.offsets.tolist() == [0, 3, 3, 4]
    assert mask.words.dtype == mask.offsets.dtype == torch.int32


def test_packing_and_unpacking_are_differentiable_twice():
    mask = SparseMask.from_dense(draw((4, 5), 0.5))
    dense = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    values = torch.randn(mask.nnz, dtype=torch.float64, requires_grad=True)
    for function, given in ((mask.pack, dense), (mask.unpack, values)):
        assert torch.autograd.gradcheck(function, given)
        assert torch.autograd.gradgradcheck(function, given)


def test_a_subset_is_found_in_the_packed_vector():
    mask = SparseMask.from_dense(draw((6, 40), 0.6))
    subset = SparseMask.from_dense(mask.to_dense() & draw((40, 6), 0.5).T)
    dense = torch.randn(6, 40)
    assert 0 < subset.nnz < mask.nnz
    assert mask.contains(subset)
    assert not subset.contains(mask)
    assert torch.equal(mask.pack(dense)[mask.index_of(subset)], subset.pack(dense))
    with pytest.raises(ValueError, match=r"^SparseMask\.index_of: subset must have no entry that the mask"):
        subset.index_of(mask)


def test_union_and_intersection_are_those_of_sets():
    one, other = draw((6, 40), 0.5), draw((40, 6), 0.5).T
    masks = SparseMask.from_dense(one), SparseMask.from_dense(other)
    assert masks[0].union(masks[1]) == SparseMask.from_dense(one | other)
    assert masks[0].intersection(masks[1]) == SparseMask.from_dense(one & other)


def test_masks_are_equal_where_their_entries_are():
    exists = draw((6, 40), 0.5)
    mask, other = SparseMask.from_dense(exists), exists.clone()
    assert mask == SparseMask.from_dense(exists)
    assert mask == copy.deepcopy(mask)
    other[0, 0] ^= True
    assert mask != SparseMask.from_dense(other)
    assert mask != exists.shape
    assert mask != mask.to("meta")


def test_words_alone_make_the_mask_again():
    mask = SparseMask.from_dense(draw((6, 40), 0.5))
    again = SparseMask.from_words(mask.words, (6, 40))
    assert again == mask
    assert torch.equal(again.offsets, mask.offsets)
    with pytest.raises(ValueError, match="must have no bit set past column 38"):
        SparseMask.from_words(SparseMask.from_dense(torch.ones(1, 40, dtype=torch.bool)).words, (1, 39))


def test_a_mask_can_be_planned_on_the_meta_device():
    mask = SparseMask.meta((10, 20), 30)
    assert mask.density == 0.15
    assert mask.nbytes == 10 * 4 + 11 * 4
    assert mask.unpack(torch.empty(30, device="meta")).shape == (10, 20)
    assert mask.pack(torch.empty(10, 20, device="meta")).shape == (30,)
    moved = SparseMask.from_dense(draw((6, 40), 0.5)).to("meta")
    assert moved.words.is_meta
    assert moved.offsets.is_meta


def test_from_2_31_entries_on_offsets_are_64_bit():
    assert SparseMask.meta((2**16, 2**15), 2**31 - 1).offsets.dtype is torch.int32
    assert SparseMask.meta((2**16, 2**15), 2**31).offsets.dtype is torch.int64


def test_unpacking_compiles_into_one_graph():
    mask = SparseMask.from_dense(draw((6, 40), 0.5))
    values = torch.randn(mask.nnz, requires_grad=True)
    compiled = torch.compile(lambda v: mask.unpack(2 * v), fullgraph=True, backend="aot_eager")
    dense = compiled(values)
    dense.sum().backward()
    assert torch.equal(dense, mask.unpack(2 * values.detach()))
    assert torch.equal(values.grad, torch.full_like(values, 2))


ERRORS = {
    "from_dense: dense must be a bool Tensor, got torch.float32": lambda: SparseMask.from_dense(
        torch.ones(2, 2)
    ),
    "from_dense: dense must be a bool Tensor, got list": lambda: SparseMask.from_dense([[True]]),
    "from_dense: dense must be (rows, cols), got (3,)": lambda: SparseMask.from_dense(torch.ones(3).bool()),
    "from_words: words must be int32, got torch.int64": lambda: SparseMask.from_words(
        torch.ones(1, 1).long(), (1, 3)
    ),
    "from_words: words must be (rows, ceil(cols / 32)) = (1, 2), got (1, 1)": lambda: SparseMask.from_words(
        torch.ones(1, 1).int(), (1, 33)
    ),
    "meta: nnz must be in [0, 6], got 7": lambda: SparseMask.meta((2, 3), 7),
    "pack: dense must be (rows, cols) = (2, 2), got (2, 3)": lambda: full().pack(torch.ones(2, 3)),
    "pack: dense must be a Tensor, got list": lambda: full().pack([[1, 2], [3, 4]]),
    "unpack: values must be a Tensor, got int": lambda: full().unpack(5),
    "unpack: values must be (nnz,) = (4,), got (5,)": lambda: full().unpack(torch.ones(5)),
    "unpack: values must be on the device of the mask, cpu, got meta": lambda: full().unpack(
        torch.ones(4, device="meta")
    ),
    "union: the other mask must be of shape (2, 2), got (1, 1)": lambda: full().union(
        SparseMask.from_dense(torch.ones(1, 1).bool())
    ),
}


def full() -> SparseMask:
    return SparseMask.from_dense(torch.ones(2, 2, dtype=torch.bool))


@pytest.mark.parametrize("message", ERRORS)
def test_what_does_not_fit_is_named(message):
    with pytest.raises((TypeError, ValueError)) as caught:
        ERRORS[message]()
    assert str(caught.value) == f"SparseMask.{message}"

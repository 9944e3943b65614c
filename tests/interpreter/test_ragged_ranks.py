"""Ranks that are no multiple of 16 are filled up with zeros for long passes; nobody can see it."""

import pytest
import torch

pytest.importorskip("triton")

from lowrank_ops import kernels, reference  # noqa: E402
from lowrank_ops.kernels import _ragged, dispatch  # noqa: E402

M, K, SIZES, RANKS = 20, 24, (16, 25, 17), (5, 16, 19)
SEED = torch.tensor([7])


@pytest.fixture(autouse=True)
def long(monkeypatch):
    """Count every pass as long."""
    monkeypatch.setattr(_ragged, "_LONG", 0)


def make(dtype):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    ws, dys = [draw(N, K) for N in SIZES], [draw(M, N) for N in SIZES]
    a_list, b_list = [draw(R, K) for R in RANKS], [draw(N, R) for N, R in zip(SIZES, RANKS, strict=True)]
    return draw(M, K), ws, a_list, b_list, dys


def layer(module, x, ws, a_list, b_list, dys, i, needs=(True, True, True)):
    args = ws[i], a_list[i], b_list[i]
    y, h, mask = module.lora_forward(x, *args, None, 0.5, SEED, 0.25)
    return y, h, *module.lora_backward(dys[i], x, *args, h, mask, 0.5, SEED, 0.25, *needs)


def group(module, x, ws, a_list, b_list, dys):
    scales, needs = [0.5, 1.0, 1.5], [True] * 3
    ys, h, mask = module.lora_group_forward(x, ws, a_list, b_list, [None] * 3, scales, SEED, 0.25)
    dx, das, dbs = module.lora_group_backward(
        dys, x, ws, a_list, b_list, h, mask, scales, SEED, 0.25, True, needs, needs
    )
    return *ys, h, dx, *das, *dbs


def assert_same_as_reference(run, *more):
    inputs = make(torch.float64)
    for got, want in zip(run(dispatch, *inputs, *more), run(reference, *inputs, *more), strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("i", [0, 2], ids=["R=5", "R=19"])
def test_a_layer_of_any_rank_is_what_the_reference_gives(i):
    assert_same_as_reference(layer, i)


def test_a_group_of_any_ranks_is_what_the_reference_gives():
    assert_same_as_reference(group)


def test_the_gradient_of_b_alone_needs_no_other_factor():
    x, _, _, b_list, dys = make(torch.float32)
    h = x[:, :5].contiguous()
    *_, db = dispatch.lora_backward(
        dys[0], None, None, None, None, h, None, 0.5, None, 0.0, False, False, True
    )
    assert db.shape == b_list[0].shape
    torch.testing.assert_close(db, dys[0].T @ h)


def test_what_is_given_is_not_copied_where_the_rank_is_a_multiple_of_16_or_rows_have_room():
    a, b = torch.zeros(16, 3), torch.zeros(3, 32)
    assert _ragged.filled_rows(a) is a
    assert _ragged.filled_columns(b) is b
    assert _ragged.wide_columns(b) is b
    assert not _ragged.is_ragged([16, 32], 2**30)
    wide = _ragged.wide_columns(b[:, :19])
    assert (wide.shape, wide.data_ptr()) == ((3, 32), b.data_ptr())
    # the last row would end outside
    assert _ragged.wide_columns(b.view(-1)[5:].as_strided((3, 19), (32, 1))).data_ptr() != b.data_ptr() + 20


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=["kept", "rounded"])
def test_columns_and_rows_are_filled_with_zeros(dtype):
    t = torch.randn(90, 40)[:, 3:22]
    want = torch.nn.functional.pad(t, (0, 13)).to(dtype or t.dtype)
    assert torch.equal(_ragged.filled_columns(t, dtype), want)
    assert torch.equal(_ragged.filled_columns(t.T.contiguous().T, dtype), want)
    assert torch.equal(_ragged.filled_rows(t.T), torch.nn.functional.pad(t.T, (0, 0, 0, 13)))


def test_the_hidden_factors_have_room_for_16_ranks_at_a_time_and_no_more_is_kept():
    x, ws, a_list, b_list, dys = make(torch.float32)
    _, h, _ = dispatch.lora_forward(x, ws[2], a_list[2], b_list[2], None, 0.5, None, 0.0)
    assert (h.shape, h.stride()) == ((M, 19), (32, 1))
    args = dys[2], x, ws[2], a_list[2], b_list[2]
    want = dispatch.lora_backward(*args, h.clone(), None, 0.5, None, 0.0, True, True, True)
    # what lies beside h is not looked at
    h.as_strided((M, 13), (32, 1), 19).fill_(float("nan"))
    got = dispatch.lora_backward(*args, h, None, 0.5, None, 0.0, True, True, True)
    assert all(torch.equal(one, other) and one.is_contiguous() for one, other in zip(got, want, strict=True))


@pytest.mark.parametrize("rank", [33, 45, 51])
def test_a_last_block_of_few_ranks_is_a_product_of_half_as_many(rank):
    config = kernels.TileConfig(BLOCK_ROWS=16, BLOCK_COLS=32, BLOCK_DEPTH=0, SPLIT=2, MOST_RANKS=32)
    t, dh = torch.randint(-4, 5, (40, 35)).float(), torch.randint(-4, 5, (40, rank + -rank % 16)).float()
    da = kernels.lora_backward_a(dh, t, None, 0.0, config=config, rank=rank)
    assert torch.equal(da, (dh.T @ t)[:rank])
    assert torch.equal(kernels.lora_backward_b(t, dh, config=config, rank=rank), (t.T @ dh)[:, :rank])

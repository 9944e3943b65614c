"""Ranks that are no multiple of 16 are filled up with zeros for long passes; nobody can see it."""

import pytest
import torch

pytest.importorskip("triton")

from lowrank_ops import reference  # noqa: E402
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


def test_what_is_given_is_not_copied_where_the_rank_is_a_multiple_of_16():
    a, b = torch.zeros(16, 3), torch.zeros(3, 32)
    assert _ragged.filled_rows(a) is a
    assert _ragged.filled_columns(b) is b
    assert not _ragged.is_ragged([16, 32], 2**30)

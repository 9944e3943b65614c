"""What SALR drops, counted and compared with sorting, and what its residual brings back."""

import math

import pytest
import torch
from torch import nn

import lowrank_ops as lo
from lowrank_ops.salr_pruning import (
    Cut,
    checksum,
    count_to_drop,
    global_cuts,
    layer_cut,
    prune_weight,
    residual_factors,
)

# ragged in both sizes: neither is a multiple of 4, 16 or 64
SHAPE = (70, 53)


def gaussian(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_sorting(w, sparsity):
    """Return ``w`` without the first of its least magnitudes, in the slowest and plainest way."""
    order = w.abs().flatten().argsort(stable=True)
    kept = w.flatten().clone()
    kept[order[: count_to_drop(w.numel(), sparsity)]] = 0
    return kept.view_as(w)


@pytest.mark.parametrize("sparsity", [0.01, 0.5, 0.57, 0.99])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_is_dropped_is_what_sorting_drops(dtype, sparsity):
    # 16-bit dtypes have many equal magnitudes here, of which the first go
    w = gaussian(*SHAPE, dtype=dtype)
    kept = prune_weight(w, layer_cut(w, lo.SALRConfig(sparsity=sparsity)), "unstructured")
    assert torch.equal(kept, by_sorting(w, sparsity))
    assert kept.count_nonzero() == w.numel() - round(sparsity * w.numel())


def test_of_equal_magnitudes_the_first_go():
    w = torch.tensor([[2.0, -1.0, 1.0], [1.0, -1.0, 3.0]])
    cut = layer_cut(w, lo.SALRConfig(sparsity=0.5))
    assert cut == (1.0, 3)
    assert prune_weight(w, cut, "unstructured").tolist() == [[2.0, 0.0, 0.0], [0.0, -1.0, 3.0]]


def test_zeros_of_the_weight_count_as_dropped():
    w = torch.tensor([[0.0, -0.0, 0.0, 5.0]])
    kept = prune_weight(w, layer_cut(w, lo.SALRConfig(sparsity=0.5)), "unstructured")
    assert kept.tolist() == [[0.0, 0.0, 0.0, 5.0]]
    # a stored -0.0 would not come back from the compressed form
    assert not kept.signbit().any()


@pytest.mark.parametrize("last", [torch.float32, torch.float64], ids=str)
def test_global_cuts_drop_what_sorting_all_weights_drops(last):
    weights = {"a": gaussian(9, 7, dtype=torch.bfloat16), "b": 0.1 * gaussian(5, 11), "c": gaussian(3, 4)}
    weights["c"] = weights["c"].to(last)
    weights["b"][0] = weights["a"][0, 0].float()  # ties over layers
    cuts = global_cuts(weights, 0.4)
    kept = [prune_weight(w, cuts[name], "unstructured").double().flatten() for name, w in weights.items()]
    everything = torch.cat([w.double().flatten() for w in weights.values()])
    assert torch.equal(torch.cat(kept), by_sorting(everything[None], 0.4)[0])


def test_a_threshold_that_float32_does_not_hold_cuts_float32_weights_right():
    low, high = 1.0, torch.tensor(1.0).nextafter(torch.tensor(2.0)).item()
    between = torch.tensor([[low + 0.6 * (high - low)]], dtype=torch.float64)
    weights = {"a": torch.tensor([[low, high]]), "b": between}
    cuts = global_cuts(weights, 2 / 3)
    assert [prune_weight(w, cuts[n], "unstructured").count_nonzero() for n, w in weights.items()] == [1, 0]


@pytest.mark.parametrize("K", [8, 9, 10, 11])
def test_two_of_four_keeps_the_two_largest_of_each_group(K):
    w = gaussian(6, K)
    kept = prune_weight(w, Cut(0.0, 0), "2:4")
    for start in range(0, K, 4):
        group, left = w[:, start : start + 4], kept[:, start : start + 4]
        largest = group.abs().topk(min(2, group.shape[1]), dim=1).values.sort(1).values
        assert torch.equal(left.abs().sort(1).values[:, -largest.shape[1] :], largest)
        assert (left.count_nonzero(1) == largest.shape[1]).all()
    assert torch.equal(kept[kept != 0], w[kept != 0])


@pytest.mark.parametrize(("p", "m"), [(0.2, 0.00424), (0.5, 0.07133), (0.7, 0.2167)])
def test_the_error_of_pruning_a_gaussian_is_the_papers(p, m):
    t = math.sqrt(2) * torch.erfinv(torch.tensor(p, dtype=torch.float64)).item()
    assert p - 2 * t * math.exp(-t * t / 2) / math.sqrt(2 * math.pi) == pytest.approx(m, rel=1e-3)
    w = 3.0 * gaussian(1000, 1000)
    kept = prune_weight(w, layer_cut(w, lo.SALRConfig(sparsity=p)), "unstructured")
    # a mean over a million: its standard error is below 0.3 % of it
    assert (w - kept).square().mean().item() / 9 == pytest.approx(m, rel=0.01)


@pytest.mark.parametrize("svd", ["exact", "randomized"])
@pytest.mark.parametrize("q", [1, 7, 53])
@pytest.mark.parametrize("kind", ["gaussian", "pruned", "orthogonal", "low rank"])
def test_the_residual_leaves_no_more_than_the_bound(kind, q, svd):
    e = gaussian(*SHAPE)
    if kind == "pruned":
        e = e - by_sorting(e, 0.5)
    elif kind == "orthogonal":
        # all singular values equal: the bound is reached
        e = torch.linalg.qr(e).Q
    elif kind == "low rank":
        e = gaussian(SHAPE[0], 5) @ gaussian(5, SHAPE[1], seed=1)
    a, b = residual_factors(e, q, svd)
    assert a.shape == (q, SHAPE[1])
    assert b.shape == (SHAPE[0], q)
    left = (e - b @ a).square().mean()
    assert left <= (1 - q / min(SHAPE)) * e.square().mean() + 1e-5 * e.square().mean()
    # both halves carry the root of each singular value
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-3, atol=1e-3)


def test_the_randomized_residual_is_as_good_as_the_exact_one_to_a_thousandth():
    e = gaussian(300, 200)
    e -= by_sorting(e, 0.5)
    errors = [
        (e - b @ a).norm() for a, b in (residual_factors(e, 16, svd) for svd in ("exact", "randomized"))
    ]
    assert errors[0] <= errors[1] * (1 + 1e-6) <= 1.001 * errors[0]


def test_the_energy_that_a_residual_of_a_gaussian_brings_back_is_known():
    # 5.8 % of the energy of a Gaussian 4096 x 4096 at q = 64: the same shares, an eighth of the size
    e = gaussian(512, 512)
    a, b = residual_factors(e, 8, "exact")
    assert 1 - (e - b @ a).square().sum() / e.square().sum() == pytest.approx(0.058, abs=0.003)


def test_the_randomized_residual_has_the_same_bits_each_time_and_draws_no_random_numbers():
    e, state = gaussian(*SHAPE), torch.get_rng_state()
    first, second = residual_factors(e, 4, "randomized"), residual_factors(e, 4, "randomized")
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_a_checksum_tells_values_and_places_apart_but_not_dtypes():
    w = gaussian(*SHAPE, dtype=torch.bfloat16)
    assert checksum(w) == checksum(w.float()) == checksum(w.clone().T.contiguous().T)
    for i, j in [(0, 0), (31, 52), (69, 0)]:
        changed = w.clone()
        changed[i, j] = -changed[i, j]
        assert checksum(changed) != checksum(w)
    assert checksum(w.roll(1, 0)) != checksum(w) != checksum(w.roll(1, 1))
    swapped = w[torch.tensor([1, 0, *range(2, 70)])]
    assert checksum(swapped) != checksum(w)


LLAMA_3_8B = {
    "q_proj": (4096, 4096), "k_proj": (4096, 1024), "v_proj": (4096, 1024), "o_proj": (4096, 4096),
    "gate_proj": (4096, 14336), "up_proj": (4096, 14336), "down_proj": (14336, 4096),
}  # fmt: skip


def test_the_residuals_of_llama_3_8b_are_counted_without_its_weights():
    blocks = nn.ModuleList(
        nn.ModuleDict({n: nn.Linear(*s, bias=False, device="meta") for n, s in LLAMA_3_8B.items()})
        for _ in range(32)
    )
    bare, full = (
        lo.report(lo.inject(model, lo.SALRConfig(residual_rank=q)))
        for q, model in ((0, nn.ModuleList(nn.ModuleDict(b.items()) for b in blocks)), (64, blocks))
    )
    assert full.trainable - bare.trainable == 167_772_160
    assert full.total - bare.total == 167_772_160
    assert full.layers == 224
    # float32 on "meta": 16 bits of values, 1 of bitmap, a quarter of row offsets, tile starts
    assert full.bits_per_weight == pytest.approx(17.258, abs=0.001)
